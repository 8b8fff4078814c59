"""Maestro: two factors in place of the weight, ordered by a sampler and a lasso, and cut where they have emptied."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import (
    KINDS,
    One,
    adapted,
    base_of,
    best_of_rank,
    change_of,
    close,
    delta_of,
    layer_and_input,
    linear,
    quick,
    shake,
    weight_of,
)
from hypothesis import given
from hypothesis import strategies as st
from runs import falls, resumes_exactly, same, tiny_run, trained_by
from torch import Tensor, nn
from transformers import TrainerState

import rankworks as rw
from rankworks.compress import factorised
from rankworks.core.errors import ConfigError, TargetError
from rankworks.core.hooks import Moment, method_hooks
from rankworks.core.lowrank import Nested
from rankworks.core.store import adapter_state
from rankworks.core.summary import trained
from rankworks.ranks.maestro import OrderedDropout, Pairs, group_norms, importance
from rankworks.train.hooks import HookCallback
from tiny import tiny_convnet, tiny_llama

OUT, IN = 6, 9


def one(kind: str = "linear", delta: str = "maestro", **ranks: Any) -> Any:
    """A layer with Maestro's factors and schedule, its hook, and an input."""
    layer, x = layer_and_input(kind) if kind != "plain" else (linear(IN, OUT), torch.randn(5, IN))
    settings = {} if delta == "maestro" else {"rank": 4}
    model = adapted(layer, delta, ranks={"ranks": "maestro", **ranks}, **settings)
    (hook,) = method_hooks(model)
    assert isinstance(hook, OrderedDropout)
    return model, hook, x


def moment(model: nn.Module, step: int = 1, steps: int = 10, **more: Any) -> Moment:
    return Moment(model, torch.optim.SGD(trained(model), lr=0.1), step, steps, **more)


# ---- the layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_factored_layer_starts_as_the_dense_one(kind: str, bias: bool):
    if bias and kind == "embedding":
        with pytest.raises(TargetError, match="has no bias"):
            adapted(layer_and_input(kind)[0], "maestro", bias=True)
        return
    layer, x = layer_and_input(kind)
    model = adapted(layer, "maestro", bias=bias)
    close(model(x), base_of(model, x), 1e-12)
    delta, W = delta_of(model), weight_of(model)
    assert delta.rank == min(W.shape)
    close(delta.B @ delta.A, W, 1e-12)
    s = torch.linalg.svdvals(W)
    close(delta.A @ delta.A.t(), torch.diag(s), 1e-12)  # balanced
    close(delta.B.t() @ delta.B, torch.diag(s), 1e-12)
    if bias:
        with torch.no_grad():
            delta.c.fill_(0.5)
        close(model(x), base_of(model, x) + 0.5, 1e-12)


def test_a_smaller_rank_starts_from_the_best_approximation():
    model = adapted(linear(IN, OUT), "maestro", rank=3)
    W = weight_of(model)
    close(W + change_of(model), best_of_rank(W, 3), 1e-12)
    assert sum(p.numel() for p in trained(model)) == 3 * (IN + OUT)


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_is_the_sliced_product_unscaled(kind: str):
    model, _, x = one(kind)
    delta = shake(model)
    W = weight_of(model)
    for b in range(1, delta.rank + 1):
        rw.set_rank(model, b)
        assert len(delta.acting()[1]) == b
        close(W + change_of(model), delta.B[:, :b] @ delta.A[:b])
        truncated = model(x)
        rw.merge(model)
        close(model(x), truncated, 1e-11)
        rw.unmerge(model)
    rw.set_rank(model, None)
    close(W + change_of(model), delta.B @ delta.A)


def test_a_convolution_is_two_convolutions():
    layer, x = layer_and_input("conv2d")
    model = adapted(layer, "maestro")
    delta = shake(model)
    first = torch.nn.functional.conv2d(
        x, delta.A.reshape(-1, *layer.weight.shape[1:]), None, layer.stride, layer.padding, layer.dilation
    )
    close(model(x), torch.nn.functional.conv2d(first, delta.B[:, :, None, None], layer.bias), 1e-12)


