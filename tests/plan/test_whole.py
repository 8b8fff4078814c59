"""Plans without an adapter: every weight is trained, by optimizers that keep less, rest in turns, or free gradients."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from tests.plan.measure import recorded_peak
from transformers import AutoConfig

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.hub.shapes import get_shape
from rankworks.plan import optimizer_bytes
from rankworks.plan.source import BUILDERS, open_source
from rankworks.plan.trace import _loss, step_inputs, trace_step
from tiny import tiny_llama


def test_every_weight_is_counted_once() -> None:
    told = rw.plan("llama-60m", "none", sequence=64)
    assert told.trainable_parameters == told.base_parameters == 58_073_600
    assert told.percent == 100
    assert told.gradient_bytes == 2 * 58_073_600
    assert told.optimizer_bytes == 2 * told.gradient_bytes
    assert (told.sites, told.adapter_bytes, told.frozen_bytes) == (0, 0, 0)
    assert told.peak_bytes > told.weight_bytes + told.optimizer_bytes + told.gradient_bytes
    assert "every weight" in str(told)
    assert "adapter" not in str(told)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama()
    model.get_parameter("model.norm.weight").requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    told = rw.plan(model, "none", sequence=16)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert told.trainable_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("layerwise", [False, True])
def test_the_trace_agrees_with_the_allocator(layerwise: bool) -> None:
    shape = get_shape("llama-60m")
    config = AutoConfig.for_model(shape.kind, **(shape.settings | {"num_hidden_layers": 4}))
    model: Any = BUILDERS[shape.task].from_config(config, dtype=torch.float32)
    inputs = {"input_ids": torch.randint(3, 1000, (2, 96))}

    def free(parameter: torch.Tensor) -> None:
        parameter.grad = None

    if layerwise:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(free)
    real = recorded_peak(model, lambda: _loss(model, inputs, "chunked").backward())
    source = open_source(model)
    given = step_inputs(source.model, 2, 96)
    assert given is not None
    planned = trace_step(source.model, given, layerwise=layerwise).peak
    assert planned == pytest.approx(real, rel=0.03)
    gc.collect()


def test_layerwise_holds_one_gradient_at_a_time() -> None:
    whole, one = (rw.plan("llama-60m", "none", sequence=64, layerwise=yes) for yes in (False, True))
    assert one.gradient_bytes == 2 * 32_000 * 512  # of the embedding, or of the head
    assert one.peak_bytes < whole.peak_bytes
    assert one.optimizer_bytes == whole.optimizer_bytes
    with pytest.raises(ConfigError, match="lora-pro steps on several gradients together"):
        rw.plan("llama-60m", "lora", optimizer="lora-pro", layerwise=True)


def test_blocks_that_rest_have_no_gradient() -> None:
    layer = (4 * 512 * 512 + 3 * 512 * 1376 + 2 * 512) * 2
    every, few = (
        rw.plan("llama-60m", "none", sequence=64, optimizer={"optimizer": "lisa", "blocks": n}) for n in (8, 2)
    )
    assert every.gradient_bytes == 2 * 58_073_600
    assert few.gradient_bytes == every.gradient_bytes - 6 * layer
    assert few.activation_bytes < every.activation_bytes


def test_integer_weights_are_counted_as_they_are_held() -> None:
    plain, integer = (rw.plan("llama-60m", "none", sequence=64, optimizer=name) for name in ("galore", "q-galore"))
    linear = 25_296_896
    assert plain.weight_bytes - integer.weight_bytes == linear - 5 * linear // 256  # a byte each, and 5 a group


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="int8 weights cannot be trained as they are"):
        rw.plan("llama-60m", "none", dtype="int8")
    with pytest.raises(ConfigError, match="rank: settings of an adapter, and delta none has no adapter"):
        rw.plan("llama-60m", "none", rank=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "gigabytes"),
    [({"optimizer": "galore", "rule": "adamw8bit", "rank": 1024}, 24), ({"optimizer": "q-galore", "rank": 1024}, 16)],
)
def test_the_papers_7b_fits_where_they_say(optimizer: dict[str, Any], gigabytes: int) -> None:
    """GaLore in 8 bits and layer by layer within 24 GB, Q-GaLore within 16 GB; AdamW needs 67."""
    told = rw.plan("llama-7b", "none", optimizer=optimizer, layerwise=True, sequence=256, fits=f"{gigabytes}GB")
    assert told.fit is not None
    assert told.fit.fits
    parts = told.weight_bytes + told.optimizer_bytes
    assert parts < told.peak_bytes < gigabytes * 10**9
    assert told.optimizer_bytes == optimizer_bytes(optimizer, open_source("llama-7b").model.requires_grad_(True))
