"""The traced memory of a step against what the allocator records of a real one, and the arithmetic around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.plan.measure import peak_bytes, recorded_peak
from torch import nn
from transformers import AutoConfig

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.hooks import method_hooks
from rankworks.core.hub.shapes import get_shape
from rankworks.plan import format_bytes, optimizer_bytes, parse_bytes
from rankworks.plan.make import largest_batch
from rankworks.plan.source import BUILDERS, open_source
from rankworks.plan.trace import step_inputs, trace_step
from rankworks.train.losses.objective import Objective
from tiny import tiny_convnet, tiny_llama

SMALLER: dict[str, dict[str, Any]] = {  # families at a size a test can run, and what their attention does on a CPU
    "llama-60m": {"num_hidden_layers": 4},
    "qwen3-0.6b": {"num_hidden_layers": 2, "vocab_size": 2000},
    "gemma3-270m": {"num_hidden_layers": 2, "vocab_size": 2000},
    "gpt2": {"n_layer": 2, "vocab_size": 2000, "attn_pdrop": 0.0},
    "bert-base": {"num_hidden_layers": 2, "vocab_size": 2000, "attention_probs_dropout_prob": 0.0},
    "deberta-v3-base": {"num_hidden_layers": 2, "vocab_size": 2000},
    "vit-b-16": {"num_hidden_layers": 2},
}


def real_and_planned(
    name: str,
    delta: Any,
    dtype: torch.dtype,
    checkpointing: bool,
    loss: str = "chunked",
    fused: bool = True,
    **more: Any,
) -> tuple[int, int]:
    """Return the bytes a real step takes and those the trace says."""
    shape = get_shape(name)
    config = AutoConfig.for_model(shape.kind, **(shape.settings | SMALLER[name] | more))
    model = rw.adapt(BUILDERS[shape.task].from_config(config, dtype=dtype), delta)
    inputs: Any = {"input_ids": torch.randint(3, 1000, (2, 96))}
    if shape.kind == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 224, 224, dtype=dtype)}
    real = peak_bytes(model, inputs, loss, checkpointing)
    source = open_source(model)
    rw.adapt(source.model, delta)
    given = step_inputs(source.model, 2, 96)
    assert given is not None
    return real, trace_step(source.model, given, loss, checkpointing, fused).peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", list(SMALLER))
def test_the_trace_agrees_with_the_allocator(name: str, checkpointing: bool) -> None:
    real, planned = real_and_planned(name, "lora", torch.float32, checkpointing)
    assert planned == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("delta", [rw.DoRA(), rw.VeRA(), rw.SHiRA(), rw.Bone(), rw.BoneBat(rank=32), rw.LoRAXS()])
def test_the_trace_agrees_with_the_allocator_for_every_form_of_change(delta: Any) -> None:
    real, planned = real_and_planned("llama-60m", delta, torch.float32, False)
    assert planned == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("loss", ["chunked", "full"])
def test_the_trace_agrees_with_the_allocator_in_bfloat16(loss: str) -> None:
    real, planned = real_and_planned("llama-60m", "lora", torch.bfloat16, False, loss)
    assert planned == pytest.approx(real, rel=0.02)


def test_a_model_that_teaches_itself_takes_two_passes_of_each() -> None:
    """Against the training loop's own loss; without a cut the second is as wide as the first."""
    ranks = {"ranks": "maestro", "sampler": "none", "full_pass": True}
    shape = get_shape("llama-60m")
    config = AutoConfig.for_model(shape.kind, **(shape.settings | SMALLER["llama-60m"]))
    model = rw.adapt(BUILDERS[shape.task].from_config(config), "lora", rank=8, ranks=ranks)
    model.train()
    (hook,), objective = method_hooks(model), Objective(model)
    ids = torch.randint(3, 1000, (2, 96))
    real = recorded_peak(model, lambda: objective({"input_ids": ids}, ids, None, hook.teacher).backward())
    source = open_source(model)
    rw.adapt(source.model, "lora", rank=8, ranks=ranks)
    given = step_inputs(source.model, 2, 96)
    assert given is not None
    planned = trace_step(source.model, given)
    assert planned.peak == pytest.approx(real, rel=0.02)
    rw.detach(source.model)
    rw.adapt(source.model, "lora", rank=8)
    alone = trace_step(source.model, given)
    assert 2 * alone.flops < planned.flops < 2.5 * alone.flops  # the teacher's head is asked again, in chunks
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        rw.plan("llama-60m", "lora", rank=8, ranks=ranks, gradient_checkpointing=True)


