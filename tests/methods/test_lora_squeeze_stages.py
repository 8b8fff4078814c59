"""LoRA-Squeeze while training: stages that fill the run, a rank that falls at their ends, and runs that resume."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import adapted, close, delta_of, linear, quick, shake
from hypothesis import given
from hypothesis import strategies as st
from runs import falls, resumes_exactly, same, tiny_run

import rankworks as rw
from rankworks.core.errors import TargetError, TrainingError
from rankworks.core.hooks import Moment, method_hooks
from rankworks.core.store import adapter_state
from rankworks.core.summary import trained
from rankworks.ranks.lora_squeeze import Stages, stage_lengths

OUT, IN, R = 9, 11, 6


def one(delta: str = "lora", rank: int = R, alpha: float = 3.0, **settings: Any) -> Any:
    """A linear layer (11 -> 9) with a trained adapter on it."""
    model = adapted(linear(IN, OUT), delta, rank=rank, alpha=alpha, **settings)
    shake(model)
    return model


@given(
    steps=st.integers(1, 3000),
    ranks=st.lists(st.integers(1, 128), min_size=1, max_size=6, unique=True).map(lambda r: sorted(r, reverse=True)),
    weighting=st.sampled_from(["equal", "rank", "sqrt", "inverse", "inverse-sqrt"]),
    floor=st.one_of(st.none(), st.integers(1, 400)),
)
@quick
def test_stages_fill_the_run_and_respect_the_floor(steps: int, ranks: list[int], weighting: str, floor: int | None):
    least = max(1, min(200, steps // len(ranks)) if floor is None else floor)
    if steps < least * len(ranks):
        with pytest.raises(TrainingError):
            stage_lengths(steps, ranks, weighting, floor)
        return
    lengths = stage_lengths(steps, ranks, weighting, floor)
    assert sum(lengths) == steps
    assert min(lengths) >= least
    power = {"equal": 0, "rank": 1, "sqrt": 0.5, "inverse": -1, "inverse-sqrt": -0.5}[weighting]
    assert all(a >= b - 1 for a, b in pairwise(lengths)) or power <= 0


def test_stage_lengths_by_hand():
    assert stage_lengths(4000, [64, 32, 16, 8]) == [1000] * 4
    assert stage_lengths(1500, [64, 32, 16, 8], "rank", 100) == [800, 400, 200, 100]
    assert stage_lengths(1500, [64, 32, 16, 8], "inverse", 100) == [100, 200, 400, 800]
    assert stage_lengths(1500, [64, 32, 16, 8], "rank") == [733, 367, 200, 200]  # the two shortest get the floor
    assert stage_lengths(10, [4, 2, 1]) == [4, 3, 3]


def test_paths():
    path = lambda source, **settings: rw.LoRASqueeze(**settings).method.cls(rw.LoRASqueeze(**settings)).path(source)  # noqa: E731
    assert path(64) == [64, 32, 16, 8]
    assert path(64, target=8) == [64, 32, 16, 8]
    assert path(48, target=5) == [48, 24, 12, 6, 5]
    assert path(2) == [2, 1]
    assert path(1) == [1]
    assert path(16, target=4, through=[10, 6]) == [16, 10, 6, 4]
    assert path(16, target=4, through=[]) == [16, 4]


def staged(folder: Path | None = None, **more: Any) -> Any:
    settings = {"target": 2, "weighting": "equal", **more.pop("ranks", {})}
    return tiny_run(folder, rank=8, alpha=16, ranks={"ranks": "lora-squeeze", **settings}, **{"steps": 12, **more})


@pytest.mark.parametrize("delta", ["lora", "dora"])
@pytest.mark.parametrize("moments", ["reset", "rotate"])
def test_the_rank_falls_stage_by_stage_and_the_loss_with_it(delta: str, moments: str):
    loop = staged(delta=delta, steps=24, ranks={"moments": moments})
    seen: list[int] = []
    pair = rw.get_delta(loop.model, "model.layers.0.self_attn.q_proj").pair
    hook: Any = loop.hooks[0]
    inner = hook.after_step

    def noting(moment: Moment) -> None:
        seen.append(pair.rank)
        inner(moment)

    hook.after_step = noting
    assert falls(loop.run().losses)
    assert seen == [8] * 8 + [4] * 8 + [2] * 8
    assert pair.scale == pytest.approx(2.0)
    assert {p.shape for p in trained(loop.model)} >= {pair.A.shape, pair.B.shape}


def test_one_stage_and_none_at_the_target_is_squeezing_afterwards():
    staged_loop = staged(ranks={"through": [], "final": False})
    plain = tiny_run(rank=8, alpha=16)
    assert staged_loop.run().losses == plain.run().losses
    rw.squeeze(plain.model, rank=2)
    same(adapter_state(staged_loop.model), adapter_state(plain.model))


def test_the_function_goes_on_where_nothing_is_lost():
    model = one(ranks={"ranks": "lora-squeeze", "target": 3, "floor": 1})
    with torch.no_grad():
        delta_of(model).B[:, 3:] = 0
    (hook,) = method_hooks(model)
    assert isinstance(hook, Stages)
    acting = torch.optim.SGD(trained(model), lr=0.0)
    x = torch.randn(4, IN)
    wanted = model(x)
    hook.after_step(Moment(model, acting, 5, 10))
    assert delta_of(model).rank == 3
    close(model(x), wanted, 1e-13)


@pytest.mark.parametrize("moments", ["reset", "rotate"])
@pytest.mark.parametrize("settings", [{}, {"init": "pissa"}, {"delta": "dora", "overrides": {"v_proj": {"rank": 4}}}])
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, moments: str, settings: dict):
    def make(folder: Path, **more: Any) -> Any:
        return staged(folder, ranks={"moments": moments}, **settings, **more)

    model = resumes_exactly(tmp_path, make, stops=(4, 5, 10))
    assert {d.pair.rank for d in (rw.get_delta(model, k) for k in rw.delta_weights(model))} == {2}


def test_the_result_merges_saves_and_exports(tmp_path: Path):
    loop = staged(init="pissa")
    loop.run()
    model, x = loop.model.eval(), torch.arange(3, 15).unsqueeze(0)
    wanted = model(x).logits
    assert {s.rank for s in rw.export(model, tmp_path / "peft", kind="peft").sites} == {2}
    for path, name in ((rw.save(model, tmp_path / "own"), "own"), (tmp_path / "peft", "peft")):
        fresh = rw.load(tiny_run(rank=1).model, path, name=name).eval()
        torch.testing.assert_close(fresh(x).logits, wanted, atol=1e-5, rtol=1e-5)
    rw.merge(model)
    torch.testing.assert_close(model(x).logits, wanted, atol=1e-5, rtol=1e-5)


def test_what_is_wrong_is_refused():
    with pytest.raises(TargetError, match="below its target 8"):
        one(rank=4, ranks={"ranks": "lora-squeeze", "target": 8})
    with pytest.raises(TargetError, match="order them"):
        one(ranks={"ranks": "lora-squeeze", "target": 2, "through": [3, 4]})
    with pytest.raises(TargetError, match="give the target"):
        one(ranks={"ranks": "lora-squeeze", "through": [3]})
    with pytest.raises(TrainingError, match=r"12 steps, too few for 4 stages of at least 200.*ranks.floor"):
        tiny_run(rank=8, ranks={"ranks": "lora-squeeze", "target": 1, "floor": 200}).run()
