"""A case: one method with one choice of settings, on the tiny model of one kind of site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from pydantic.fields import FieldInfo
from torch import Tensor, nn

from rankworks.calibrate import STATISTICS
from rankworks.conformance import models
from rankworks.conformance.errors import NotApplicable
from rankworks.core.adapt import adapt
from rankworks.core.block import BLOCKS
from rankworks.core.errors import RankworksError
from rankworks.core.evidence import Evidence
from rankworks.core.refuse import reasons_against
from rankworks.core.registry import Method, MethodSpec, methods
from rankworks.core.resolve import needs_of, resolve
from rankworks.core.site import KINDS, Site
from rankworks.core.spec import AdaptSpec
from rankworks.core.state import Adapter, state_of
from rankworks.core.summary import delta_weights, trained
from rankworks.core.targets import find_sites

RANK = 2


@dataclass(frozen=True)
class Case:
    """The material of one run of a check. `settings` are the adapter's in their flat form, without `targets`."""

    method: Method
    kind: str = "linear"
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def __str__(self) -> str:
        return ", ".join(part for part in (self.kind, self.label) if part)

    def spec(self, **changes: Any) -> AdaptSpec:
        """Return the whole adapter's spec for this case."""
        return AdaptSpec.from_flat({**self.settings, **changes})

    def model(self, dtype: torch.dtype = torch.float32, turned: bool = False) -> nn.Module:
        """Return a fresh base model; the same numbers each time."""
        return models.build(self.kind, turned=turned).to(dtype)

    def inputs(self, batch: int = 4, dtype: torch.dtype = torch.float32, **choice: Any) -> Tensor:
        """Return a batch for the model."""
        return models.inputs(self.kind, batch, dtype, **choice)

    def targets(self) -> list[str]:
        """Return the names of the model's sites that the method takes with these settings, and can be merged into."""
        spec = self.spec()
        wanted = models.MODELS[self.kind][1]
        return [
            s.name
            for s in find_sites(self.model(), wanted, (), spec.delta.method.cls.kinds)
            if not refusals(spec, s) and not biasless(spec, s)
        ]

    def adapted(self, dtype: torch.dtype = torch.float32, shaken: bool = False, **changes: Any) -> nn.Module:
        """Return a fresh model with the adapter on it; `shaken` moves every trained tensor away from its start."""
        model = self.adapt(self.model(dtype), **changes)
        if shaken:
            shake(model)
        return model

    def adapt(self, model: nn.Module, name: str = "default", **changes: Any) -> nn.Module:
        """Put the adapter on a model of this kind."""
        spec = self.spec(targets=self.targets(), **changes)
        return adapt(model, spec, name=name, evidence=evidence_for(model, spec))

    def with_settings(self, label: str, **changes: Any) -> Case:
        """Return the same case with other settings."""
        return replace(self, settings={**self.settings, **changes}, label=label)


def evidence_for(model: nn.Module, spec: AdaptSpec) -> Evidence:
    """Return what the method needs to know from data at every site: seeded random examples of each statistic."""
    evidence: dict[str, dict[str, Tensor]] = {}
    for site, settings in resolve(model, spec):
        generator = torch.Generator().manual_seed(len(site.name) + sum(site.name.encode()))
        for need in needs_of([(site, settings)], spec):
            if need.example is not None:
                evidence.setdefault(site.name, {}).update(need.example(site.shape, generator))
                continue
            if need.name not in STATISTICS:
                raise NotApplicable(f"it starts from {need.name!r}, which the suite cannot make up")
            made = STATISTICS[need.name](**need.options).example(site.shape, generator)
            parts = {need.name: made} if isinstance(made, Tensor) else {f"{need.name}.{k}": t for k, t in made.items()}
            evidence.setdefault(site.name, {}).update(parts)
    return evidence


def refusals(spec: AdaptSpec, site: Site) -> list[str]:
    """Return the reasons why the spec's method or initialiser does not take a site; empty where it does."""
    return reasons_against(site, spec.delta, spec)


def biasless(spec: AdaptSpec, site: Site) -> bool:
    """Whether the adapter would train a bias at a layer that has none: merging refuses that, by a check of its own."""
    return site.bias is None and spec.delta.method.cls.changes_bias(spec.delta)


