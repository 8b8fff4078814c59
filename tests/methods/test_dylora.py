"""DyLoRA: every b is a LoRA of its own, its gradients reach what they should, and a step moves nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import (
    KINDS,
    adapted,
    backward,
    base_of,
    change_of,
    close,
    delta_of,
    layer_and_input,
    linear,
    shake,
    with_change,
)
from runs import falls, resumes_exactly, same, tiny_run, trained_by
from torch import nn

import rankworks as rw
from rankworks.core.errors import ConfigError, MergeError, TargetError
from rankworks.core.forms.lowrank import Nested
from rankworks.core.hooks import Moment, method_hooks
from rankworks.core.ranks.surgery import pair_of
from rankworks.core.store import adapter_state
from rankworks.core.summary import trained
from rankworks.linalg import truncated_svd
from rankworks.ranks.dylora import NestedDropout

R, ALPHA = 5, 3.0


def one(delta: str = "lora", **ranks: Any) -> Any:
    """A linear layer (7 -> 6) with a rank-5 adapter under DyLoRA, and its hook."""
    model = adapted(linear(7, 6), delta, rank=R, alpha=ALPHA, ranks={"ranks": "dylora", **ranks})
    return model, hook_of(model)


def hook_of(model: nn.Module) -> NestedDropout:
    (hook,) = method_hooks(model)
    assert isinstance(hook, NestedDropout)
    return hook


def step_with(hook: NestedDropout, b: int) -> int:
    """The first step at which b is drawn."""
    return next(s for s in range(1, 1000) if hook.rank_at(s) == b)


def moment(model: nn.Module, step: int, optimizer: Any = None) -> Moment:
    return Moment(model, optimizer or torch.optim.SGD(trained(model), lr=0.1), step, 10)


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_no_b_changes_the_output_at_the_start(init: str):
    model = adapted(linear(7, 6), "lora", rank=R, ranks="dylora", init=init)
    x = torch.randn(3, 7)
    for b in range(1, R + 1):
        assert torch.equal(rw.set_rank(model, b)(x), base_of(model, x))


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_rank_b_is_the_plain_lora_of_the_slices(scaling: str):
    model = adapted(linear(7, 6), "lora", rank=R, alpha=ALPHA, scaling=scaling, ranks="dylora")
    delta, x = shake(model), torch.randn(3, 7)
    for b in range(1, R + 1):
        scale = ALPHA / b if scaling == "standard" else ALPHA / b**0.5
        change = scale * delta.B[:, :b] @ delta.A[:b]
        rw.set_rank(model, b)
        close(change_of(model), change)
        close(model(x) - base_of(model, x), x @ change.t())
        plain = adapted(linear(7, 6), "lora", rank=b, alpha=ALPHA, scaling=scaling)
        with torch.no_grad():
            delta_of(plain).A.copy_(delta.A[:b])
            delta_of(plain).B.copy_(delta.B[:, :b])
        close(change_of(plain), change)
    rw.set_rank(model, None)
    whole = ALPHA / (R if scaling == "standard" else R**0.5)
    close(change_of(model), whole * delta.B @ delta.A)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_reads_the_slices(kind: str):
    layer, x = layer_and_input(kind)
    model = adapted(layer, "lora", rank=4, alpha=ALPHA, ranks="dylora")
    delta = shake(model)
    for b in (1, 3):
        rw.set_rank(model, b)
        change = ALPHA / b * delta.B[:, :b] @ delta.A[:b]
        close(change_of(model), change)
        close(model(x), with_change(layer_of(model), change)(x), 1e-11)


def layer_of(model: nn.Module) -> nn.Module:
    """The base layer, without its adapter."""
    plain = copy.deepcopy(model)
    rw.detach(plain)
    return plain.layer  # type: ignore[return-value]


def test_gates_and_biases_are_nested_too():
    model = adapted(linear(7, 6), {"delta": "gated", "inner": rw.LoRA(rank=4, alpha=ALPHA)}, ranks="dylora")
    delta, x = shake(model), torch.randn(3, 7)
    rw.set_rank(model, 2)
    inner = delta.inner
    close(change_of(model), ALPHA / 2 * (inner.B[:, :2] * delta.gate[:2]) @ inner.A[:2])
    (hook,) = method_hooks(model)
    where = moment(model, step_with(hook, 3), torch.optim.AdamW(trained(model), lr=0.1, weight_decay=0.5))  # type: ignore[arg-type]
    before = delta.gate.detach().clone()
    hook.before_forward(where)
    model(x).square().sum().backward()
    hook.after_backward(where)
    where.optimizer.step()
    hook.after_step(where)
    assert [bool(a == b) for a, b in zip(before, delta.gate.detach(), strict=True)] == [True, True, False, True]


def test_the_factors_of_the_released_code_are_alpha_over_b():
    for b in range(1, R + 1):
        assert (R / b) ** 0.5 * (R / b) ** 0.5 * ALPHA / R == pytest.approx(ALPHA / b)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_rank_b_alone_or_all_of_the_first_b(frozen: bool):
    model, hook = one(frozen=frozen)
    delta, x = shake(model), torch.randn(11, 7)
    for b in range(1, R + 1):
        hook.before_forward(moment(model, step_with(hook, b)))
        _, g = backward(model, x)
        scale = ALPHA / b
        trained_ranks = [b - 1] if frozen else list(range(b))
        for i in range(R):
            if i in trained_ranks:
                close(delta.A.grad[i], scale * delta.B[:, i] @ g)
                close(delta.B.grad[:, i], scale * g @ delta.A[i])
                assert delta.A.grad[i].abs().max() > 0
            else:
                assert not delta.A.grad[i].any()
                assert not delta.B.grad[:, i].any()


def test_the_largest_b_without_freezing_is_plain_lora():
    model, hook = one(frozen=False)
    delta = shake(model)
    hook.before_forward(moment(model, step_with(hook, R)))
    plain = adapted(nn.Linear(7, 6), "lora", rank=R, alpha=ALPHA)
    plain.layer.load_state_dict({k: v for k, v in model.layer.state_dict().items() if "adapters" not in k}, False)
    with torch.no_grad():
        delta_of(plain).A.copy_(delta.A)
        delta_of(plain).B.copy_(delta.B)
    x = torch.randn(4, 7)
    assert torch.equal(model(x), plain(x))
    for each in (model, plain):
        each(x).square().sum().backward()
    close(delta.A.grad, delta_of(plain).A.grad)
    close(delta.B.grad, delta_of(plain).B.grad)


def test_smaller_adapters_are_slices_of_larger_ones():
    model, _ = one()
    shake(model)
    found = {b: rw.set_rank(model, b) and delta_of(model).factors() for b in range(1, R + 1)}
    for b in range(1, R):
        close(found[b].A, found[R].A[:b])
        close(found[b].B * b, found[R].B[:, :b] * R)


def test_all_truncations_reach_the_best_approximation_at_once():
    """Without the factor alpha/b: minimise the mean over b of |M - B[:, :b] A[:b]|^2 on a linear target."""
    u, _, v = torch.linalg.svd(torch.randn(6, 7), full_matrices=False)
    target = (u[:, :4] * torch.tensor([4.0, 3.0, 2.0, 1.0])) @ v[:4]  # distinct singular values
    model = adapted(linear(7, 6), "lora", rank=4, ranks="dylora")
    delta = shake(model, std=0.3)
    optimizer = torch.optim.LBFGS([delta.A, delta.B], max_iter=1500, tolerance_grad=1e-12, tolerance_change=0,
                                  line_search_fn="strong_wolfe", history_size=30)  # fmt: skip

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        losses = []
        for b in range(1, 5):
            delta.nested = Nested(b, rescaled=False)
            losses.append((target - delta.dense(target) / delta.scale).square().sum())
        total = torch.stack(losses).mean()
        total.backward()
        return total

    optimizer.step(objective)
    for b in range(1, 5):
        U, s, Vh = truncated_svd(target, b)
        delta.nested = Nested(b, rescaled=False)
        close(delta.dense(target) / delta.scale, (U * s) @ Vh, 1e-5)


def test_parameters_as_printed():
    assert (
        rw.plan("roberta-base", "lora", rank=8, targets=["query", "value"], ranks="dylora").trainable_parameters
        == 294_912
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.5, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.5),
    ],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_moves_the_trained_ranks_alone(optimizer: Any, frozen: bool):
    model, hook = one(frozen=frozen)
    delta, acting = shake(model), optimizer(trained(model))
    for step in range(1, 12):
        where, b = moment(model, step, acting), hook.rank_at(step)
        before = {n: t.detach().clone() for n, t in (("A", delta.A), ("B", delta.B))}
        kept = {k: t.clone() for k, t in acting.state[delta.A].items() if t.dim()} if acting.state else {}
        hook.before_forward(where)
        acting.zero_grad()
        model(torch.randn(4, 7)).square().sum().backward()
        hook.after_backward(where)
        acting.step()
        hook.after_step(where)
        ranks = set(range(R)) - ({b - 1} if frozen else set(range(b)))
        for i in range(R):
            still = i in ranks
            assert torch.equal(delta.A[i], before["A"][i]) == still
            assert torch.equal(delta.B[:, i], before["B"][:, i]) == still
            for key, held in acting.state[delta.A].items():
                if still and held.dim():
                    assert torch.equal(held[i], kept[key][i] if key in kept else torch.zeros_like(held[i]))
        assert delta.nested is None


def test_without_strict_momentum_and_decay_move_the_others():
    model, hook = one(strict=False, highest=1)
    delta = shake(model)
    acting, where = torch.optim.AdamW(trained(model), lr=0.1, weight_decay=0.5), moment(model, 1)
    before = delta.A.detach().clone()
    hook.before_forward(where)
    model(torch.randn(4, 7)).square().sum().backward()
    hook.after_backward(where)
    acting.step()
    hook.after_step(where)
    close(delta.A[1:], before[1:] * (1 - 0.1 * 0.5))


def test_b_follows_its_law_from_the_seed_and_the_step_alone():
    _, hook = one(lowest=2, highest=4)
    drawn = [hook.rank_at(s) for s in range(1, 1201)]
    for b in (2, 3, 4):
        assert abs(drawn.count(b) / 1200 - 1 / 3) < 0.05
    assert set(drawn) == {2, 3, 4}
    torch.manual_seed(99)
    _, again = one(lowest=2, highest=4)
    assert [again.rank_at(s) for s in range(1200, 0, -1)] == drawn[::-1]
    assert [one(lowest=2, highest=4, seed=1)[1].rank_at(s) for s in range(1, 30)] != drawn[:29]
    _, geometric = one(distribution="geometric", p=0.5)
    drawn = [geometric.rank_at(s) for s in range(1, 1201)]
    for b in range(1, 6):
        assert abs(drawn.count(b) / 1200 - 0.5**b / (1 - 0.5**5)) < 0.05


def test_one_b_for_the_whole_model_and_all_micro_batches():
    seen: list[set[Any]] = []
    loop = tiny_run(rank=4, ranks="dylora", steps=6, train={"accumulate": 2, "batch_size": 4},
                    overrides={"v_proj": {"rank": 2}})  # fmt: skip
    hook = loop.hooks[0]
    layers = [m for m in loop.model.modules() if hasattr(m, "adapters")]

    def look(module: nn.Module, *_: Any) -> None:
        if not torch.is_grad_enabled():  # the loop's own look at the model, before the run
            return
        pairs = [pair_of(m.adapters["default"]["weight"]) for m in layers]  # type: ignore[index, union-attr]
        seen.append({(p.rank, p.nested) for p in pairs})

    loop.model.model.register_forward_pre_hook(look)  # type: ignore[union-attr, operator]
    loop.run()
    assert len(seen) == 12
    for i in range(6):
        b = hook.rank_at(i + 1)  # type: ignore[attr-defined]
        wanted = {(4, Nested(b, b - 1)), (2, Nested(min(b, 2), min(b - 1, 2)))}
        assert seen[2 * i] == seen[2 * i + 1] == wanted
    assert all(pair_of(m.adapters["default"]["weight"]).nested is None for m in layers)  # type: ignore[index, union-attr]


@pytest.mark.parametrize("delta", ["lora", "dora"])
@pytest.mark.parametrize("frozen", [True, False])
def test_it_learns_at_every_rank(delta: str, frozen: bool):
    loop = tiny_run(delta=delta, rank=4, alpha=8, ranks={"ranks": "dylora", "frozen": frozen}, steps=24)
    assert falls(loop.run().losses)
    assert all(rw.get_delta(loop.model, s).pair.B.abs().min() > 0 for s in ("model.layers.0.self_attn.q_proj",))


def test_a_run_goes_on_bit_for_bit(tmp_path: Path):
    def make(folder: Path, **more: Any):
        return tiny_run(folder, rank=4, ranks="dylora", steps=8, optim={"weight_decay": 0.1}, **more)

    resumes_exactly(tmp_path, make, stops=(3, 6))


@pytest.mark.parametrize("delta", ["lora", "dora"])
def test_a_chosen_rank_merges_and_exports(delta: str, tmp_path: Path):
    model = tiny_run(delta=delta, rank=4, alpha=8, ranks="dylora").model.eval()
    shake(model, std=0.05)
    x = torch.arange(3, 15).unsqueeze(0)
    rw.set_rank(model, 2)
    wanted = model(x).logits
    assert not torch.equal(wanted, rw.set_rank(model, None)(x).logits)
    rw.save(model, tmp_path / "own")  # keeps all ranks
    rw.set_rank(model, 2)
    report = rw.export(model, tmp_path / "peft", kind="peft")
    assert {s.rank for s in report.sites} == {2}
    fresh = rw.load(tiny_run(rank=4).model, tmp_path / "peft", name="cut").eval()
    torch.testing.assert_close(fresh(x).logits, wanted, atol=1e-5, rtol=1e-5)
    rw.merge(model)
    torch.testing.assert_close(model(x).logits, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(MergeError, match="unmerge"):
        rw.set_rank(model, 3)
    rw.unmerge(model)
    again = rw.load(tiny_run(rank=4).model, tmp_path / "own", name="whole").eval()
    same(adapter_state(again, "whole"), adapter_state(model))
    assert torch.equal(rw.set_rank(again, 2, "whole")(x).logits, model(x).logits)


def test_ranks_by_pattern():
    model = tiny_run(rank=4, ranks="dylora").model
    rw.set_rank(model, {"q_proj": 1, "v_proj": 9})
    state = {k: rw.get_delta(model, k).nested for k in rw.delta_weights(model)}
    assert {k.rsplit(".", 1)[-1]: n for k, n in state.items()} == {
        "q_proj": Nested(1), "v_proj": None, "up_proj": None,
    }  # fmt: skip


def test_what_is_wrong_is_refused():
    with pytest.raises(ConfigError, match=r"not ordered.*squeeze"):
        rw.set_rank(adapted(linear(), "lora", rank=2), 1)
    model, _ = one()
    for wrong in (0, 2.5, True):
        with pytest.raises(ConfigError, match="whole number"):
            rw.set_rank(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="no site matches"):
        rw.set_rank(model, {"nothing": 2})
    with pytest.raises(TargetError, match="exchange the two"):
        one(lowest=4, highest=2)
    with pytest.raises(TargetError, match=r"the rank is 5.*ranks.lowest"):
        one(lowest=6)
    with pytest.raises(TargetError, match="choose init default"):
        adapted(linear(), "lora", rank=2, ranks="dylora", init="pissa")
    for delta in ("vera", "dsee", "lora-xs"):
        with pytest.raises(TargetError, match="trained pair"):
            adapted(linear(), delta, rank=2, ranks="dylora")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path):
    one, two = (trained_by(n, "dylora", tmp_path) for n in (1, 2))
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=0)
