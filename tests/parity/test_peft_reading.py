"""Folders that PEFT made by itself, with its own ways of saying which layers: read by us, the outputs are the same."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from both import EXACT, TARGETS, apart, outputs, saved_by_peft
from peft import LoraConfig, MissConfig, ShiraConfig, VeraConfig, get_peft_model

import rankworks as rw
from rankworks.core.errors import StoreError, TargetError
from rankworks.core.state import state_of
from tiny import tiny_bert_classifier, tiny_gpt2, tiny_llama

BOTH_TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def made_by_peft(folder, config, build=tiny_llama, dtype=torch.float32, seed=3):
    """PEFT's own adapter, moved from its start, saved by PEFT. Returns the model."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = get_peft_model(build().to(dtype), config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    saved_by_peft(model, folder)
    return model


def check(tmp_path, config, build=tiny_llama, dtype=torch.float32):
    theirs = made_by_peft(tmp_path / "theirs", config, build, dtype)
    ours = rw.load(build().to(dtype), tmp_path / "theirs", name="read")
    assert apart(outputs(theirs), outputs(build().to(dtype))) > 1e-3
    assert apart(outputs(ours), outputs(theirs)) < EXACT[dtype]
    rw.save(ours, tmp_path / "store", name="read")
    again = rw.load(build().to(dtype), tmp_path / "store")
    assert torch.equal(outputs(again), outputs(ours))
    return ours


CONFIGS = {
    "list": LoraConfig(r=4, target_modules=TARGETS),
    "all-linear": LoraConfig(r=4, target_modules="all-linear"),
    "regex": LoraConfig(r=4, target_modules=r".*layers\.1\..*(q|v)_proj"),
    "layers": LoraConfig(r=4, target_modules=TARGETS, layers_to_transform=[1], layers_pattern="layers"),
    "exclude": LoraConfig(r=4, target_modules="all-linear", exclude_modules=["k_proj"]),
    "patterns": LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, rank_pattern={"q_proj": 2, r"layers\.0\.mlp\.\w+": 7},
        alpha_pattern={r"^model.layers.1.self_attn.v_proj": 3},
    ),
    "rslora-patterns": LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS, rank_pattern={"q_proj": 2},
    ),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=[*TARGETS, "embed_tokens"]),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "head": LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
    "bias": LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, lora_bias=True),
    "full": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "gaussian": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="gaussian"),
    "orthogonal": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="orthogonal"),
    "vera": VeraConfig(r=8, target_modules=TARGETS, projection_prng_key=11),
    "vera-seed-only": VeraConfig(r=8, target_modules=TARGETS, projection_prng_key=5, save_projection=False),
    "shira": ShiraConfig(r=2, target_modules=TARGETS, random_seed=3),
    "miss": MissConfig(r=8, target_modules=TARGETS),
    "miss-mini": MissConfig(r=8, mini_r=8, init_weights="mini", target_modules=TARGETS),
    "miss-bat": MissConfig(r=8, init_weights="bat", target_modules=TARGETS),
}  # fmt: skip


@BOTH_TYPES
@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(tmp_path, name, dtype):
    ours = check(tmp_path, CONFIGS[name], dtype=dtype)
    if name == "layers":
        assert all(".layers.1." in site for site in state_of(ours).adapter("read").sites)


def test_classifier_with_its_head(tmp_path):
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value"])
    ours = check(tmp_path, config, build=tiny_bert_classifier)
    assert list(state_of(ours).adapter("read").full) == ["classifier"]


def test_conv1d(tmp_path):
    check(tmp_path, LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), build=tiny_gpt2)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_start_that_moved_the_base_is_rebuilt(tmp_path, start, dora):
    """PEFT's folder holds the factors alone; the base it moved is found again from the original base."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=start, use_dora=dora)
    theirs = made_by_peft(tmp_path / "theirs", config)
    ours = rw.load(tiny_llama(), tmp_path / "theirs")
    assert apart(outputs(theirs), outputs(tiny_llama())) > 1e-3
    assert apart(outputs(ours), outputs(theirs)) < 1e-4  # two float32 factorisations of the base
    rw.export(ours, tmp_path / "plain", kind="peft")
    again = rw.load(tiny_llama(), tmp_path / "plain")
    assert apart(outputs(again), outputs(ours)) < 1e-5


def test_a_random_start_that_moved_the_base_is_refused(tmp_path):
    made_by_peft(tmp_path / "theirs", LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa_niter_4"))
    with pytest.raises(StoreError, match="path_initial_model_for_weight_conversion"):
        rw.load(tiny_llama(), tmp_path / "theirs")
    assert rw.adapters(tiny_llama()) == []


def test_a_start_that_peft_converted_to_the_original_base(tmp_path):
    """The remedy the refusal names, done in PEFT: it saves rank 2r against the original base."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="pissa")
    model = get_peft_model(tiny_llama(), config).eval()
    model.peft_config["default"].init_lora_weights = True
    saved_by_peft(model, tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    wanted = outputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    ours = rw.load(tiny_llama(), tmp_path / "converted")
    assert apart(outputs(ours), wanted) < 1e-4


def test_vera_with_another_pair_is_refused(tmp_path):
    """A saved pair that the seed does not give cannot be kept as a seed."""
    from safetensors.torch import load_file, save_file

    made_by_peft(tmp_path / "theirs", VeraConfig(r=8, target_modules=TARGETS))
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.vera_A"][0, 0] += 0.1
    save_file(tensors, file)
    model = tiny_llama()
    with pytest.raises(StoreError, match=r"vera_A.*convert_to_lora"):
        rw.load(model, tmp_path / "theirs")
    assert rw.adapters(model) == []


def test_two_adapters_read_onto_one_model(tmp_path):
    one = made_by_peft(tmp_path / "one", LoraConfig(r=4, target_modules=TARGETS), seed=1)
    two = made_by_peft(tmp_path / "two", VeraConfig(r=8, target_modules=TARGETS), seed=2)
    model = tiny_llama()
    rw.load(model, tmp_path / "one", name="one")
    rw.load(model, tmp_path / "two", name="two")
    assert apart(outputs(model), outputs(two)) < 1e-5
    rw.activate(model, "one")
    assert apart(outputs(model), outputs(one)) < 1e-5
    rw.detach(model)
    assert torch.equal(outputs(model), outputs(tiny_llama()))


# ---- biases that PEFT trained in place ------------------------------------------------------------------------------


BIASED = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "rslora": LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, use_rslora=True),
    "patterns": LoraConfig(
        r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, rank_pattern={"c_fc": 2}
    ),
}