def test_attention_that_keeps_its_scores_is_planned_as_plain() -> None:
    dropped = {"attn_pdrop": 0.1}  # on a CPU there is no fused kernel with dropout
    real, plain = real_and_planned("gpt2", "lora", torch.float32, False, fused=False, **dropped)
    assert plain == pytest.approx(real, rel=0.02)
    _, fused = real_and_planned("gpt2", "lora", torch.float32, False, fused=True, **dropped)
    assert fused < plain


def test_adam_keeps_eight_bytes_a_number_and_the_parts_bound_the_peak() -> None:
    told = rw.plan("smollm2-135m", "lora", rank=16, sequence=64)
    assert told.optimizer_bytes == 8 * told.trainable_parameters
    assert told.gradient_bytes == told.adapter_bytes == 4 * told.trainable_parameters
    assert told.weight_bytes >= 2 * told.base_parameters
    parts = told.weight_bytes + told.adapter_bytes + told.optimizer_bytes
    assert parts + told.activation_bytes <= told.peak_bytes <= parts + told.activation_bytes + told.gradient_bytes


def test_what_adam_really_keeps_is_what_the_formula_says() -> None:
    model = rw.adapt(tiny_llama(), "lora", rank=4)
    trained = [p for p in model.parameters() if p.requires_grad]
    for name, optimizer in (
        ("adamw", torch.optim.AdamW(trained)),
        ({"optimizer": "sgd", "momentum": 0.9}, torch.optim.SGD(trained, lr=0.1, momentum=0.9)),
        ("sgd", torch.optim.SGD(trained, lr=0.1)),
    ):
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        kept = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
        assert sum(t.nbytes for t in kept) == optimizer_bytes(name, model)


def test_eight_bit_states_and_formulas_of_others() -> None:
    layer = torch.nn.Linear(128, 64, device="meta")
    assert optimizer_bytes("adamw8bit", layer) == 2 * 8192 + 8 * 32 + 8 * 64
    assert optimizer_bytes({"optimizer": "sgd", "momentum": 0.9}, layer) == 4 * (8192 + 64)
    with pytest.raises(ConfigError, match=r"adamv.*adamw"):
        rw.plan("gpt2", optimizer="adamv")


