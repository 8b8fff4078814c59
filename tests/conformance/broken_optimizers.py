"""Optimizers that each break one promise, and the good one they were made from: signs of a mean gradient."""

from __future__ import annotations

from typing import Any

import torch

from rankworks.core.fields import Setting
from rankworks.core.optim.method import OptimizerMethod
from rankworks.core.optim.stepwise import Stepwise, count_step


class Signs(Stepwise):
    """w <- w (1 - lr decay) - lr sign(m)."""

    def update(self, parameter, gradient, state, group):
        count_step(state)
        if "m" not in state:
            state["m"] = torch.zeros_like(parameter)
        state["m"].lerp_(gradient, 0.5)
        self.move(parameter, state["m"].sign(), group)

    def move(self, parameter, direction, group):
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])


class GoodOptimizer(OptimizerMethod):
    """One number a parameter."""

    steps: type = Signs

    def build(self, groups, lr):
        return self.steps(groups, lr=lr, weight_decay=self.weight_decay)

    def state_bytes(self, parameter, group):
        return parameter.numel() * parameter.element_size()


class _Climbs(Signs):
    def move(self, parameter, direction, group):
        super().move(parameter, -direction, group)


class ClimbsTheLoss(GoodOptimizer):  # optimizer_learns
    steps = _Climbs


class _Noisy(Signs):
    def move(self, parameter, direction, group):
        super().move(parameter, direction + 0.01 * torch.randn_like(direction), group)


class Noisy(GoodOptimizer):  # optimizer_repeats
    steps = _Noisy


class _Remembers(Signs):
    """Keeps its mean where no checkpoint sees it."""

    def __init__(self, groups, **defaults):
        super().__init__(groups, **defaults)
        self.means: dict[Any, Any] = {}

    def update(self, parameter, gradient, state, group):
        kept = self.means.setdefault(parameter, torch.zeros_like(parameter))
        kept.lerp_(gradient, 0.5)
        self.move(parameter, kept.sign(), group)


class KeepsItToItself(GoodOptimizer):  # optimizer_resumes_exactly, state_is_what_the_formula_says
    steps = _Remembers


class SaysTooLittle(GoodOptimizer):  # state_is_what_the_formula_says
    def state_bytes(self, parameter, group):
        return parameter.numel()


class LeavesVectorsOut(GoodOptimizer):  # groups_hold_everything_once
    def groups(self, model, lr):
        return [g for g in super().groups(model, lr) if g["params"][0].ndim > 1]


class _Floor(Signs):
    def move(self, parameter, direction, group):
        super().move(parameter, direction, {**group, "lr": max(group["lr"], 1e-5)})


class NeverStands(GoodOptimizer):  # rate_of_zero_moves_nothing
    steps = _Floor


class _Everything(Signs):
    """Treats a gradient that is not there as zeros."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return super().step(closure)


class StepsWithoutGradients(GoodOptimizer):  # what_has_no_gradient_stays
    steps = _Everything


class _Together(Signs):
    """Divides by the norm of all gradients there are."""

    def step(self, closure=None):
        gradients = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        self.norm = torch.stack([g.norm() for g in gradients]).norm()
        return super().step(closure)

    def move(self, parameter, direction, group):
        super().move(parameter, direction / (1 + self.norm), group)


class NeedsTheOthers(GoodOptimizer):  # layerwise_is_the_same
    steps = _Together


class _Narrow(Signs):
    def move(self, parameter, direction, group):
        super().move(parameter, direction, group)
        parameter.data = parameter.data.to(torch.bfloat16 if parameter.dtype == torch.float32 else parameter.dtype)


class ChangesTypes(GoodOptimizer):  # bfloat16_works
    steps = _Narrow


class WritesTheBase(GoodOptimizer):  # what_is_frozen_stays
    def build(self, groups, lr):
        made = super().build(groups, lr)
        base, inner = self.base, made.step

        def step(closure=None):
            with torch.no_grad():
                base.mul_(0.99)
            return inner(closure)

        made.step = step
        return made

    def groups(self, model, lr):
        self.base = next(p for n, p in model.named_parameters() if n.endswith("q_proj.weight"))
        return super().groups(model, lr)


class _Grows(Signs):
    def move(self, parameter, direction, group):
        super().move(parameter, direction, {**group, "weight_decay": -group["weight_decay"]})


class DecaysUpwards(GoodOptimizer):  # decay_shrinks_matrices
    steps = _Grows


class ReadsAnotherNumber(GoodOptimizer):  # optimizer_settings_round_trip
    limit: float = Setting(float("inf"), "JSON has no infinity")
