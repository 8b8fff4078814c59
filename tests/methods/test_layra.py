"""LayRA: the first and the last layers, and the model arithmetic."""

from __future__ import annotations

import pytest
import torch
from facts import EXACT
from learning import losses, tiny_adapted
from transformers import T5Config, T5ForConditionalGeneration

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.select import layer_of
from rankworks.select.layra import default_counts, model_arithmetic
from tiny import seeded, tiny_llama, tiny_mlp, token_batch


def layers_of(model: torch.nn.Module) -> list[str]:
    """The names of the layers that carry a change, each once."""
    names = (layer_of(row.site) for row in rw.summary(model).rows)
    return list(dict.fromkeys(layer.name for layer in names if layer))


@pytest.mark.parametrize(("first", "last", "layers"), [(2, 1, [0, 1, 5]), (0, 1, [5]), (1, 0, [0]), (3, 3, range(6))])
def test_exactly_the_first_and_the_last_layers_carry_a_change(first: int, last: int, layers: list[int]):
    select = {"select": "layra", "first": first, "last": last}
    model = rw.adapt(tiny_llama(layers=6), "lora", rank=2, select=select)
    assert layers_of(model) == [f"model.layers.{i}" for i in layers]
    assert len(rw.summary(model).rows) == 7 * len(layers)


@pytest.mark.parametrize(
    ("depth", "counts"),
    [(1, (0, 1)), (2, (1, 1)), (6, (2, 1)), (12, (4, 1)), (23, (7, 1)), (24, (10, 2)), (32, (10, 2))],
)
def test_the_counts_are_the_paper_s_from_24_layers_and_scaled_below(depth: int, counts: tuple[int, int]):
    assert default_counts(depth) == counts


def test_overlapping_counts_are_plain_lora_without_duplicates():
    select = {"select": "layra", "first": 4, "last": 9}
    chosen, plain = (rw.adapt(tiny_llama(layers=6), "lora", rank=2, select=s) for s in (select, None))
    assert [row.site for row in rw.summary(chosen).rows] == [row.site for row in rw.summary(plain).rows]
    assert rw.trainable_parameters(chosen) == rw.trainable_parameters(plain)


@pytest.mark.parametrize(
    ("shape", "per_layer", "chosen", "whole"),
    [("llama-3.1-8b", 655_360, 7_864_320, 20_971_520), ("qwen2.5-7b", 720_896, 8_650_752, 20_185_088)],
)
def test_printed_counts(shape: str, per_layer: int, chosen: int, whole: int):
    settings = {"rank": 8, "alpha": 16, "targets": "all-linear"}
    assert rw.plan(shape, "lora", **settings).trainable_parameters == whole
    assert rw.plan(shape, "lora", select="layra", **settings).trainable_parameters == chosen == 12 * per_layer


def test_what_enters_the_middle_changes_through_the_early_layers_alone():
    torch.set_default_dtype(torch.float32)
    model = rw.adapt(tiny_llama(layers=6), "lora", rank=2, select={"select": "layra", "first": 2, "last": 1})
    ids = token_batch()
    for row in rw.summary(model).rows:
        with torch.no_grad():
            rw.get_delta(model, row.site).B.normal_()  # type: ignore[union-attr,operator]

    def entering() -> torch.Tensor:
        with torch.no_grad():
            return model(ids, output_hidden_states=True).hidden_states[2]

    changed, late = entering(), []
    for row in rw.summary(model).rows:
        delta = rw.get_delta(model, row.site)
        if layer_of(row.site).number == 5:  # type: ignore[union-attr]
            late.append(row.site)
            with torch.no_grad():
                delta.B.zero_()  # type: ignore[union-attr,operator]
    assert late
    assert torch.equal(entering(), changed)
    with rw.disabled(model):
        assert not torch.equal(entering(), changed)


def test_the_weights_of_the_model_are_bit_identical_after_training():
    model = tiny_adapted("lora", rank=2, select={"select": "layra", "first": 1, "last": 0})
    before = {name: p.clone() for name, p in model.named_parameters() if "adapters" not in name}
    seen = losses(model)
    assert seen[-1] < 0.9 * seen[0]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)
    assert not any("layers.1." in name for name, _ in model.named_parameters() if "adapters" in name)


