"""Checks of where a method starts: at the base, from its seed alone, and leaving everything else as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankworks.conformance.case import Case, adapter_of, bits_equal, random_state
from rankworks.conformance.errors import ConformanceError, NotApplicable
from rankworks.conformance.run import check
from rankworks.core.adapt import adapt
from rankworks.core.draw import Draw
from rankworks.core.registry import Method, MethodSpec
from rankworks.core.state import state_of


def starts_as_base(case: Case) -> bool:
    """Whether the method, and any delta it wraps, claims to start as the base."""
    whole = case.spec()
    if not whole.init.method.cls.starts_unchanged(whole.init):  # type: ignore[attr-defined]
        return False
    spec: Any = whole.delta
    while isinstance(spec, MethodSpec):
        if not spec.method.cls.starts_unchanged(spec):  # type: ignore[attr-defined]
            return False
        spec = next((v for n in type(spec).model_fields if isinstance(v := getattr(spec, n), MethodSpec)), None)
    return getattr(case.method.cls, "unchanged_at_init", True)


@check("all")
def output_is_unchanged_at_the_start(method: Method, case: Case) -> None:
    """A fresh adapter leaves the output bit-identical, in float32 and in bfloat16, where the method claims it."""
    if not starts_as_base(case):
        raise NotApplicable("it does not claim to start as the base (unchanged_at_init = False)")
    for dtype in (torch.float32, torch.bfloat16):
        model, x = case.model(dtype).requires_grad_(False), case.inputs(dtype=dtype)  # a kernel may depend on the flag
        given = [x]
        if case.kind == "linear":
            given.append(x.reshape(2, 2, -1).transpose(0, 1))  # not contiguous: other kernels may run
        before = [model(each) for each in given]
        case.adapt(model)
        for each, wanted in zip(given, before, strict=True):
            if not torch.equal(model(each), wanted):
                worst = (model(each) - wanted).abs().max().item()
                raise ConformanceError(
                    f"the base's own output, bit for bit, in {dtype}",
                    f"a difference of {worst:.3g}",
                    "setup(): which trained tensor starts at zero; or declare unchanged_at_init = False",
                )


@check("all", weight=True)
def change_is_nothing_at_the_start(method: Method, case: Case) -> None:
    """The dense change of a fresh adapter is zero beside the weight, also where the base is bfloat16."""
    if not starts_as_base(case):
        raise NotApplicable("it does not claim to start as the base (unchanged_at_init = False)")
    for dtype in (torch.float32, torch.bfloat16):
        adapter = adapter_of(case.adapted(dtype))
        for name, site in adapter.sites.items():
            weight = site.weight.float()
            change = adapter.deltas[name].dense(weight).detach().float()
            relative = float(change.norm() / weight.norm())
            if not relative <= 1e-5:
                raise ConformanceError(
                    f"no change of {name} at the start, with a {dtype} base",
                    f"|dW|/|W| = {relative:.2g}",
                    "dense(); in which type it computes",
                )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor an adapter has by name, its frozen ones and its banks included."""
    adapter, state = adapter_of(model), state_of(model)
    found = {}
    for key, delta in adapter.deltas.items():
        found |= {f"{key}.{n}": t for n, t in [*delta.named_parameters(), *delta.named_buffers()]}
    for number, bank in enumerate(adapter.banks):
        found |= {f"bank {number}.{n}": t for n, t in state.banks[bank].named_buffers()}
    return found


@check("variants")
def seed_alone_decides(method: Method, case: Case) -> None:
    """One seed gives one start, whatever the global random state and the order of the layers; another gives another."""
    with random_state(1):
        first = _tensors(case.adapted(seed=3))
    with random_state(2):
        again = _tensors(case.adapted(seed=3))
    turned = _tensors(case.adapt(case.model(turned=True), seed=3))
    for what, other in (("another global random state", again), ("the layers in another order", turned)):
        wrong = next((k for k in first if k not in other or not bits_equal(first[k], other[k])), None)
        if wrong is not None:
            raise ConformanceError(
                f"the same {wrong} with {what}",
                "other numbers",
                "setup() and bank(): draw from self.draw, given `draw`, only",
            )
    accepted = method.cls.accepted({}) if method.axis == "delta" else []  # type: ignore[attr-defined]
    own: dict[str, Any] = {name: 1 for name in accepted if "seed" in name}
    model = case.adapted(seed=4, **own)
    drawn = any(_has_drawn(delta.draw, 4, name) for name, delta in adapter_of(model).deltas.items())
    other = _tensors(model)
    banked = adapter_of(model).banks and own  # a bank inside another delta has its seed there
    if (drawn or banked) and all(bits_equal(first[k], other[k]) for k in first):
        raise ConformanceError(
            "other random numbers from another seed", "the same", "setup(), bank(): a seed that is fixed in the code"
        )


def _has_drawn(draw: Draw, seed: int, name: str) -> bool:
    """Whether a site's source of random numbers has been used."""
    return not torch.equal(draw.generator.get_state(), Draw(seed, name).generator.get_state())


@check("kinds")
def global_random_state_is_untouched(method: Method, case: Case) -> None:
    """Neither adapting nor a forward in eval mode takes from the global random state."""
    with random_state(7):
        before = torch.get_rng_state()
        model = case.adapted()
        adapted = torch.get_rng_state()
        model(case.inputs())
        run = torch.get_rng_state()
    if not torch.equal(before, adapted):
        raise ConformanceError(
            "adapt to leave the global random state", "numbers taken from it", "setup(), bank(): draw from self.draw"
        )
    if not torch.equal(adapted, run):
        raise ConformanceError(
            "forward to leave the global random state", "numbers taken from it", "branch(): nothing random in eval mode"
        )


@check("kinds")
def base_names_are_kept(method: Method, case: Case) -> None:
    """Adapting renames none of the base's parameters: its own checkpoints still fit."""
    model = case.model()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    after = case.adapt(model).state_dict()
    wrong = next((k for k in before if k not in after or not bits_equal(before[k], after[k])), None)
    if wrong is not None:
        raise ConformanceError(
            f"{wrong} as before", "it is gone or has other numbers", "setup(): a weight it writes into"
        )
    added = [k for k in after if k not in before and not k.startswith("rankworks.banks.")]  # tensors that sites share
    stray = next((k for k in added if ".adapters." not in k), None)
    if stray is not None:
        raise ConformanceError("the adapter's tensors below `.adapters.` only", stray, "setup(): modules put elsewhere")


@check("kinds", "delta", weight=True)
def adapter_is_on_the_base_it_saw(method: Method, case: Case) -> None:
    """An adapter built after another is the same as one built alone: `setup` sees the base's weight, not the sum."""
    alone = _tensors(case.adapted())
    model = case.model()
    adapt(model, "lora", rank=1, targets=[case.targets()[0]], name="earlier")
    with torch.no_grad():
        for parameter in adapter_of(model, "earlier").parameters():
            parameter.fill_(0.5)
    beside = _tensors(case.adapt(model))
    wrong = next((k for k in alone if not bits_equal(alone[k], beside[k])), None)
    if wrong is not None:
        raise ConformanceError(
            f"the same {wrong} beside another adapter",
            "other numbers",
            "setup(weight): use `weight` and self.draw only",
        )
