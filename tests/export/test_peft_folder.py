"""PEFT's folder: what is written into it, what cannot be written, and what is refused when one is read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from common import METHODS, adapted, apart, assert_untouched, outputs, snapshot, tensors_of
from safetensors.torch import load_file, save_file

import rankworks as rw
from rankworks.core.errors import ConfigError, ExportError, FingerprintError, RankworksError, StoreError, TargetError
from tiny import tiny_bert_classifier, tiny_convnet, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_mlp

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def edit(folder, **fields):
    """Change fields of a folder's adapter_config.json."""
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def rewrite(folder, change):
    """Change the tensors of a folder."""
    tensors = load_file(folder / WEIGHTS)
    save_file({k: t.contiguous() for k, t in change(tensors).items()}, folder / WEIGHTS)


@pytest.fixture
def folder(tmp_path):
    """A LoRA folder of q_proj and v_proj."""
    rw.export(adapted("lora", rank=4, alpha=6, targets=["q_proj", "v_proj"]), tmp_path / "lora")
    return tmp_path / "lora"


def refused(folder, error, match, build=tiny_llama, **options):
    """Reading raises, and the model is as it was."""
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        rw.load(model, folder, **options)
    assert rw.adapters(model) == []
    assert_untouched(model, before)


# ---- writing ------------------------------------------------------------------------------------------------------


def test_names_and_fields(folder):
    config = json.loads((folder / CONFIG).read_text())
    names = set(tensors_of(folder))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert len(names) == 8
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 6, ["q_proj", "v_proj"])
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert {f.name for f in folder.iterdir()} == {CONFIG, WEIGHTS, "rankworks.json"}


@pytest.mark.parametrize(
    ("method", "kind", "suffixes"),
    [
        ("dora", "LORA", {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}),
        ("vera", "VERA", {"vera_lambda_b", "vera_lambda_d"}),
        ("shira", "SHIRA", {"shira_weight", "shira_indices"}),
        ("bone", "MISS", {"miss_block"}),
        ("bone-bat", "MISS", {"miss_block"}),
    ],
)
def test_every_method_has_its_own_format(tmp_path, method, kind, suffixes):
    delta, settings = METHODS[method]
    rw.export(adapted(delta, targets=["q_proj"], **settings), tmp_path / "out")
    layer = "base_model.model.model.layers.1.self_attn.q_proj."
    assert {n.removeprefix(layer) for n in tensors_of(tmp_path / "out") if n.startswith(layer)} == suffixes
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["peft_type"] == kind


