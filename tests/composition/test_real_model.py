"""Every delta learns on a pretrained model and real text: a few steps on one passage lower its loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import DELTAS

import rankworks as rw
from rankworks.core.hooks import Moment, method_hooks
from rankworks.core.summary import trained

TEXT = (
    "The Bank of England is set to keep interest rates on hold at its meeting this week, amid signs of a slowdown in "
    "the housing market and weaker than expected sales on the high street over the Christmas period."
)
STEPS = 6
RATES = {
    "bone-bat": 1e-4,
    "ept": 1e-2,
    "lift": 1e-4,
    "locas": 1e-2,
    "loldu": 1e-2,
    "maestro": 1e-4,
    "lora-xs": 1e-2,
    "nola": 1e-2,
    "s2-lora": 1e-2,
}
RATES |= {"svfit": 1e-2, "tera": 1e-2, "vera": 1e-2, "weight-compander": 1e-4}
"""Few numbers take large steps, whole weights small ones; 1e-3 for the rest."""
TARGETS = {"linear": "model.layers.[0-3].*", "ffn": "mlp@0:4", "front": "all-linear"}
"""The first layers; a method that stands before the model has one place only, whatever is asked for."""


@pytest.fixture(scope="module")
def base() -> tuple[Any, torch.Tensor]:
    """The sample model, and one passage as tokens (1, length)."""
    model, tokenizer = rw.load_model("smollm2-135m", dtype="float32")
    return model, tokenizer(TEXT, return_tensors="pt")["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(DELTAS))
def test_a_few_steps_lower_the_loss_of_real_text(base: tuple[Any, torch.Tensor], key: str) -> None:
    model, ids = base
    with torch.no_grad():
        bare = model(input_ids=ids, labels=ids).loss.item()
    kinds = DELTAS[key].cls.kinds  # type: ignore[attr-defined]
    rw.adapt(model, key, targets=TARGETS["linear" if "linear" in kinds else kinds[0]])
    try:
        optimizer = torch.optim.AdamW(trained(model), lr=RATES.get(key, 1e-3), weight_decay=0.0)
        hooks, losses = method_hooks(model), []
        for step in range(1, STEPS + 1):
            moment = Moment(model, optimizer, step, STEPS)
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            for hook in hooks:
                hook.after_backward(moment)
            optimizer.step()
            for hook in hooks:
                hook.after_step(moment)
            losses.append(loss.item())
        if DELTAS[key].cls.unchanged_at_init:  # type: ignore[attr-defined]
            assert losses[0] == pytest.approx(bare, abs=1e-4)
        assert losses[-1] < losses[0] - 0.02, losses
    finally:
        rw.detach(model)
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == bare
