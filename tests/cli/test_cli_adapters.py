"""`rankworks inspect`, `merge` and `export`: an adapter's folder in, another format out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from workshop import Said, Workshop, furnish, rankworks

import rankworks as rw
from rankworks.train import load_config, load_task, train


@pytest.fixture(scope="session")
def adapter(finished: tuple[Workshop, Said]) -> Path:
    """The trained adapter of the finished run."""
    return finished[0].folder / "run" / "adapter"


def logits(model: torch.nn.Module) -> torch.Tensor:
    """The model's answer to a fixed row."""
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 19).unsqueeze(0)).logits


def adapted(finished: tuple[Workshop, Said], adapter: Path) -> torch.nn.Module:
    """The tiny base with the adapter."""
    model, _ = rw.load_model(finished[0].model, dtype="float32")
    return rw.load(model, adapter)


def test_inspect_reads_the_folder_alone(adapter: Path) -> None:
    told = rankworks("inspect", adapter, "--json").json
    assert (told["format"], told["method"], told["settings"]["rank"]) == ("rankworks", "lora", 4)
    assert len(told["sites"]) == 14
    first = next(s for s in told["sites"] if s["site"] == "model.layers.0.mlp.down_proj")
    assert (first["shape"], first["rank"], first["numbers"]) == ([32, 64], 4, 4 * 96)
    assert {t["name"]: t["shape"] for t in first["tensors"]} == {"A": [4, 64], "B": [32, 4]}
    assert sum(s["numbers"] for s in told["sites"]) == told["parameters"]
    assert "change" not in first


def test_inspect_takes_the_folder_of_a_run(adapter: Path) -> None:
    assert rankworks("inspect", adapter.parent, "--json").json["path"] == str(adapter)


def test_inspect_with_the_model_tells_the_norm_of_every_change(finished: tuple[Workshop, Said], adapter: Path) -> None:
    said = rankworks("inspect", adapter, "--model", finished[0].model, "--json")
    changes = rw.delta_weights(adapted(finished, adapter))
    for site in said.json["sites"]:
        assert site["change"] == pytest.approx(float(changes[site["site"]].norm()), rel=1e-5)
        assert site["relative"] > 0
    assert "|change|" in said.err


def test_inspect_calls_an_adapter_with_gates_by_what_was_asked_for(workshop: Workshop) -> None:
    model, _ = rw.load_model(workshop.model)
    rw.adapt(model, "lora", rank=3, ranks={"ranks": "adalora", "target": 2}, targets="q_proj")
    rw.save(model, workshop.folder / "adalora")
    assert "lora adapter with adalora" in rankworks("inspect", workshop.folder / "adalora").out
    told = rankworks("inspect", workshop.folder / "adalora", "--json").json
    assert (told["method"], told["settings"]["rank"], told["settings"]["ranks"]["target"]) == ("lora", 3, 2)
    assert [(s["rank"], s["numbers"]) for s in told["sites"]] == [(3, 3 * 65)] * 2


def test_inspect_lists_few_sites_or_all(workshop: Workshop) -> None:
    from rankworks.cli.inspect import FEW

    model, _ = rw.load_model(workshop.model)
    rw.adapt(model, "vera", rank=3, full=["lm_head"], overrides={"k_proj": {"rank": 2}}, targets="all-linear")
    rw.save(model, workshop.folder / "vera")
    said = rankworks("inspect", workshop.folder / "vera")
    assert said.out.count("model.layers.") == FEW
    assert "and 1 more: --all lists them" in said.out
    assert "lm_head" in rankworks("inspect", workshop.folder / "vera", "--all").out
    told = rankworks("inspect", workshop.folder / "vera", "--json").json
    assert {s["site"].rpartition(".")[2]: s["rank"] for s in told["sites"]} == {
        "q_proj": 3, "k_proj": 2, "v_proj": 3, "o_proj": 3, "gate_proj": 3, "up_proj": 3, "down_proj": 3,
    }  # fmt: skip
    assert told["full"][0]["tensors"][0]["shape"] == [320, 32]