def test_the_start_becomes_a_second_pair_of_the_same_scale(tmp_path):
    model = adapted("lora", rank=3, alpha=5, scaling="rslora", init="pissa", targets=["q_proj"])
    rw.export(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["r"] == 6
    assert config["use_rslora"]
    assert config["lora_alpha"] / 6**0.5 == pytest.approx(5 / 3**0.5)


def test_a_narrow_file(tmp_path):
    model = adapted("lora", rank=4)
    report = rw.export(model, tmp_path / "out", dtype="bfloat16")
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert not report.exact
    assert 0 < report.verified < 2e-2


@pytest.mark.parametrize(
    ("delta", "build", "settings", "reason"),
    [
        ("lora-xs", tiny_llama, {"rank": 4}, "LoRA-XS.*kind='lora', which is exact"),
        ("vera", tiny_llama, {"rank": 4, "overrides": {"q_proj": {"rank": 6}}}, "one rank.*kind='lora'"),
        ("bone", tiny_llama, {"rank": 4, "overrides": {"q_proj": {"rank": 8}}}, "one rank"),
        ("bone", tiny_gpt2, {"rank": 4, "targets": ["c_fc"]}, "conv1d_hf.*kind='lora'"),
        ("bone-bat", tiny_gpt2, {"rank": 4, "targets": ["c_fc"]}, "conv1d_hf.*kind='merged'"),
        ("shira", tiny_llama, {"density": 0.1}, "set rank in place of density"),
        ("shira", tiny_llama, {"rank": 2, "overrides": {"q_proj": {"rank": 3}}}, "one r for all"),
        ("shira", tiny_gpt2, {"rank": 2, "targets": ["c_fc[0:64]"]}, "kind='merged'"),
        ("dora", tiny_gpt2, {"rank": 2, "targets": ["c_attn[0:32]"]}, "row ranges"),
        ("dora", tiny_llama, {"inner": {"delta": "shira", "rank": 2}}, "no factors.*merged"),
        ("dora", tiny_gemma3, {"rank": 2, "targets": ["embed_tokens"]}, "scales its output"),
        ("dora", tiny_convnet, {"rank": 2, "targets": ["grouped"]}, "grouped"),
        ("lora", tiny_convnet, {"rank": 2, "targets": ["dilated"]}, "dilation"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_names_the_nearest_kind(tmp_path, delta, build, settings, reason):
    model = adapted(delta, build, **settings)
    with pytest.raises(ExportError, match=reason):
        rw.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_module_that_peft_would_mistake(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.prenorm = (torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.norm(self.prenorm(self.first(x)))

    model = adapted("lora", Net, rank=2, targets=["first"], full=["norm"])
    with pytest.raises(ExportError, match="also naming 'prenorm'"):
        rw.export(model, tmp_path / "out")


# ---- reading ------------------------------------------------------------------------------------------------------


def test_a_pickle_is_never_read(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    refused(folder, StoreError, "pickle.*safe_serialization")


def test_an_incomplete_folder(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, StoreError, "is missing")


def test_a_truncated_file(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    refused(folder, StoreError, "truncated")


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_damaged_configuration(folder, text):
    (folder / CONFIG).write_text(text)
    refused(folder, StoreError, "damaged")


@pytest.mark.parametrize("kind", ["LOHA", "OFT", "BONE", None])
def test_an_unknown_method(folder, kind):
    edit(folder, peft_type=kind)
    refused(folder, StoreError, "is not read here.*convert_to_lora")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "vera_only"),
        ("layer_replication", [[0, 2]]),
        ("use_qalora", True),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["experts.down_proj"]),
        ("alora_invocation_tokens", [3]),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("megatron_config", {"x": 1}),
        ("some_field_of_the_future", "on"),
    ],
)
def test_fields_that_cannot_be_honoured_are_named(folder, field, value):
    edit(folder, **{field: value})
    refused(folder, StoreError, f"{field}=.*cannot be honoured")


@pytest.mark.parametrize("start", ["loftq", "corda", "lora_ga", "pissa_niter_4"])
def test_starts_that_moved_the_base(folder, start):
    edit(folder, init_lora_weights=start)
    refused(folder, StoreError, "path_initial_model_for_weight_conversion")


def test_target_modules_is_not_believed(folder):
    """The tensors say which layers are adapted; target_modules may name others."""
    wanted = outputs(rw.load(tiny_llama(), folder))
    edit(folder, target_modules=["nonsense"], layers_to_transform=[7])
    assert torch.equal(outputs(rw.load(tiny_llama(), folder)), wanted)


def test_tensors_that_belong_to_nothing(folder):
    rewrite(folder, lambda t: {**t, "base_model.model.model.norm.weight": torch.ones(32)})
    refused(folder, StoreError, "no part of a LORA adapter.*norm.weight")


def test_half_a_pair(folder):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != name})
    refused(folder, StoreError, "lora_A.weight where a linear layer needs")


def test_dora_without_magnitudes(folder):
    edit(folder, use_dora=True)
    refused(folder, StoreError, "lora_magnitude_vector")


def test_a_rank_that_the_tensors_do_not_have(folder):
    edit(folder, r=5)
    refused(folder, StoreError, "says rank 5, and the tensors have rank 4")


def test_an_empty_file(folder):
    save_file({}, folder / WEIGHTS)
    refused(folder, StoreError, "no tensors")


def test_another_base_by_shape(folder):
    refused(folder, StoreError, "another base", build=lambda: tiny_llama(hidden=64))


def test_another_base_by_name(folder):
    refused(folder, TargetError, "made for another model.*adapter_config.json", build=tiny_gpt2)


def test_a_deeper_base(tmp_path):
    rw.export(adapted("lora", lambda: tiny_llama(layers=3), rank=2), tmp_path / "deep")
    refused(tmp_path / "deep", TargetError, "made for another model")


def test_another_base_by_the_embedding_peft_keeps(tmp_path):
    """PEFT stores the base weight of an adapted embedding: another base's numbers, or another size, are told."""
    rw.export(adapted("lora", rank=4, targets=["embed_tokens"]), tmp_path / "out")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    base = tiny_llama().model.embed_tokens.weight.detach()
    rewrite(tmp_path / "out", lambda t: {**t, key: base})
    rw.load(tiny_llama(), tmp_path / "out")
    rewrite(tmp_path / "out", lambda t: {**t, key: base + 0.1})
    refused(tmp_path / "out", FingerprintError, "differ by")
    rw.load(tiny_llama(), tmp_path / "out", check_base=False)
    rewrite(tmp_path / "out", lambda t: {**t, key: torch.cat([base, base[:8]])})
    refused(tmp_path / "out", FingerprintError, "resize")


def test_modules_in_full_of_another_shape(tmp_path):
    model = adapted("lora", tiny_bert_classifier, rank=2, targets=["query"], full=["classifier"])
    rw.export(model, tmp_path / "out")
    refused(tmp_path / "out", StoreError, "classifier.*another base", build=lambda: tiny_bert_classifier(num_labels=5))
    refused(tmp_path / "out", RankworksError, "made for another model", build=tiny_llama)


def test_a_name_that_is_taken(folder):
    model = rw.load(tiny_llama(), folder)
    with pytest.raises(ConfigError, match="already has"):
        rw.load(model, folder)
    assert rw.adapters(model) == ["default"]


def test_a_failed_reading_leaves_no_bank(tmp_path):
    """VeRA draws its shared pair on the way; a failure after that must not leave it on the model."""
    rw.export(adapted("vera", rank=8), tmp_path / "vera")
    model = adapted("lora", rank=2)
    before = snapshot(model)
    rewrite(tmp_path / "vera", lambda t: {**t, "base_model.vera_A": t["base_model.vera_A"] + 1})
    with pytest.raises(StoreError):
        rw.load(model, tmp_path / "vera", name="second")
    assert_untouched(model, before)
    assert not len(model.rankworks.banks)


def test_shira_entries_outside_or_twice(tmp_path):
    rw.export(adapted("shira", rank=2, targets=["q_proj"]), tmp_path / "out")
    key = "base_model.model.model.layers.0.self_attn.q_proj.shira_indices"
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "out", kept)
    rewrite(tmp_path / "out", lambda t: {**t, key: t[key] + 100})
    refused(tmp_path / "out", StoreError, "outside")
    rewrite(kept, lambda t: {**t, key: torch.zeros_like(t[key])})
    refused(kept, StoreError, "twice")


def test_a_grouped_convolution_that_mixes_groups(tmp_path):
    """PEFT's own grouped adapter reads all channels: no change of the weight does that."""
    rw.export(adapted("lora", tiny_convnet, rank=4, targets=["grouped"]), tmp_path / "out")
    key = "base_model.model.grouped.lora_A.weight"
    rewrite(tmp_path / "out", lambda t: {**t, key: t[key] + 0.1})
    refused(tmp_path / "out", StoreError, "other groups", build=tiny_convnet)


def test_a_read_adapter_trains_merges_and_leaves(folder):
    model = rw.load(tiny_llama(), folder)
    wanted = outputs(model)
    assert rw.trainable_parameters(model) == sum(t.numel() for t in tensors_of(folder).values())
    rw.merge(model)
    assert apart(outputs(model), wanted) < 1e-5
    rw.unmerge(model)
    rw.detach(model)
    assert torch.equal(outputs(model), outputs(tiny_llama()))


def test_a_plain_module_round_trip(tmp_path):
    model = adapted("lora", tiny_mlp, rank=2)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    rw.export(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["task_type"] is None
    assert torch.equal(outputs(rw.load(tiny_mlp(), tmp_path / "out"), x), outputs(model, x))