def test_the_frozen_product_is_never_made():
    layer = linear(IN, OUT)
    model = adapted(layer, "maestro", rank=2)
    x = torch.randn(5, IN)
    wanted = model(x)
    with torch.no_grad():
        layer.weight.fill_(float("nan"))
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_zero_gives_the_bias_alone(kind: str, tmp_path: Path):
    model, hook, x = one(kind, threshold=1e9)
    y = base_of(model, x)
    hook.on_end(moment(model))
    assert (delta_of(model).rank, delta_of(model).spec.rank) == (0, 0)
    bias = model.layer.bias if kind != "embedding" else None
    wanted = torch.zeros_like(y)
    if bias is not None:
        wanted = wanted + (bias[:, None, None] if kind == "conv2d" else bias)
    close(model(x) + 1, wanted + 1, 1e-14)
    rw.merge(model)
    close(model(x) + 1, wanted + 1, 1e-12)
    rw.unmerge(model)
    rw.save(model, tmp_path / "a")
    rw.detach(model)
    close(rw.load(model, tmp_path / "a")(x) + 1, wanted + 1, 1e-14)
    assert hook.pairs.take() == {}
    assert hook.penalty(moment(model)) is None


# ---- the lasso and the importance -----------------------------------------------------------------------------------


@given(r=st.integers(1, 8), zeros=st.integers(0, 8))
@quick
def test_tail_norms_are_those_of_the_tails(r: int, zeros: int):
    B, A = torch.randn(5, r), torch.randn(r, 7)
    if zeros < r:
        B[:, zeros:] = 0
    first, second = group_norms(B, A)
    for b in range(r):
        close(first[b : b + 1] + 1, B[:, b:].norm()[None] + 1, 1e-11)
        close(second[b : b + 1], A[b:].norm()[None], 1e-12)
    kept = importance(B, A)
    assert (kept[1:] <= kept[:-1]).all()
    single, _ = group_norms(B, A, tails=False)
    close(single + 1, B.norm(dim=0) + 1, 1e-11)


@pytest.mark.parametrize("hierarchical", [True, False])
def test_the_penalty_and_its_gradient(hierarchical: bool):
    model, hook, _ = one("plain", penalty=0.3, hierarchical=hierarchical)
    delta = shake(model)
    r = delta.rank
    tails = [slice(b, None) if hierarchical else slice(b, b + 1) for b in range(r)]
    wanted = 0.3 * sum(delta.B[:, t].norm() + delta.A[t].norm() for t in tails)
    found = hook.penalty(moment(model))
    close(found[None], wanted[None], 1e-12)
    mine, theirs = (torch.autograd.grad(value, [delta.A, delta.B]) for value in (found, wanted))
    for a, b in zip(mine, theirs, strict=True):
        close(a, b, 1e-11)


def test_an_empty_tail_has_a_gradient_of_zero():
    model, hook, _ = one("plain", penalty=1.0)
    delta = delta_of(model)
    with torch.no_grad():
        delta.B[:, 2:] = 0
        delta.A[4:] = 0
    hook.penalty(moment(model)).backward()
    assert delta.A.grad.isfinite().all()
    assert delta.B.grad.isfinite().all()
    assert not delta.B.grad[:, 2:].any()
    assert not delta.A.grad[4:].any()
    fresh, hook, _ = one("plain", delta="lora", penalty=1.0)  # B = 0 as a whole
    hook.penalty(moment(fresh)).backward()
    assert not delta_of(fresh).B.grad.any()


# ---- the sampler ---------------------------------------------------------------------------------------------------


@given(ranks=st.lists(st.integers(0, 6), min_size=1, max_size=5))
@quick
def test_every_pair_comes_once_before_any_comes_again(ranks: list[int]):
    pairs, total = Pairs(3, ranks), sum(ranks)
    wanted = {(layer, b) for layer, r in enumerate(ranks) for b in range(1, r + 1)}
    orders = []
    for _ in range(3):
        drawn = [next(iter(pairs.take().items())) for _ in range(total)]
        assert set(drawn) == wanted
        assert len(drawn) == len(wanted)
        orders.append(drawn)
    if total > 6:
        assert orders[0] != orders[1]
    again = Pairs(3, ranks)
    state = pairs.state_dict()
    again.load_state_dict(state)
    assert [again.take() for _ in range(total)] == [pairs.take() for _ in range(total)]