def base_case(method: Method, kind: str = "linear") -> Case:
    """Return the case of a method's default settings, with a small rank where it has one."""
    if method.axis == "init":
        delta = "lora" if 2 in method.cls.fills else "lora-xs"  # type: ignore[attr-defined]
        return Case(method, kind, {"delta": delta, "rank": RANK, "init": method.key})
    if method.axis in ("rank", "selection"):
        return Case(method, kind, {"delta": "lora", "rank": RANK, method.tag: method.key})
    small = {"rank": RANK} if "rank" in method.cls.accepted({}) else {}  # type: ignore[attr-defined]
    return Case(method, kind, {"delta": method.key, **small})


def kinds_of(method: Method) -> list[str]:
    """Return the kinds of site a method claims; an initialiser that claims none is tried on all."""
    claimed = getattr(method.cls, "kinds", None) or KINDS
    return [kind for kind in (*KINDS, *BLOCKS) if kind in claimed]


def kind_cases(method: Method) -> list[Case]:
    """Return one case for every claimed kind of site."""
    return [base_case(method, kind) for kind in kinds_of(method)]


def variant_cases(method: Method) -> list[Case]:
    """Return a case for every other choice that the method's settings offer, on its first kind.

    A choice is: every other value of a literal or a switch, a value for a setting that is absent by default, a count
    above zero for one that is zero by default, and every additive delta for a setting that is a delta.
    """
    return variants_of(base_case(method, kinds_of(method)[0]))


def variants_of(first: Case) -> list[Case]:
    """Return a case for every other choice that the settings of a case's method offer."""
    method, cases = first.method, []
    for name, info in method.Spec.model_fields.items():
        for value in _choices(name, info, method):
            given = {name: value}
            if method.axis not in ("delta", "optimizer"):
                given = {method.tag: {method.tag: method.key, name: value}}
            case = first.with_settings(f"{name}={value}", **given)
            if method.axis == "delta" and "rank" not in method.cls.accepted(case.settings):  # a delta inside has none
                case = replace(case, settings={k: v for k, v in case.settings.items() if k != "rank"})
            cases.append(case)
    return cases


def _choices(name: str, info: FieldInfo, method: Method) -> list[Any]:
    """Return the other values of one setting that are worth a case of their own."""
    note, default = info.annotation, info.default
    if name in (method.tag, "seed"):
        return []
    if get_origin(note) is Literal:
        return [v for v in get_args(note) if v != default]
    if isinstance(note, type) and issubclass(note, MethodSpec):
        if method.axis == "optimizer":
            return [{"optimizer": "sgd", "momentum": 0.9}]  # some look along the base's momentum
        return [m.key for m in methods("delta") if m.cls.additive and m.key != default]  # type: ignore[attr-defined]
    if isinstance(default, bool):
        return [not default]
    if default is None:
        return [2] if int in get_args(note) else [0.5] if float in get_args(note) else []
    return [2] if note is int and default == 0 else []


# ---- what checks do to models ------------------------------------------------------------------------------------


def adapter_of(model: nn.Module, name: str = "default") -> Adapter:
    """Return the record of an adapter on a model."""
    return state_of(model).adapter(name)


def holds_numbers(delta: nn.Module) -> bool:
    """Whether a delta can change anything: not where an allocation has left its tensors without a number, rank 0."""
    sizes = [p.numel() for p in delta.parameters()]
    return not sizes or any(sizes)


LARGEST = 8.0  # of |dW|/|W|: beyond it a tiny network's output tells rounding, not the method


@torch.no_grad()
def shake(model: nn.Module, name: str = "default", seed: int = 0, size: float = 0.3) -> None:
    """Move every trained tensor of an adapter by noise of `size` times its own root mean square (or of 1, if zero).

    A method with a large scale is moved less, so that no change dwarfs the weight it changes.
    """
    generator = torch.Generator().manual_seed(4000 + seed)
    moves = []
    for parameter in adapter_of(model, name).parameters():
        scale = parameter.square().mean().sqrt() if parameter.numel() else parameter.new_zeros(())
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        moves.append((parameter, parameter.clone(), noise, scale if scale > 0 else 1.0))
    while True:
        for parameter, start, noise, scale in moves:
            parameter.copy_(start + size * noise * scale)
        if size < 1e-6 or _relative_change(model, name) <= LARGEST:
            return
        size /= 4


