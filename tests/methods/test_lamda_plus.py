"""LaMDA++: ranks from the pretrained spectra, with the budget kept to the integer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from facts import close, quick
from hypothesis import given
from hypothesis import strategies as st
from runs import falls, resumes_exactly, same, tiny_run
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import TargetError
from rankworks.core.forms.lowrank import scale_of
from rankworks.core.state import state_of
from rankworks.core.store import adapter_state
from rankworks.linalg.energy import leading_energy, squared_singular_values
from rankworks.ranks.lamda_plus import LaMDAPlus, by_type
from tiny import tiny_llama


class Block(nn.Module):
    """Two projections of one shape."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v_proj(torch.tanh(self.q_proj(x)))


class Stack(nn.Module):
    """Blocks whose spectra are the flatter the later they come."""

    def __init__(self, depth: int = 3, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        with torch.no_grad():
            for i, block in enumerate(self.layers):
                for layer in (block.q_proj, block.v_proj):  # type: ignore[union-attr]
                    u, _, v = torch.linalg.svd(layer.weight)
                    decay = torch.linspace(0, -6 + 2 * i, width).exp()
                    layer.weight.copy_((u * decay) @ v)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


def schedule(**settings: Any) -> LaMDAPlus:
    return LaMDAPlus(rw.LaMDAPlus(**settings))


def ranks_of(model: nn.Module) -> dict[str, int]:
    deltas = state_of(model).adapter("default").deltas
    return {k: getattr(d, "rank", None) or d.pair.rank for k, d in deltas.items()}  # type: ignore[union-attr]


def given_to(model: nn.Module, delta: str = "lora", **settings: Any) -> dict[str, int]:
    ranks = {"ranks": "lamda++", **settings.pop("ranks", {})}
    return ranks_of(rw.adapt(model, delta, targets=["q_proj", "v_proj"], rank=4, ranks=ranks, **settings))


@given(n=st.integers(1, 40), mean=st.integers(1, 16), data=st.data())
@quick
def test_ranks_are_candidates_and_sum_to_the_budget(n: int, mean: int, data: Any):
    scores = data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    for flat in (True, False):
        one = schedule(flat_gets_more=flat)
        dealt = one.spread(scores, mean)
        assert sum(dealt) == mean * n
        assert set(dealt) <= {mean - mean // 2, mean, mean + mean // 2}
        counts = [dealt.count(r) for r in one.ranks_for(mean)]
        assert counts[0] == counts[-1] == n // len(counts) or len(counts) == 1
        lowest, highest = min(dealt), max(dealt)
        if lowest < highest:
            top = [s for s, r in zip(scores, dealt, strict=True) if r == highest]
            bottom = [s for s, r in zip(scores, dealt, strict=True) if r == lowest]
            assert max(top) <= min(bottom) + 1e-11 if flat else min(top) >= max(bottom) - 1e-11


def test_flat_spectra_get_more_and_the_direction_turns():
    ranks = given_to(Stack())
    assert [ranks[f"layers.{i}.q_proj"] for i in range(3)] == [2, 4, 6]
    assert [ranks[f"layers.{i}.v_proj"] for i in range(3)] == [2, 4, 6]
    turned = given_to(Stack(), ranks={"flat_gets_more": False})
    assert [turned[f"layers.{i}.q_proj"] for i in range(3)] == [6, 4, 2]


def test_a_type_is_compared_with_itself():
    assert by_type([0.2, 0.6, 0.4, 0.8], ["q", "q", "v", "v"]) == pytest.approx([0.5, 1.5, 2 / 3, 4 / 3])
    assert by_type([0.2, 0.6], ["q", "v"]) == pytest.approx([0.5, 1.5])  # each alone in its type: one pool
    assert by_type([0.1, 0.3, 0.7], ["q", "q", "v"]) == pytest.approx([0.5, 1.5, 1.0])
    model = Stack()
    with torch.no_grad():
        for block in model.layers:  # one type much flatter than the other
            block.v_proj.weight.copy_(torch.linalg.qr(torch.randn(16, 16)).Q)  # type: ignore[union-attr]
    within = given_to(model)
    assert (within["layers.0.q_proj"], within["layers.2.q_proj"]) == (2, 6)
    rw.detach(model)
    across = given_to(model, ranks={"within": "model"})
    assert [across[f"layers.{i}.v_proj"] for i in range(3)] == [6, 6, 4]  # flatter than every q
    assert [across[f"layers.{i}.q_proj"] for i in range(3)] == [2, 2, 4]


def test_neither_scale_nor_rotation_matters():
    wanted = given_to(Stack())
    model = Stack()
    with torch.no_grad():
        for i, block in enumerate(model.layers):
            for layer in (block.q_proj, block.v_proj):  # type: ignore[union-attr]
                left, right = (torch.linalg.qr(torch.randn(16, 16)).Q for _ in range(2))
                layer.weight.copy_(10.0 ** (i - 2) * left @ layer.weight @ right)
    assert given_to(model) == wanted
    W = torch.randn(9, 14)
    left, right = torch.linalg.qr(torch.randn(9, 9)).Q, torch.linalg.qr(torch.randn(14, 14)).Q
    for r in (1, 3, 8):
        assert leading_energy(7.5 * left @ W @ right, r) == pytest.approx(leading_energy(W, r), abs=1e-13)


@given(out=st.integers(1, 12), in_=st.integers(1, 12), data=st.data())
@quick
def test_the_energy_is_one_where_the_rank_suffices_and_there_alone(out: int, in_: int, data: Any):
    true = data.draw(st.integers(1, min(out, in_)))
    W = torch.randn(out, true) @ torch.randn(true, in_)
    close(squared_singular_values(W), torch.linalg.svdvals(W).square(), 1e-12)
    for r in range(1, min(out, in_) + 1):
        e = leading_energy(W, r)
        exact = torch.linalg.svdvals(W).square()
        assert e == pytest.approx(float(exact[:r].sum() / exact.sum()), abs=1e-13)
        assert (e > 1 - 1e-13) == (r >= true) or float(exact[r:].sum() / exact.sum()) < 1e-12
    assert leading_energy(torch.zeros(out, in_), 1) == 1.0


def test_single_precision_is_summed_in_double():
    W = torch.randn(40, 30, dtype=torch.float32)
    exact = torch.linalg.svdvals(W.double()).square()
    assert leading_energy(W, 5) == pytest.approx(float(exact[:5].sum() / exact.sum()), abs=1e-14)
    assert leading_energy(W.bfloat16(), 5) == pytest.approx(leading_energy(W, 5), abs=1e-3)


def test_a_single_candidate_is_uniform_and_two_runs_agree():
    assert set(given_to(Stack(), ranks={"candidates": [4]}).values()) == {4}
    torch.manual_seed(3)
    first = Stack()
    state = {k: t.clone() for k, t in first.state_dict().items()}
    again = Stack()
    again.load_state_dict(state)
    torch.manual_seed(4)
    assert given_to(first) == given_to(again)
    assert schedule().spread([0.5] * 7, 4) == [6, 6, 4, 4, 4, 2, 2]  # equal energies go by the order of the modules
    assert schedule(candidates=[2, 6]).spread([0.1, 0.9], 4) == [6, 2]


@pytest.mark.parametrize(("delta", "numbers"), [
    ("lora", lambda r, s: r * sum(s)),
    ("dora", lambda r, s: r * sum(s) + s[0]),
    ("lamda", lambda r, s: r * r + r * s[0]),
    ("lora-xs", lambda r, s: r * r),
])  # fmt: skip
def test_every_kind_of_rank_takes_it(delta: str, numbers: Any, tmp_path: Path):
    settings: dict[str, Any] = {"delta": delta, "rank": 4, "ranks": "lamda++", "steps": 12}
    settings |= {} if delta == "lamda" else {"alpha": 8}
    loop = tiny_run(**settings, optim={"lr": 1e-2})
    ranks, model = ranks_of(loop.model), loop.model
    assert set(ranks.values()) == {2, 4, 6}
    assert sum(ranks.values()) == 4 * len(ranks)
    state = state_of(model).adapter("default")
    assert sum(p.numel() for p in state.parameters()) == sum(numbers(ranks[k], s.shape) for k, s in state.sites.items())
    if delta == "lora":
        assert {round(d.scale, 12) for d in state.deltas.values()} == {2.0}  # type: ignore[union-attr]
    assert falls(loop.run().losses)
    x = torch.arange(3, 15).unsqueeze(0)
    wanted = model.eval()(x).logits
    rw.save(model, tmp_path / "a")
    fresh = rw.load(tiny_llama(), tmp_path / "a").eval()
    same(adapter_state(fresh), adapter_state(model))
    assert ranks_of(fresh) == ranks
    assert torch.equal(fresh(x).logits, wanted)
    if delta in ("lora", "dora"):
        report = rw.export(model, tmp_path / "peft")
        assert sorted(s.rank for s in report.sites if s.rank) == sorted(ranks.values())
    rw.merge(model)
    torch.testing.assert_close(model(x).logits, wanted, atol=1e-5, rtol=1e-5)


def test_alpha_may_stay():
    model = rw.adapt(
        Stack(), "lora", targets=["q_proj"], rank=4, alpha=8, ranks={"ranks": "lamda++", "keep_scale": False}
    )
    deltas: Any = state_of(model).adapter("default").deltas
    assert {d.alpha for d in deltas.values()} == {8.0}
    rs = rw.adapt(Stack(), "lora", targets=["q_proj"], rank=4, alpha=8, scaling="rslora", ranks="lamda++")
    deltas = state_of(rs).adapter("default").deltas
    for d in deltas.values():
        assert d.scale == pytest.approx(scale_of(8, 4, "rslora"), rel=1e-15)


def test_sites_of_another_rank_have_a_budget_of_their_own():
    ranks = given_to(Stack(), overrides={"v_proj": {"rank": 2}})
    assert sorted(r for k, r in ranks.items() if "v_proj" in k) == [1, 2, 3]
    assert sorted(r for k, r in ranks.items() if "q_proj" in k) == [2, 4, 6]


def test_a_run_goes_on_bit_for_bit(tmp_path: Path):
    def make(folder: Path, **more: Any) -> Any:
        return tiny_run(folder, rank=4, ranks="lamda++", steps=6, init="pissa", **more)

    resumes_exactly(tmp_path, make, stops=(3,))


def test_what_is_wrong_is_refused():
    with pytest.raises(TargetError, match=r"mean rank, 4 here.*\[2, 4\] has another"):
        given_to(Stack(), ranks={"candidates": [2, 4]})
    with pytest.raises(TargetError, match=r"\[0, 8\] has another"):
        given_to(Stack(), ranks={"candidates": [0, 8]})
    with pytest.raises(TargetError, match=r"rank 18.*at most rank 16"):
        rw.adapt(Stack(), "lora", targets="q_proj", rank=12, ranks="lamda++")
    with pytest.raises(TargetError, match="has none"):
        rw.adapt(Stack(), "weight-compander", targets="q_proj", ranks="lamda++")
    with pytest.raises(TargetError, match="one for all sites together"):
        rw.adapt(Stack(), "s2-lora", targets="q_proj", rank=4, ranks="lamda++")