def test_one_layer_is_cut_in_a_step_and_micro_batches_agree():
    loop = tiny_run(delta="maestro", ranks="maestro", steps=8, train={"accumulate": 2, "batch_size": 4},
                    targets=["q_proj", "v_proj"])  # fmt: skip
    hook: Any = loop.hooks[0]
    seen = []

    def look(*_: Any) -> None:
        if torch.is_grad_enabled():  # not the loop's own look at the model, before the run
            seen.append([(i, p.nested.width) for i, p in enumerate(hook.layers) if p.nested is not None])

    loop.model.model.register_forward_pre_hook(look)  # type: ignore[union-attr, operator]
    loop.run()
    assert len(seen) == 16
    pairs = Pairs(0, [p.shape.out if p.shape.out < 32 else 32 for p in hook.layers])
    for i in range(8):
        ((layer, b),) = pairs.take().items()
        cut = [] if b == hook.layers[layer].rank else [(layer, b)]
        assert [c for c in seen[2 * i] if c[1] < 32] == [c for c in cut if c[1] < 32]
        assert seen[2 * i] == seen[2 * i + 1]
    assert all(p.nested is None for p in hook.layers)


def test_independent_draws_and_none():
    loop = tiny_run(delta="maestro", ranks={"ranks": "maestro", "sampler": "all"}, targets=["q_proj", "v_proj"])
    hook: Any = loop.hooks[0]
    drawn = [hook._draw(s) for s in range(1, 400)]
    assert all(set(d) == set(range(4)) for d in drawn)
    counts = Counter(d[0] for d in drawn)
    assert set(counts) == set(range(1, 33))
    assert hook._draw(7) == drawn[6]
    hook = tiny_run(delta="maestro", ranks={"ranks": "maestro", "sampler": "none"}).hooks[0]
    assert hook._draw(1) == {}


def test_without_penalty_and_sampler_it_is_factorised_training():
    settings = {"ranks": "maestro", "sampler": "none", "penalty": 0.0, "threshold": 0.0}
    scheduled, plain = tiny_run(delta="maestro", ranks=settings), tiny_run(delta="maestro")
    assert scheduled.run().losses == plain.run().losses
    same(adapter_state(scheduled.model), adapter_state(plain.model))


# ---- what it finds -------------------------------------------------------------------------------------------------


def fitted(target: Tensor, objective: Any) -> Any:
    """Minimise the mean over b of an objective of the truncated weight, by L-BFGS; returns the delta."""
    model, _, _ = one("plain")
    delta, r = shake(model, std=0.2), min(target.shape)
    optimizer = torch.optim.LBFGS([delta.A, delta.B], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0,
                                  line_search_fn="strong_wolfe", history_size=40)  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = []
        for b in range(1, r + 1):
            delta.nested = Nested(b, rescaled=False)
            B, A = delta.acting()
            losses.append(objective(B @ A))
        total = torch.stack(losses).mean()
        total.backward()
        return total

    optimizer.step(closure)
    delta.nested = None
    return delta


def test_every_truncation_is_the_best_approximation_of_a_linear_map():
    u, _, v = torch.linalg.svd(torch.randn(OUT, IN), full_matrices=False)
    target = (u * torch.tensor([6.0, 5, 4, 3, 2, 1])) @ v  # distinct singular values
    delta = fitted(target, lambda W: (target - W).square().sum())
    for b in range(1, OUT + 1):
        close(delta.B[:, :b] @ delta.A[:b], best_of_rank(target, b), 1e-5)


def test_a_linear_autoencoder_recovers_the_principal_components():
    """Reconstructing centred inputs of covariance C, truncation b becomes the projection on C's b leading axes."""
    q = torch.linalg.qr(torch.randn(6, 6)).Q
    C = (q * torch.tensor([9.0, 7, 5, 3, 2, 1])) @ q.t()
    root = torch.linalg.cholesky(C)
    model = adapted(linear(6, 6), "maestro", ranks="maestro")
    delta = shake(model, std=0.1)
    optimizer = torch.optim.LBFGS([delta.A, delta.B], max_iter=3000, tolerance_grad=1e-12, tolerance_change=0,
                                  line_search_fn="strong_wolfe", history_size=40)  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        parts = [((torch.eye(6) - delta.B[:, :b] @ delta.A[:b]) @ root).square().sum() for b in range(1, 7)]
        total = torch.stack(parts).mean()
        total.backward()
        return total

    optimizer.step(closure)
    for b in range(1, 7):
        close(delta.B[:, :b] @ delta.A[:b], q[:, :b] @ q[:, :b].t(), 1e-4)


