"""Maestro's schedule: what the sampler draws, what the lasso weighs, what is found, and what is cut when."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import adapted, best_of_rank, close, delta_of, layer_and_input, linear, quick, shake
from hypothesis import given
from hypothesis import strategies as st
from runs import falls, resumes_exactly, same, tiny_run, trained_by
from torch import Tensor, nn
from transformers import TrainerState

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.forms.lowrank import Nested
from rankworks.core.hooks import Moment, method_hooks
from rankworks.core.store import adapter_state
from rankworks.core.summary import trained
from rankworks.ranks.maestro import OrderedDropout, Pairs, group_norms, importance
from rankworks.train.hooks import HookCallback
from rankworks.train.losses.objective import Objective
from tiny import tiny_bert_classifier, tiny_convnet, tiny_llama

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


# ---- the full pass --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["words", "words at once", "classes"])
@pytest.mark.parametrize("targets", [["q_proj", "up_proj", "query"], ["up_proj", "lm_head", "query", "classifier"]])
def test_the_full_pass_is_the_whole_models_loss_and_the_cut_ones_against_it(task: str, targets: list[str]):
    """The definition, on all logits; in chunks of two tokens; and where the head is a layer that is cut."""
    model = (tiny_bert_classifier() if task == "classes" else tiny_llama()).double()
    targets = [t for t in targets if any(name.endswith(t) for name, _ in model.named_modules())]
    rw.adapt(model, "maestro", targets=targets, ranks={"ranks": "maestro", "full_pass": True, "sampler": "all"})
    for key in rw.delta_weights(model):
        with torch.no_grad():
            rw.get_delta(model, key).pair.B.add_(0.1 * torch.randn_like(rw.get_delta(model, key).pair.B))
    (hook,) = method_hooks(model)
    ids = torch.randint(100, (3, 7))
    labels = torch.tensor([0, 2, 1]) if task == "classes" else torch.where(torch.rand(3, 7) < 0.6, ids, -100)
    objective = Objective(model, chunk_bytes=4 * 100 * 2)
    objective.whole_graph = task == "words at once"
    hook.before_forward(moment(model))
    assert any(pair.nested is not None for pair in hook.layers)

    def logits() -> Tensor:
        found = model(input_ids=ids).logits
        return found if task == "classes" else found[:, :-1][labels[:, 1:] != -100]

    right = labels if task == "classes" else labels[:, 1:][labels[:, 1:] != -100]
    cut = logits()
    with hook.teacher():
        assert all(pair.nested is None for pair in hook.layers)
        whole = logits()
    assert not torch.allclose(cut, whole)
    wanted = nn.functional.cross_entropy(whole, right, reduction="sum")
    wanted = wanted - (whole.softmax(-1).detach() * cut.log_softmax(-1)).sum()
    found = objective({"input_ids": ids}, labels, None, hook.teacher)
    close(found[None], wanted[None], 1e-12)
    for mine, theirs in zip(*(torch.autograd.grad(loss, trained(model)) for loss in (found, wanted)), strict=True):
        close(mine, theirs, 1e-10)


def test_a_model_that_is_not_cut_learns_nothing_from_itself():
    model = rw.adapt(tiny_llama().double(), "maestro", targets=["q_proj"],
                     ranks={"ranks": "maestro", "full_pass": True, "sampler": "none"})  # fmt: skip
    (hook,) = method_hooks(model)
    ids, objective = torch.randint(100, (2, 6)), Objective(model)
    hook.before_forward(moment(model))
    losses = objective({"input_ids": ids}, ids, None, hook.teacher), objective({"input_ids": ids}, ids)
    for mine, theirs in zip(*(torch.autograd.grad(loss, trained(model)) for loss in losses), strict=True):
        close(mine, theirs, 1e-12)


def test_with_the_full_pass_it_learns_and_goes_on_bit_for_bit(tmp_path: Path):
    def make(folder: Path, **more: Any) -> Any:
        ranks = {"ranks": "maestro", "full_pass": True}
        return tiny_run(folder, delta="maestro", ranks=ranks, steps=18, optim={"lr": 3e-3}, **more)

    resumes_exactly(tmp_path, make, stops=(5,))
    assert falls(make(tmp_path / "again").run().losses)


def test_where_there_can_be_no_teacher_it_says_so(tmp_path: Path):
    ranks = {"ranks": "maestro", "full_pass": True}
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing=false"):
        tiny_run(delta="maestro", ranks=ranks, train={"gradient_checkpointing": True})
    loop = tiny_run(delta="maestro", ranks=ranks)
    with pytest.raises(ConfigError, match="own loop"):
        HookCallback().on_train_begin(None, TrainerState(), None, model=loop.model, optimizer=loop.optimizer)
    with pytest.raises(ConfigError, match="two adapters"):
        tiny_run(delta="maestro", ranks=ranks, hooks=(loop.hooks[0],))


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
@pytest.mark.parametrize("schedule", ["maestro", '{"ranks": "maestro", "full_pass": true}'], ids=["labels", "teacher"])
def test_two_processes_equal_one(schedule: str, tmp_path: Path):
    one, two = (trained_by(n, schedule, tmp_path, "maestro") for n in (1, 2))
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=0)
