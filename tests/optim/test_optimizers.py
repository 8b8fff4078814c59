"""How optimizers are made and told what to do; the promises that each keeps are the conformance suite's."""

from __future__ import annotations

import pytest

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.registry import build, get
from tiny import tiny_llama


def test_a_spec_a_mapping_and_a_key_are_one() -> None:
    model = rw.adapt(tiny_llama(), "dora", rank=4)
    for form in ("galore", build("optimizer", "galore"), {"optimizer": "galore"}):
        assert type(rw.make_optimizer(model, form)).__name__ == "GaLoreSteps"
    assert get("optimizer", "galore").axis == "optimizer"


def test_no_rank_is_no_subspace() -> None:
    with pytest.raises(ConfigError, match="rank 1 or more"):
        rw.make_optimizer(tiny_llama(), "galore", rank=0)