# ---- shrinking -----------------------------------------------------------------------------------------------------


def test_a_suffix_is_cut_with_its_moments():
    model, hook, x = one("plain", threshold=1e-3)
    delta = shake(model)
    with torch.no_grad():
        delta.B[:, 4:] = 1e-6
    acting = torch.optim.AdamW(trained(model), lr=0.0)
    model(x).square().sum().backward()
    acting.step()
    kept = acting.state[delta.A]["exp_avg"][:4].clone()
    wanted = model(x)
    hook.after_step(Moment(model, acting, 3, 10, epoch=3.0))
    assert (delta.rank, delta.spec.rank, tuple(delta.A.shape), tuple(delta.B.shape)) == (4, 4, (4, IN), (OUT, 4))
    assert torch.equal(acting.state[delta.A]["exp_avg"], kept)
    close(model(x), wanted, 1e-4)
    assert hook.pairs.ranks == [4]
    assert sum(p.numel() for g in acting.param_groups for p in g["params"]) == 4 * (IN + OUT)


@pytest.mark.parametrize(("every", "epoch", "steps"), [(None, 3.0, [3, 6, 9]), (4, 3.0, [4, 8]), (None, None, []),
                                                       (None, 2.5, [3, 5, 8, 10])])  # fmt: skip
def test_it_cuts_once_per_epoch_or_every_so_many_steps(every: Any, epoch: Any, steps: list[int]):
    model, hook, _ = one("plain", every=every)
    cut: list[int] = []
    hook._cut = lambda where, for_good=False: cut.append(where.step)
    for step in range(1, 11):
        hook.after_step(moment(model, step, epoch=epoch))
    assert cut == steps


def test_the_loop_and_the_trainer_tell_the_epoch():
    loop = tiny_run(steps=2, train={"accumulate": 2, "batch_size": 4})
    assert loop._moment().epoch == 3.0
    callback, keywords = HookCallback(), {"model": loop.model, "optimizer": loop.optimizer}
    begun = TrainerState(global_step=0, epoch=0, max_steps=30, num_train_epochs=3)
    assert callback._moment(begun, 1, keywords).epoch == 10.0
    underway = TrainerState(global_step=4, epoch=0.5, max_steps=30, num_train_epochs=4)  # cut short by max_steps
    assert callback._moment(underway, 5, keywords).epoch == 8.0


@pytest.mark.parametrize("delta", ["maestro", "lora", "dora"])
def test_a_large_penalty_empties_the_layers(delta: str):
    settings = {} if delta == "maestro" else {"rank": 4, "alpha": 8}
    ranks = {"ranks": "maestro", "penalty": 10.0, "threshold": 0.2, "every": 10}
    loop = tiny_run(delta=delta, ranks=ranks, steps=150, optim={"lr": 3e-2, "schedule": "linear"},
                    targets=["q_proj"], **settings)  # fmt: skip
    loop.run()
    assert {d.pair.rank for d in deltas(loop.model)} == {0}


def deltas(model: nn.Module) -> list[Any]:
    return [rw.get_delta(model, k) for k in rw.delta_weights(model)]


@pytest.mark.parametrize("sampler", ["one", "all", "none"])
def test_it_learns(sampler: str):
    ranks = {"ranks": "maestro", "sampler": sampler, "penalty": 1e-4}
    loop = tiny_run(delta="maestro", ranks=ranks, steps=24, optim={"lr": 3e-3})
    assert falls(loop.run().losses)


def test_convolutions_learn():
    model = tiny_convnet().double()
    x, y = torch.randn(8, 3, 16, 16), torch.randint(5, (8,))
    wanted = model(x)
    rw.adapt(model, "maestro", targets=["stem", "dilated", "pointwise", "strided1d"], ranks="maestro")
    close(model(x), wanted.detach(), 1e-12)
    (hook,) = method_hooks(model)
    acting, losses = torch.optim.Adam(trained(model), lr=1e-2), []
    for step in range(1, 40):
        where = Moment(model, acting, step, 39)
        hook.before_forward(where)
        loss = nn.functional.cross_entropy(model(x), y) + hook.penalty(where)
        acting.zero_grad()
        loss.backward()
        acting.step()
        hook.after_step(where)
        losses.append(loss.item())
    assert falls(losses)