@pytest.mark.parametrize("kind", ["peft", "lora"])
def test_an_exported_folder_is_read_again(
    finished: tuple[Workshop, Said], adapter: Path, tmp_path: Path, kind: str
) -> None:
    said = rankworks("export", adapter, "--kind", kind, "--output", tmp_path / "x", "--json")
    assert said.status == 0, said.err
    assert said.json["exact"]
    assert said.json["model"] == str(finished[0].model)
    again = rankworks("inspect", tmp_path / "x", "--json").json
    assert (again["format"], again["method"], len(again["sites"])) == ("peft", "lora", 14)
    assert again["parameters"] == rankworks("inspect", adapter, "--json").json["parameters"]
    model, _ = rw.load_model(finished[0].model, dtype="float32")
    torch.testing.assert_close(logits(rw.load(model, tmp_path / "x")), logits(adapted(finished, adapter)))


def test_a_truncated_export_reports_its_error(adapter: Path, tmp_path: Path) -> None:
    said = rankworks("export", adapter, "--kind", "lora", "--rank", "1", "-o", tmp_path / "x", "--json")
    told = said.json
    assert not told["exact"]
    assert told["error"] == max(site["error"] for site in told["sites"]) > 0
    assert "largest errors" in said.err


def test_gguf_is_one_file(adapter: Path, tmp_path: Path) -> None:
    said = rankworks("export", adapter, "--kind", "gguf", "-o", tmp_path / "x.gguf", "--json")
    assert said.status == 0, said.err
    assert (tmp_path / "x.gguf").read_bytes()[:4] == b"GGUF"
    assert (tmp_path / "x.gguf").stat().st_size == said.json["bytes"]


def test_merge_writes_a_model_that_equals_base_and_adapter(
    finished: tuple[Workshop, Said], adapter: Path, tmp_path: Path
) -> None:
    said = rankworks("merge", adapter, "--model", finished[0].model, "--output", tmp_path / "m", "--json")
    assert said.status == 0, said.err
    assert said.json["verified"] < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="float32")
    torch.testing.assert_close(logits(merged), logits(adapted(finished, adapter)), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "m" / "tokenizer.json").is_file()


def test_the_base_is_known_from_the_run(finished: tuple[Workshop, Said], adapter: Path, tmp_path: Path) -> None:
    assert rankworks("merge", adapter.parent, "-o", tmp_path / "m", "--json").json["model"] == str(finished[0].model)


@pytest.mark.parametrize("init", ["default", "{init: pissa, quantised: true}"])
def test_the_base_of_a_quantised_run_is_quantised_alike(workshop: Workshop, tmp_path: Path, init: str) -> None:
    """From the original weights and the run's settings come the base that the adapter was trained on, and its merge."""
    said = rankworks("train", workshop.yaml, "model.quantise={bits: 3, block: 32}", f"adapt.init={init}", "--json")
    assert said.status == 0, said.err
    merged = rankworks("merge", workshop.folder / "run", "-o", tmp_path / "m", "--json")
    assert merged.status == 0, merged.err
    assert merged.json["verified"] < 1e-5
    model, tokenizer = rw.load_model(tmp_path / "m")
    task = load_task(load_config(workshop.yaml).data)  # type: ignore[arg-type]
    again = train(rw.adapt(model, "lora"), tokenizer, task, {"train": {"steps": 1}}, progress=False)
    assert again.before["accuracy"] == said.json["after"]["accuracy"]
    whole = {n: p for n, p in rw.load_model(workshop.model)[0].named_parameters() if "embed" in n}
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in whole.items())
    other = shutil.copytree(workshop.model, tmp_path / "other")
    said = rankworks("merge", workshop.folder / "run", "--model", other, "-o", tmp_path / "n")
    assert said.status == 2  # a base that is named is taken as it is
    assert "another base model" in said.err


def test_a_classifier_is_merged_with_its_own_classes(workshop: Workshop, tmp_path: Path) -> None:
    from tiny import byte_tokenizer, tiny_bert_classifier

    tiny_bert_classifier().save_pretrained(workshop.model)
    byte_tokenizer().save_pretrained(workshop.model)
    run = rankworks(
        "train", workshop.yaml, "model.task=classification", "adapt.full=[classifier]", "train.steps=2", "--json"
    )
    assert run.status == 0, run.err
    said = rankworks("merge", workshop.folder / "run", "-o", tmp_path / "m", "--json")
    assert said.status == 0, said.err
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert sorted(config["id2label"].values()) == ["business", "sport", "tech"]
    assert config["architectures"] == ["BertForSequenceClassification"]