def test_four_bit_weights_are_counted_packed_and_one_is_unpacked_at_a_time() -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    full, packed, bytes_ = (rw.plan(config, dtype=dtype, sequence=8) for dtype in ("bfloat16", "nf4", "int8"))
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert full.weight_bytes - packed.weight_bytes == 2 * linear - (linear // 2 + 4 * linear // 64)
    rows = 2 * (4 * 64 + 2 * 128 + 64)
    assert full.weight_bytes - bytes_.weight_bytes == 2 * linear - (linear + 4 * rows)
    moving = full.peak_bytes - full.weight_bytes
    assert packed.peak_bytes - packed.weight_bytes == moving + 2 * 64 * 128
    assert packed.trainable_parameters == full.trainable_parameters


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    config = AutoConfig.for_model("llama", **(get_shape("llama-60m").settings | {"num_hidden_layers": 2}))
    step: dict[str, Any] = {"sequence": 64, "gradient_checkpointing": True}
    told = rw.plan(config, "lora", fits="1GB", **step).fit
    assert told is not None
    assert told.fits
    assert rw.plan(config, batch_size=told.largest_batch, **step).peak_bytes <= 10**9
    too_large = rw.plan(config, batch_size=told.largest_batch + 1, fits="1GB", **step)
    assert too_large.peak_bytes > 10**9
    assert too_large.fit is not None
    assert not too_large.fit.fits
    assert too_large.fit.largest_batch == told.largest_batch


def test_a_model_that_is_larger_than_the_memory() -> None:
    none = rw.plan("llama-2-7b", "lora", fits="8GB").fit
    assert none is not None
    assert not none.fits
    assert none.largest_batch == 0
    assert "not even a batch of 1" in str(none)


@pytest.mark.parametrize(
    ("takes", "free", "most"),
    [
        (lambda b: 10 * b, 99, 9),
        (lambda b: 10 * b, 9, 0),
        (lambda b: 100, 100, 1 << 16),
        (lambda b: 10 + max(0, b - 50), 100, 140),
        (lambda b: b * b, 10_000, 100),
        (lambda b: int(1000 * b**0.5), 31_000, 961),
    ],
)
def test_the_search_for_the_largest_batch(takes: Any, free: int, most: int) -> None:
    assert largest_batch(takes, free) == most


def test_operations_are_counted() -> None:
    layer = nn.Sequential(nn.Linear(64, 32, bias=False))
    told = rw.plan(layer, "lora", rank=4, targets="0", example=torch.empty(1, 64), batch_size=8)
    base, down, up = 2 * 8 * 64 * 32, 2 * 8 * 64 * 4, 2 * 8 * 4 * 32
    assert told.step_flops == base + down + up + (down + 2 * up)  # no input gradient: none is asked for


@pytest.mark.parametrize(("line_search", "evaluations"), [(0, 8), (4, 13)])
def test_a_step_of_evaluations_has_no_gradients(line_search: int, evaluations: int) -> None:
    layer = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 64, bias=False))
    how: dict[str, Any] = {"rank": 4, "targets": "0", "example": torch.empty(1, 64), "batch_size": 8}
    optimizer = {"optimizer": "zo-ranksgd", "candidates": 8, "line_search": line_search}
    told = rw.plan(layer, "lora", optimizer=optimizer, **how)
    one = 2 * 8 * (64 * 32 + 32 * 64 + 64 * 4 + 4 * 32)
    assert told.step_flops == evaluations * one
    assert told.gradient_bytes == 0
    factors, weights = 4 * 4 * (64 + 32), 4 * 2 * 64 * 32
    assert told.optimizer_bytes == (factors if line_search else 0)
    outside = told.peak_bytes - told.optimizer_bytes - weights - told.activation_bytes
    assert outside == 2 * factors, "the factors, and the copy they are put back from"
    assert f"{evaluations} evaluations" in told.notes[0]
    assert told.activation_bytes < rw.plan(layer, "lora", **how).activation_bytes
    whole = rw.plan(layer, "none", optimizer=optimizer, example=how["example"], batch_size=8)
    assert (whole.gradient_bytes, whole.step_flops) == (0, evaluations * 2 * 8 * (64 * 32 + 32 * 64))
    assert all(p.requires_grad for p in layer.parameters())


def test_a_model_that_does_not_say_what_it_takes() -> None:
    told = rw.plan(tiny_convnet(), "lora", rank=1, targets="stem", fits="1GB")
    assert told.activation_bytes == 0
    assert told.fit is None
    assert "example=" in told.notes[0]
    with pytest.raises(ConfigError, match="example must be a tensor"):
        rw.plan(tiny_convnet(), "lora", rank=1, targets="stem", example=[1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GB", 24 * 10**9), ("80 GiB", 80 * 2**30), ("512mb", 512 * 10**6), ("1.5k", 1500), (7, 7), ("12", 12)],
)
def test_amounts_of_memory(text: Any, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["24GBs", "GB", "-1GB", "lots", "0GB", True])
def test_amounts_of_memory_that_are_none(text: Any) -> None:
    with pytest.raises(ConfigError, match="not an amount of memory"):
        rw.plan("gpt2", fits=text)


def test_bytes_as_people_read_them() -> None:
    assert [format_bytes(n) for n in (0, 999, 1500, 12_345_678, 24 * 10**9)] == [
        "0 B",
        "999 B",
        "1.50 kB",
        "12.3 MB",
        "24.0 GB",
    ]
