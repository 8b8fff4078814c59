"""Checks of optimizers, over short runs with their hooks: they learn, resume, and keep what they say they keep."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.conformance.case import bits_equal, random_state
from rankworks.conformance.errors import ConformanceError, NotApplicable
from rankworks.conformance.optimizer_case import STEPS, OptimizerCase, Run, language_loss, numbers
from rankworks.conformance.run import check
from rankworks.core.optim.stepwise import STEP
from rankworks.core.registry import Method, build
from rankworks.core.summary import trained
from rankworks.core.weights.holders import dense_weight
from rankworks.train.hooks import hook_states, restore_hooks
from rankworks.train.tensors import flatten, unflatten


@check("variants", "optimizer")
def optimizer_learns(method: Method, case: OptimizerCase) -> None:
    """A dozen steps lower the loss on their batches."""
    run = Run(case)
    first = sum(language_loss(run.model, seed).item() for seed in range(3))
    model = run.go()
    last = sum(language_loss(model, seed).item() for seed in range(3))
    if not last < first:
        raise ConformanceError(f"a loss below {first:.5f} after {STEPS} steps", f"{last:.5f}", "the sign of the step")


@check("variants", "optimizer")
def optimizer_repeats(method: Method, case: OptimizerCase) -> None:
    """Two runs end with the same numbers, whatever the global random state, and leave that alone."""
    ends = []
    for seed in (31, 32):
        with random_state(seed):
            before = torch.get_rng_state()
            ends.append(numbers(Run(case).go()))
            if not torch.equal(before, torch.get_rng_state()):
                raise ConformanceError("the global random state untouched", "another", "draws without a generator")
    _same(ends[0], ends[1], "two runs", "draws that depend on more than seed, step and name")


@check("variants", "optimizer")
def optimizer_resumes_exactly(method: Method, case: OptimizerCase) -> None:
    """Left at any third and taken up from a checkpoint of plain tensors, a run ends as if never left, bit for bit."""
    wanted = numbers(Run(case).go())
    for left in (STEPS // 3, 2 * STEPS // 3):
        first = Run(case)
        first.go(left)
        _same(wanted, numbers(_taken_up(case, first).go()), f"a resume after step {left}", "what the state lacks")


def _taken_up(case: OptimizerCase, other: Run) -> Run:
    run = Run(case)
    run.done = other.done
    hooks, kept = (_through_a_file(tree) for tree in (hook_states(other.hooks), other.optimizer.state_dict()))
    run.model.load_state_dict(numbers(other.model))
    restore_hooks(run.hooks, hooks, "the checkpoint")
    run.optimizer.load_state_dict(kept)
    return run


def _through_a_file(tree: Any) -> Any:
    tensors: dict[str, Tensor] = {}
    plain = json.loads(json.dumps(flatten(tree, tensors)))
    return unflatten(plain, copy.deepcopy(tensors))


@check("variants", "optimizer")
def state_is_what_the_formula_says(method: Method, case: OptimizerCase) -> None:
    """After a run the bytes of the state, but for step counters, are those of state_bytes, and all are tensors."""
    run = Run(case)
    run.go()
    found = 0
    for state in run.optimizer.state.values():
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise ConformanceError("tensors only", f"{type(value).__name__} in {name!r}", "update()")
            found += 0 if name == STEP else value.numel() * value.element_size()
    told = sum(case.built().state_bytes(p, group) for group in run.optimizer.param_groups for p in group["params"])
    if found != told:
        raise ConformanceError(f"{told} bytes, as state_bytes has it", f"{found}", "state_bytes()")


@check("variants", "optimizer")
def groups_hold_everything_once(method: Method, case: OptimizerCase) -> None:
    """Every trained parameter stands in one group, with its name; groups are plain but for their parameters."""
    model = case.network()
    optimizer = case.optimizer(model)
    wanted = {id(p) for p in trained(model)}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if sorted(map(id, held)) != sorted(wanted):
        raise ConformanceError(f"{len(wanted)} parameters once each", f"{len(held)} in groups", "groups()")
    named = dict(model.named_parameters())
    for group in optimizer.param_groups:
        if [id(named[name]) for name in group["names"]] != [id(p) for p in group["params"]]:
            raise ConformanceError("the names of the parameters", "others", "groups()")
        _through_a_file({k: v for k, v in group.items() if k != "params"})


@check("variants", "optimizer")
def rate_of_zero_moves_nothing(method: Method, case: OptimizerCase) -> None:
    """With a learning rate of zero, as at the start of a warmup, no weight changes."""
    run = Run(case, weight_decay=0.1)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    before = numbers(run.model)
    _same(before, numbers(run.go(2)), "steps at a rate of zero", "a part of the step without lr")


@check("once", "optimizer")
def what_has_no_gradient_stays(method: Method, case: OptimizerCase) -> None:
    """A parameter without a gradient is not changed, not even by decay, and nothing is kept for it."""
    _reads_gradients(method)

    def drop(model: nn.Module) -> None:
        for parameter in _dropped(model):
            parameter.grad = None

    run = Run(case, alter=drop, weight_decay=0.1)
    dropped = _dropped(run.model)
    before = [dense_weight(p).detach().clone() for p in dropped]
    run.go(4)
    if not all(torch.equal(dense_weight(p), was) for p, was in zip(dropped, before, strict=True)):
        raise ConformanceError("a parameter without a gradient as it was", "another", "update()")
    if any(isinstance(v, Tensor) and v.numel() > 1 for p in dropped for v in run.optimizer.state.get(p, {}).values()):
        raise ConformanceError("no state for a parameter without a gradient", "some", "what is made before it is used")


def _dropped(model: nn.Module) -> list[nn.Parameter]:
    """Return what is trained in one linear layer."""
    return [p for name, p in model.named_parameters() if "layers.1.mlp.up_proj" in name and p.requires_grad]


@check("variants", "optimizer")
def layerwise_is_the_same(method: Method, case: OptimizerCase) -> None:
    """Steps taken in the backward pass give the weights of steps taken after it."""
    if not method.cls.layerwise:  # type: ignore[attr-defined]
        raise NotApplicable("its steps need several gradients together: refused")
    wanted = numbers(Run(case, torch.float64).go())
    got = numbers(Run(case, torch.float64, layerwise=True).go())
    apart = max(float((wanted[k] - got[k]).abs().max()) for k in wanted)
    if not apart <= 1e-12:
        raise ConformanceError("the weights of the ordinary order", f"{apart:.2g} away", "update()")


@check("variants", "optimizer")
def bfloat16_works(method: Method, case: OptimizerCase) -> None:
    """On a base in bfloat16 every weight keeps its type, and the loss falls."""
    run = Run(case, torch.bfloat16)
    kinds = [p.dtype for p in trained(run.model)]
    first = sum(language_loss(run.model, seed).item() for seed in range(3))
    model = run.go()
    last = sum(language_loss(model, seed).item() for seed in range(3))
    if kinds != [p.dtype for p in trained(model)]:
        raise ConformanceError("weights of the types they had", "others", "types in update()")
    if not last < first:  # also where it is not a number
        raise ConformanceError(f"a loss below {first:.4f}", f"{last:.4f}", "types in update()")


@check("variants", "optimizer")
def what_is_frozen_stays(method: Method, case: OptimizerCase) -> None:
    """Nothing but the trained parameters changes."""
    run = Run(case)
    acting = {id(p) for p in trained(run.model)}
    frozen = {n: p.detach().clone() for n, p in run.model.named_parameters() if id(p) not in acting}
    if not frozen:
        raise NotApplicable("everything is trained")
    after = dict(run.go(4).named_parameters())
    _same(frozen, {n: after[n].detach() for n in frozen}, "a run", "a write beyond the groups")


@check("variants", "optimizer")
def decay_shrinks_matrices(method: Method, case: OptimizerCase) -> None:
    """With gradients of zero, weight decay makes the matrices smaller and leaves vectors alone."""
    _reads_gradients(method)

    def silence(model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    run = Run(case, torch.float64, alter=silence, weight_decay=0.5)
    trains = [p for group in run.optimizer.param_groups for p in group["params"]]
    before = [dense_weight(p).detach().clone() for p in trains]
    run.go(4)
    after = [dense_weight(p) for p in trains]
    moved = [(p, was) for p, was in zip(after, before, strict=True) if not torch.equal(p, was)]
    if not moved or not all(p.ndim > 1 and p.norm() < was.norm() for p, was in moved):
        raise ConformanceError("smaller matrices, vectors as they were", "others", "weight_decay in update()")


@check("once", "optimizer")
def optimizer_settings_round_trip(method: Method, case: OptimizerCase) -> None:
    """A spec written as JSON reads back as the same spec."""
    spec = build("optimizer", method.key, **case.settings)
    again = build("optimizer", json.loads(spec.model_dump_json()))
    if again != spec:
        raise ConformanceError(str(spec), str(again), "a setting that JSON cannot hold")


def _reads_gradients(method: Method) -> None:
    if method.cls.closure:  # type: ignore[attr-defined]
        raise NotApplicable("its step evaluates the loss itself, whatever gradients there are")


def _same(wanted: dict[str, Tensor], got: dict[str, Tensor], what: str, where: str) -> None:
    wrong = next((k for k in wanted if k not in got or not bits_equal(wanted[k], got[k])), None)
    if wrong is not None:
        raise ConformanceError(f"the same numbers from {what}", f"others in {wrong}", where)