def test_a_run_goes_on_bit_for_bit(tmp_path: Path):
    def make(folder: Path, **more: Any) -> Any:
        ranks = {"ranks": "maestro", "penalty": 3.0, "threshold": 0.35, "every": 3}
        return tiny_run(folder, delta="maestro", ranks=ranks, steps=12, optim={"lr": 3e-2}, **more)

    model = resumes_exactly(tmp_path, make, stops=(4, 7, 10))
    ranks = [d.rank for d in deltas(model)]
    assert 0 < sum(ranks) < 20 * len(ranks)  # cuts fell before and behind the stops


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path):
    one, two = (trained_by(n, "maestro", tmp_path, "maestro") for n in (1, 2))
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=0)


# ---- afterwards ----------------------------------------------------------------------------------------------------


def test_the_result_merges_saves_and_exports(tmp_path: Path):
    ranks = {"ranks": "maestro", "penalty": 3.0, "threshold": 0.35, "every": 3}
    loop = tiny_run(delta="maestro", ranks=ranks, steps=12, optim={"lr": 3e-2})
    loop.run()
    model, x = loop.model.eval(), torch.arange(3, 15).unsqueeze(0)
    wanted = model(x).logits
    fresh = rw.load(tiny_llama(), rw.save(model, tmp_path / "own")).eval()
    same(adapter_state(fresh), adapter_state(model))
    assert torch.equal(fresh(x).logits, wanted)
    rw.export(model, tmp_path / "merged", kind="merged")
    plain = type(fresh).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(plain(x).logits, wanted, atol=1e-4, rtol=1e-4)
    rw.set_rank(model, {"q_proj": 1})  # any smaller rank, without training again
    told = factorised(model)
    assert {f.rank for f in told.layers if "q_proj" in f.site} <= {0, 1}
    cut = model(x).logits
    rw.merge(model)
    torch.testing.assert_close(model(x).logits, cut, atol=1e-4, rtol=1e-4)


def test_the_count_of_what_is_cheaper():
    model = rw.adapt(One(linear(10, 6)), "maestro", targets="layer", ranks="maestro")
    (form,) = factorised(model).layers
    assert (form.rank, form.factored, form.dense, form.cheaper) == (6, 96, 60, "dense")
    for rank, cheaper in ((4, "dense"), (3, "factored"), (1, "factored")):
        told = factorised(rw.set_rank(model, rank))
        assert told.layers[0].cheaper == cheaper
        assert told.layers[0].factored == rank * 16 == told.factored
        assert told.best == min(60, rank * 16)
    assert "at best" in str(told)
    assert told.to_dict()["layers"][0]["cheaper"] == "factored"
    with pytest.raises(ConfigError, match="delta='maestro'"):
        factorised(adapted(linear(), "lora", rank=2))


def test_what_is_wrong_is_refused():
    with pytest.raises(TargetError, match="at most min"):
        adapted(linear(IN, OUT), "maestro", rank=7)
    with pytest.raises(TargetError, match="rank 0"):
        adapted(linear(IN, OUT), "maestro", rank=0)
    with pytest.raises(TargetError, match="lacks: choose maestro"):
        adapted(linear(IN, OUT), "vera", rank=2, ranks="maestro")
    for schedule in ("dylora", "lora-squeeze"):
        with pytest.raises(TargetError, match="trained pair"):
            adapted(linear(IN, OUT), "maestro", ranks=schedule)
    with pytest.raises(TargetError, match="additive"):
        adapted(linear(IN, OUT), {"delta": "dora", "inner": "maestro"})
    with pytest.raises(TargetError, match="fills a factor pair"):
        adapted(linear(IN, OUT), "maestro", init="pissa")
    with pytest.raises(ConfigError, match="no trained pair of factors"):
        rw.squeeze(adapted(linear(IN, OUT), "maestro"), rank=2)
