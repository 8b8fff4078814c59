"""Checks of gradients: they are the derivative, reach everything trained, and never the base."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck

from rankworks.conformance.case import Case, adapter_of, bits_equal, distance, loss_of, optimizer_of, train
from rankworks.conformance.errors import ConformanceError, NotApplicable
from rankworks.conformance.run import check
from rankworks.core.delta import Delta
from rankworks.core.registry import Method
from rankworks.core.store import adapter_state, load_adapter_state
from rankworks.core.summary import trained


@check("all", "delta")
def gradients_are_derivatives(method: Method, case: Case) -> None:
    """Backward is the derivative of forward, for the input and every trained tensor (numerically, in float64)."""
    spec = case.spec().delta
    cls: type[Delta] = spec.method.cls
    if not cls.exact_gradient(spec):
        raise NotApplicable("it treats a part of its output as constant on purpose (exact_gradient)")
    model = case.adapted(torch.float64, shaken=True)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    tensors = [p.detach().clone().requires_grad_() for p in trained(model)]
    x = case.inputs(2, torch.float64, padding=False)
    if x.is_floating_point():
        x = x.requires_grad_()

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    try:
        gradcheck(output, (x, *tensors), fast_mode=True, atol=1e-5, rtol=1e-4)
    except GradcheckError as error:
        said = " ".join(str(error).split())[:200]
        raise ConformanceError(
            "the numerical derivative", said, "forward(): .detach(), no_grad or a hand-written backward"
        ) from None


@check("all")
def gradients_reach_every_tensor(method: Method, case: Case) -> None:
    """Every trained tensor has a gradient that is not zero within the first three steps."""
    model = case.adapted()
    waiting = {n for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    optimizer = optimizer_of(model)
    model.train()
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, case.inputs(seed=step), seed=step).backward()
        waiting -= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    if waiting:
        raise ConformanceError(
            "a gradient for every trained tensor",
            f"none for {min(waiting)}",
            "branch(): is it used, or detached; setup(): two zero factors",
        )


@check("kinds")
def base_is_never_trained(method: Method, case: Case) -> None:
    """Training gives the base no gradient and leaves its numbers bit-identical, while the adapter moves."""
    model = case.adapted()
    mine = {id(p) for p in adapter_of(model).parameters()}
    base = {n: p for n, p in model.named_parameters() if id(p) not in mine}
    before = {n: p.detach().clone() for n, p in base.items()}
    start = [p.detach().clone() for p in trained(model)]
    train(model, case, 3)
    wrong = next((n for n, p in base.items() if p.grad is not None or p.requires_grad), None)
    if wrong is not None:
        raise ConformanceError(
            "no gradient at the base", f"one at {wrong}", "forward(): use base.weight, which is detached"
        )
    wrong = next((n for n, p in base.items() if not bits_equal(p.detach(), before[n])), None)
    if wrong is not None:
        raise ConformanceError(
            "the base's numbers as they were", f"{wrong} moved", "forward(), setup(): what they write to"
        )
    if all(torch.equal(p, q) for p, q in zip(trained(model), start, strict=True)):
        raise ConformanceError("training to move the adapter", "nothing moved", "setup(): self.trainable")


@check("kinds")
def bfloat16_base_works(method: Method, case: Case) -> None:
    """On a bfloat16 base the output is bfloat16 and near the float32 one; tensors and gradients are finite float32."""
    model, wide = case.adapted(torch.bfloat16, shaken=True), case.adapted(shaken=True)
    load_adapter_state(wide, adapter_state(model))  # what is stored too: places chosen by the weight, say
    x = case.inputs(dtype=torch.bfloat16)
    y = model(x)
    if y.dtype != torch.bfloat16:
        raise ConformanceError("a bfloat16 output", str(y.dtype), "branch(): linear() of core.inputs, or .to(x.dtype)")
    apart = distance(y, wide(x.float() if x.is_floating_point() else x))
    if not apart < 0.1:
        raise ConformanceError(
            "an output near the float32 model's", f"{apart:.2g} away", "branch(): what is computed in bfloat16"
        )
    loss_of(model, x).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.dtype != torch.float32:
                raise ConformanceError(
                    "float32 tensors in the adapter", f"{name} is {parameter.dtype}", "setup(): self.trainable"
                )
            if parameter.numel() and (parameter.grad is None or not torch.isfinite(parameter.grad).all()):
                raise ConformanceError(
                    "a finite gradient", f"none or an infinite one at {name}", "branch(): in which type it computes"
                )


@check("kinds", "delta")
def autocast_works(method: Method, case: Case) -> None:
    """Under bfloat16 autocast forward and backward run, near the float32 output, with float32 gradients."""
    model, x = case.adapted(shaken=True), case.inputs()
    wide = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        loss_of(model, x).backward()
    apart = distance(y, wide)
    if not apart < 0.1:
        raise ConformanceError("an output near the float32 one under autocast", f"{apart:.2g} away", "branch()")
    wrong = next(
        (
            n
            for n, p in model.named_parameters()
            if p.requires_grad and (p.grad is None or p.grad.dtype != torch.float32)
        ),
        None,
    )
    if wrong is not None:
        raise ConformanceError("float32 gradients under autocast", f"another, or none, at {wrong}", "branch()")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of what is trained, by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
