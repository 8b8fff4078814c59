"""The memory tables of Fira and Q-GaLore, which are GaLore's with something added or taken away.

Unit: 1.024e9 bytes. Weights are counted at their nominal size, 2 bytes a parameter, what has a rank at its exact size.
GaLore's own row of optimizer states follows from no rule that fits all four sizes, so that what is built on it is
compared with its printed totals, and our exact counts are bounds.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes

UNIT = 1.024e9
NAMES: tuple[str, ...] = ("llama-60m", "llama-130m", "llama-350m", "llama-1b")
NOMINAL: dict[str, float] = dict(zip(NAMES, (60e6, 130e6, 350e6, 1331.2e6), strict=True))
RANK: dict[str, int] = dict(zip(NAMES, (128, 256, 256, 512), strict=True))
GALORE_TOTAL: dict[str, float] = dict(zip(NAMES, (0.24, 0.52, 1.22, 4.38), strict=True))
LORA_TOTAL: dict[str, float] = dict(zip(NAMES, (0.36, 0.80, 1.76, 6.17), strict=True))


def model_of(name: str) -> nn.Module:
    return open_source(name, "bfloat16").model.requires_grad_(True)


def low_rank_size(name: str) -> int:
    """B and A of every linear layer, and embedding, head and norms, in numbers."""
    r, total = RANK[name], 0
    for key, p in model_of(name).named_parameters():
        total += r * sum(p.shape) if "proj" in key else p.numel()
    return total


def weights(name: str) -> float:
    return 2 * NOMINAL[name] / UNIT


def states(optimizer: str, name: str) -> float:
    settings: Any = {"optimizer": optimizer, "rank": RANK[name]}
    return optimizer_bytes(settings, model_of(name)) / UNIT


@pytest.mark.parametrize(("name", "printed"), zip(NAMES, (0.48, 1.01, 2.74, 10.40), strict=True))
def test_full_training_with_gradients_is_four_times_the_weights(name: str, printed: float) -> None:
    assert 4 * weights(name) == pytest.approx(printed, abs=0.012)


@pytest.mark.parametrize(("name", "printed"), zip(NAMES, (0.44, 0.99, 2.12, 7.36), strict=True))
def test_lora_with_gradients_is_its_total_and_one_low_rank_size(name: str, printed: float) -> None:
    size = 2 * low_rank_size(name) / UNIT
    assert weights(name) + size + 2 * size == pytest.approx(LORA_TOTAL[name], abs=0.012)
    assert weights(name) + size + 3 * size == pytest.approx(printed, abs=0.012)


@pytest.mark.parametrize(("name", "printed"), zip(NAMES, (0.36, 0.77, 1.90, 6.98), strict=True))
def test_fira_with_gradients_is_galores_total_and_the_weights_again(name: str, printed: float) -> None:
    """Our count is above the printed figure, the states of the linear layers alone below it."""
    assert GALORE_TOTAL[name] + weights(name) == pytest.approx(printed, abs=0.012)
    rest = 2 * 2 * sum(p.numel() for key, p in model_of(name).named_parameters() if "proj" not in key) / UNIT
    ours = states("fira", name)
    assert 2 * weights(name) + ours - rest <= printed <= 2 * weights(name) + ours


@pytest.mark.parametrize("name", NAMES)
def test_fira_keeps_what_galore_keeps_and_a_number_per_weight(name: str) -> None:
    linear = sum("proj" in key for key, _ in model_of(name).named_parameters())
    extra = (states("fira", name) - states("galore", name)) * UNIT
    assert round(extra) == 4 * linear


def test_the_states_of_7b() -> None:
    model = model_of("llama-7b")
    assert optimizer_bytes({"optimizer": "fira", "rank": 1024}, model) == 9_404_694_528 + 4 * 7 * 32