def tiny_t5(encoder: int = 4, decoder: int = 3) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=encoder, num_decoder_layers=decoder, num_heads=4
    )
    return seeded(lambda: T5ForConditionalGeneration(config), 0)


def test_the_stacks_of_an_encoder_decoder_are_counted_separately():
    model = rw.adapt(tiny_t5(), "lora", rank=2, targets=["q"], select={"select": "layra", "first": 1, "last": 1})
    assert layers_of(model) == ["encoder.block.0", "encoder.block.3", "decoder.block.0", "decoder.block.2"]
    select = {"select": "layra", "first": {"encoder": 2, "decoder": 0}, "last": {"decoder.block": 1, "encoder": 0}}
    model = rw.adapt(tiny_t5(), "lora", rank=2, targets=["q"], select=select)
    assert layers_of(model) == ["encoder.block.0", "encoder.block.1", "decoder.block.2"]
    with pytest.raises(ConfigError, match=r"no stack of layers is called 'encodr'.*encoder"):
        rw.adapt(tiny_t5(), "lora", targets=["q"], select={"select": "layra", "first": {"encodr": 2}})


def test_bad_settings_are_refused_with_the_remedy():
    with pytest.raises(ConfigError, match="first"):
        rw.adapt(tiny_llama(), "lora", select={"select": "layra", "first": -1})
    with pytest.raises(ConfigError, match="none of the targeted sites lies in a layer"):
        rw.adapt(tiny_mlp(), "lora", select="layra")
    with pytest.raises(ConfigError, match="leaves no site to adapt"):
        rw.adapt(tiny_llama(), "lora", select={"select": "layra", "first": 0, "last": 0})


# ---- model arithmetic ----------------------------------------------------------------------------------------------


def three() -> list[dict[str, torch.Tensor]]:
    states = [tiny_mlp(seed=seed).double().state_dict() for seed in range(3)]
    return [{**state, "steps": torch.tensor(3)} for state in states]


def test_the_arithmetic_is_linear_in_lambda_and_the_adapted_model_at_zero():
    adapted, base, instruct = three()
    at = {strength: model_arithmetic(adapted, base, instruct, strength) for strength in (0.0, 0.3, 0.7, 1.0)}
    for name, tensor in adapted.items():
        assert torch.equal(at[0.0][name], tensor)
        if tensor.is_floating_point():
            torch.testing.assert_close(at[0.3][name] + at[0.7][name], tensor + at[1.0][name], rtol=0, atol=EXACT)
            torch.testing.assert_close(at[1.0][name], tensor + instruct[name] - base[name], rtol=0, atol=EXACT)
    assert at[1.0]["steps"] == 3


def test_a_merged_adapter_and_the_arithmetic_add_up():
    model = rw.adapt(tiny_mlp().double(), "lora", rank=2, targets="second")
    delta = rw.get_delta(model, "second")
    with torch.no_grad():
        delta.B.normal_()  # type: ignore[union-attr,operator]
    change = rw.delta_weights(model)["second"]
    rw.merge(model)
    base, instruct = tiny_mlp().double().state_dict(), tiny_mlp(seed=1).double().state_dict()
    adapted = {name: tensor for name, tensor in model.state_dict().items() if name in base}
    moved = model_arithmetic(adapted, base, instruct, 0.5)["second.weight"]
    expected = 0.5 * (base["second.weight"] + instruct["second.weight"]) + change
    torch.testing.assert_close(moved, expected, rtol=0, atol=EXACT)


def test_a_16_bit_model_is_summed_wide_and_other_models_are_refused():
    adapted, base, instruct = ({"w": torch.tensor([v], dtype=torch.bfloat16)} for v in (1.0, 256.0, 257.0))
    assert model_arithmetic(adapted, base, instruct, 1.0)["w"] == 1.0 + float(instruct["w"] - base["w"])
    with pytest.raises(ConfigError, match=r"base model do not have the same tensors \(w differ\)"):
        model_arithmetic(adapted, {}, instruct, 1.0)
    with pytest.raises(ConfigError, match="instruct model"):
        model_arithmetic(adapted, base, {"w": torch.zeros(2)}, 1.0)