@pytest.mark.parametrize("what", ["adapter", "run", "model"])
def test_an_export_does_not_replace_what_it_is_made_from(workshop: Workshop, what: str) -> None:
    rankworks("train", workshop.yaml, "train.steps=1", "--no-report", "--json")
    place = {"adapter": "run/adapter", "run": "run", "model": "model"}[what]
    before = sorted(p.name for p in (workshop.folder / place).iterdir())
    said = rankworks("merge", workshop.folder / "run", "--output", workshop.folder / place)
    assert said.status == 2
    assert "would be replaced" in said.err
    assert sorted(p.name for p in (workshop.folder / place).iterdir()) == before


def damaged(adapter: Path, place: Path, how: str) -> Path:
    """A copy of the adapter with something wrong."""
    shutil.copytree(adapter, place)
    tensors = place / "adapter.safetensors"
    if how == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif how == "tampered":
        tensors.write_bytes(tensors.read_bytes()[:-4] + b"\0\0\0\1")
    elif how == "no tensors":
        tensors.unlink()
    elif how == "bad json":
        (place / "adapter.json").write_text("{")
    elif how == "pickle":
        shutil.rmtree(place)
        place.mkdir()
        (place / "adapter_model.bin").write_bytes(b"\x80\x04.")
        (place / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    elif how == "nothing":
        shutil.rmtree(place)
    return place


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("truncated", "truncated"),
        ("tampered", "checksum"),
        ("no tensors", "missing"),
        ("bad json", "not valid JSON"),
        ("pickle", "pickle"),
        ("nothing", "does not exist"),
    ],
)
def test_a_damaged_adapter_is_refused_and_nothing_is_written(
    adapter: Path, finished: tuple[Workshop, Said], tmp_path: Path, how: str, word: str
) -> None:
    bad = damaged(adapter, tmp_path / "bad", how)
    said = rankworks("merge", bad, "--model", finished[0].model, "--output", tmp_path / "m", "--json")
    assert (said.status, said.out) == (2, "")
    assert word in said.err
    assert not (tmp_path / "m").exists()
    if how != "tampered":  # its numbers can be looked at; they are checked where they are used
        assert rankworks("inspect", bad).status == 2


def test_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    from tiny import byte_tokenizer, tiny_llama

    tiny_llama(seed=5).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    said = rankworks("merge", adapter, "--model", tmp_path / "other", "-o", tmp_path / "m")
    assert said.status == 2
    assert "another base model" in said.err
    assert not (tmp_path / "m").exists()


def test_without_a_base_to_be_found_it_is_asked_for(adapter: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(adapter, tmp_path / "alone")
    meta = json.loads((alone / "adapter.json").read_text())
    (alone / "adapter.json").write_text(json.dumps({**meta, "model": ""}))
    said = rankworks("merge", alone, "-o", tmp_path / "m")
    assert said.status == 2
    assert "--model" in said.err


def test_an_unknown_kind_is_answered_before_a_model_is_loaded(adapter: Path, tmp_path: Path) -> None:
    said = rankworks("export", adapter, "--kind", "merge", "-o", tmp_path / "x", "--model", "not-there")
    assert said.status == 2
    assert "Did you mean 'merged'" in said.err


def test_a_sample_s_place_in_the_cache_becomes_its_name(tmp_path: Path) -> None:
    from rankworks.cli.base import made_with
    from rankworks.core.hub import sample_models

    sample = sample_models()[0]
    (tmp_path / "adapter.json").write_text(json.dumps({"model": f"/somewhere/models/{sample.entry_name}"}))
    assert made_with(tmp_path)["recorded"] == sample.name


def test_furnished_models_are_equal(tmp_path: Path) -> None:
    """The fixtures' premise: two workshops hold the same base, so an adapter of one fits the other."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (rw.load_model(furnish(tmp_path / name).model)[0] for name in "ab")
    torch.testing.assert_close(logits(first), logits(second), rtol=0, atol=0)