def _relative_change(model: nn.Module, name: str) -> float:
    """Return the largest |dW|/|W| of an adapter's sites; 0 where it changes no weight."""
    if adapter_of(model, name).spec.delta.method.cls.weightless:
        return 0.0
    sites = adapter_of(model, name).sites
    return max(
        float(change.norm() / sites[key].weight.to(change.dtype).norm())
        for key, change in delta_weights(model, name).items()
    )


def loss_of(model: nn.Module, x: Tensor, seed: int = 0) -> Tensor:
    """Return the mean squared distance of the output from fixed random numbers, in at least float32."""
    y = model(x)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(5000 + seed)).to(y.device)
    wide = torch.promote_types(y.dtype, torch.float32)
    return F.mse_loss(y.to(wide), target.to(wide))


def optimizer_of(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    """Return AdamW over what the adapted model trains."""
    return torch.optim.AdamW(trained(model), lr=lr, weight_decay=0.1)


def train(
    model: nn.Module, case: Case, steps: int, optimizer: torch.optim.Optimizer | None = None, start: int = 0
) -> Any:
    """Take optimiser steps on seeded batches in train mode, then return to eval mode; returns the optimiser."""
    optimizer = optimizer or optimizer_of(model)
    dtype = next(p for p in model.parameters() if not p.requires_grad).dtype
    model.train()
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, case.inputs(dtype=dtype, seed=step), seed=step).backward()
        optimizer.step()
    model.eval()
    return optimizer


@contextmanager
def random_state(seed: int | None = None) -> Iterator[None]:
    """Give the block a global random state of its own, and put the caller's back."""
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Snapshot:
    """A model as it was: classes, attributes, tensors and flags. `differences` names what has changed since."""

    classes: dict[str, type]
    attributes: dict[str, set[str]]
    tensors: dict[str, Tensor]
    flags: dict[str, bool]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Copy what is compared."""
        return cls(
            {n: type(m) for n, m in model.named_modules()},
            {n: set(vars(m)) | set(m._modules) for n, m in model.named_modules()},
            {k: t.detach().clone() for k, t in model.state_dict().items()},
            {k: p.requires_grad for k, p in model.named_parameters()},
        )

    def differences(self, model: nn.Module) -> list[str]:
        """Return one sentence per difference, empty where the model is as it was."""
        now = Snapshot.of(model)
        found = [
            f"{n} is of class {now.classes[n].__name__}"
            for n, c in self.classes.items()
            if now.classes.get(n, c) is not c
        ]
        found += [f"module {n} is new" for n in now.classes if n not in self.classes]
        found += [f"module {n} is gone" for n in self.classes if n not in now.classes]
        for n, names in self.attributes.items():
            found += [f"{n}.{extra} is new" for extra in now.attributes.get(n, names) - names]
        if list(now.tensors) != list(self.tensors):
            found.append(f"the state's keys are {list(now.tensors)[:6]} and were {list(self.tensors)[:6]}")
        found += [
            f"{k} has other numbers"
            for k, t in self.tensors.items()
            if k in now.tensors and not bits_equal(now.tensors[k], t)
        ]
        found += [f"{k}.requires_grad is {now.flags[k]}" for k, f in self.flags.items() if now.flags.get(k, f) != f]
        return found


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and numbers (NaN equals NaN)."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the larger of 1 and the second's largest number."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    worst = float(((a - b).abs().max() / b.abs().max().clamp_min(1.0)).item())
    return float("inf") if worst != worst else worst


def refused(action: Callable[[], Any], kind: type[RankworksError]) -> tuple[bool, str]:
    """Run an action that must be refused: (whether it raised `kind`, the message or what happened instead)."""
    try:
        action()
    except kind as error:
        return True, str(error)
    except Exception as error:  # anything else is what the check has to tell of
        return False, f"{type(error).__name__}: {error}"
    return False, "no error"
