"""What a plan says, as a table to read and as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rankworks.plan.units import format_bytes

NONE = "none"
"""The delta of a plan without an adapter: every weight is trained, as `adapt: none` has it in a run."""


@dataclass(frozen=True)
class Fit:
    """Whether the run fits in so many bytes, and the largest batch that does (0 where not even one row does)."""

    memory_bytes: int
    fits: bool
    largest_batch: int

    def __str__(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        most = f"the largest batch is {self.largest_batch}" if self.largest_batch else "not even a batch of 1 does"
        return f"{verdict} in {format_bytes(self.memory_bytes)}; {most}"


@dataclass(frozen=True)
class Plan:
    """What adapting and training a model costs; bytes unless it says otherwise.

    delta is "none" where no adapter is put on the model and all of its weights are trained. ranks is the key of the
    rank schedule, if there is one; one that grows is counted at its largest.

    trainable_parameters: numbers trained; percent: their share of all, the adapter's included.
    adapter_bytes: what the adapter file holds; frozen_bytes: further tensors of the adapter in memory (shared random
    banks, factors rebuilt from the weight), never written. weight_bytes: the base model. gradient_bytes: of the trained
    numbers, as many as are there at one time; optimizer_bytes: what the optimizer keeps of them. activation_bytes: the
    highest point of a step beyond all these, 0 where `notes` says that it could not be traced. peak_bytes: the highest
    point of a whole step; a little below the sum, since gradients come as activations go. step_flops: operations of one
    forward and backward pass, or of all evaluations of the loss where a step consists of those.
    """

    model: str
    delta: str
    init: str
    settings: dict[str, Any]
    targets: Any
    sites: int
    dtype: str
    optimizer: str
    batch_size: int
    sequence: int
    gradient_checkpointing: bool
    trainable_parameters: int
    base_parameters: int
    percent: float
    adapter_bytes: int
    frozen_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    peak_bytes: int
    step_flops: int
    fit: Fit | None = None
    layerwise: bool = False
    ranks: str = ""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, and not every weight."""
        return self.delta != NONE

    @property
    def what(self) -> str:
        """What is trained, in words."""
        if not self.adapts:
            return "every weight"
        start = "" if self.init == "default" else f" from {self.init}"
        return f"{self.delta}{start}{f' with {self.ranks}' if self.ranks else ''} on {self.sites} sites"

    def __str__(self) -> str:
        head = f"{self.model} ({self.dtype}), {self.what}"
        step = f"batch {self.batch_size} x {self.sequence}" + (
            ", gradient checkpointing" if self.gradient_checkpointing else ""
        )
        rows = [
            (
                "trainable parameters",
                f"{self.trainable_parameters:,} of {self.base_parameters:,} ({self.percent:.4g} %)",
            ),
            *([("adapter file", format_bytes(self.adapter_bytes))] if self.adapts else []),
            ("weights", format_bytes(self.weight_bytes)),
            *([("adapter in memory", format_bytes(self.adapter_bytes + self.frozen_bytes))] if self.adapts else []),
            ("gradients", format_bytes(self.gradient_bytes)),
            (f"optimizer ({self.optimizer})", format_bytes(self.optimizer_bytes)),
            (f"activations ({step})", format_bytes(self.activation_bytes)),
            ("peak", format_bytes(self.peak_bytes)),
            ("operations per step", f"{self.step_flops:.3g}"),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [head, *(f"  {name:<{width}}  {value}" for name, value in rows)]
        if self.fit is not None:
            lines.append(f"  {self.fit}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Comparison:
    """Plans of several methods for one model, and why the others have none."""

    plans: list[Plan]
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"plans": [p.to_dict() for p in self.plans], "skipped": self.skipped}

    def __str__(self) -> str:
        head = ("method", "rank", "trainable", "%", "file", "optimizer", "activations", "peak", "largest batch")
        rows = [
            (
                p.delta,
                str(_rank(p.settings) or ""),
                f"{p.trainable_parameters:,}",
                f"{p.percent:.3g}",
                format_bytes(p.adapter_bytes),
                format_bytes(p.optimizer_bytes),
                format_bytes(p.activation_bytes),
                format_bytes(p.peak_bytes),
                str(p.fit.largest_batch) if p.fit else "",
            )
            for p in self.plans
        ]
        shown = [head, *rows] if any(p.fit for p in self.plans) else [r[:-1] for r in (head, *rows)]
        widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))]
        lines = [
            "  ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in shown
        ]
        title = f"{self.plans[0].model} ({self.plans[0].dtype})" if self.plans else "no method fits"
        return "\n".join([title, *lines, *(f"{key}: {reason}" for key, reason in self.skipped.items())])


def _rank(settings: dict[str, Any]) -> Any:
    inner = settings.get("inner")
    return settings.get("rank") or (inner.get("rank") if isinstance(inner, dict) else None)