@BOTH_TYPES
@pytest.mark.parametrize("name", BIASED)
def test_biases_of_the_adapted_layers(tmp_path, name, dtype):
    config = copy.deepcopy(BIASED[name])
    config.bias = "lora_only"
    ours = check(tmp_path, config, build=tiny_gpt2, dtype=dtype)
    moved = [d.c for d in state_of(ours).adapter("read").deltas.values()]
    assert all(float(c.detach().abs().max()) > 1e-3 for c in moved)
    rw.export(ours, tmp_path / "again", kind="peft", name="read")
    assert apart(outputs(rw.load(tiny_gpt2().to(dtype), tmp_path / "again")), outputs(ours)) < EXACT[dtype]
    wanted = outputs(ours)
    rw.merge(ours)
    assert apart(outputs(ours), wanted) < 10 * EXACT[dtype]


def test_a_bias_of_its_own_and_the_layer_s_add_up(tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["query"], bias="lora_only", lora_bias=True)
    check(tmp_path, config, build=tiny_bert_classifier, dtype=torch.float64)


def test_layers_without_a_bias_have_none(tmp_path):
    for bias in ("all", "lora_only"):
        ours = check(tmp_path / bias, LoraConfig(r=4, target_modules=TARGETS, bias=bias))
        assert all(d.c is None for d in state_of(ours).adapter("read").deltas.values())


def only_adapted_move(model):
    """Put the biases of the layers that are not adapted back, as training that happened to leave them would."""
    base = tiny_gpt2().state_dict()
    for name, parameter in model.named_parameters():
        own = name.removeprefix("base_model.model.")
        if own in base and own.endswith(".bias"):
            parameter.data.copy_(base[own])


def test_all_biases_are_read_where_only_those_of_adapted_layers_moved_and_refused_elsewhere(tmp_path):
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    theirs = made_by_peft(tmp_path / "moved", config, tiny_gpt2)
    model = tiny_gpt2()
    with pytest.raises(StoreError, match=r"biases of 11 layers that it does not adapt .*h.0.attn.c_proj.*lora_only"):
        rw.load(model, tmp_path / "moved")
    assert rw.adapters(model) == []
    only_adapted_move(theirs)
    saved_by_peft(theirs, tmp_path / "still")
    ours = rw.load(model, tmp_path / "still")
    assert apart(outputs(ours), outputs(theirs)) < EXACT[torch.float32]
    config.target_modules = r".*h\.0\.attn\.c_attn"
    made_by_peft(tmp_path / "first", config, tiny_gpt2)
    with pytest.raises(TargetError, match=r"has a bias of transformer.h.1.*, which this model does not have"):
        rw.load(tiny_gpt2(layers=1), tmp_path / "first")


def test_all_biases_beside_a_head_in_full(tmp_path):
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear", bias="lora_only")
    check(tmp_path / "lora_only", config, build=tiny_bert_classifier)
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query"], bias="all")
    theirs = made_by_peft(tmp_path / "all", config, tiny_bert_classifier)
    base = tiny_bert_classifier().state_dict()
    for name, parameter in theirs.named_parameters():
        own = name.removeprefix("base_model.model.")
        if own in base and own.endswith(".bias"):
            parameter.data.copy_(base[own])
    saved_by_peft(theirs, tmp_path / "all")
    ours = rw.load(tiny_bert_classifier(), tmp_path / "all")
    assert list(state_of(ours).adapter("default").full) == ["classifier"]
    assert apart(outputs(ours), outputs(theirs)) < EXACT[torch.float32]


def test_a_dora_with_a_trained_bias_is_refused_and_with_the_base_s_is_read(tmp_path):
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only", use_dora=True)
    theirs = made_by_peft(tmp_path / "moved", config, tiny_gpt2)
    with pytest.raises(StoreError, match=r"DoRA and was trained with the layer's bias.*bias='none'"):
        rw.load(tiny_gpt2(), tmp_path / "moved")
    base = tiny_gpt2().state_dict()
    for name, parameter in theirs.named_parameters():
        if name.endswith("base_layer.bias"):
            parameter.data.copy_(base[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    saved_by_peft(theirs, tmp_path / "still")
    assert apart(outputs(rw.load(tiny_gpt2(), tmp_path / "still")), outputs(theirs)) < EXACT[torch.float32]


def test_other_methods_with_trained_biases_are_refused(tmp_path):
    made_by_peft(tmp_path / "vera", VeraConfig(r=8, target_modules=["query"], bias="vera_only"), tiny_bert_classifier)
    with pytest.raises(StoreError, match=r"bias='vera_only', which cannot be honoured here.*Merge it in PEFT"):
        rw.load(tiny_bert_classifier(), tmp_path / "vera")
