"""What one of PEFT's methods is to us: how its folder is written, and how a delta of ours is made from one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from rankworks.core.delta import Delta
from rankworks.core.errors import ExportError
from rankworks.core.registry import MethodSpec
from rankworks.core.site import Site
from rankworks.core.state import Adapter, State
from rankworks.export.parts import Part
from rankworks.export.report import SiteExport


@dataclass
class Written:
    """A PEFT folder before it is on disk: the method's own fields, the tensors by full name, and what was done."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    sites: list[SiteExport]
    notes: list[str] = field(default_factory=list)


class Family(ABC):
    """One PEFT method. `names` are its tensors' names at a layer, `shared` those that stand once per model."""

    peft_type: ClassVar[str]
    deltas: ClassVar[tuple[str, ...]]  # keys of the deltas it can hold
    names: ClassVar[tuple[str, ...]]
    shared: ClassVar[tuple[str, ...]] = ()
    copies: ClassVar[tuple[str, ...]] = ()  # tensors at a layer that repeat the shared ones, and are not read
    fields: ClassVar[tuple[str, ...]]  # fields of adapter_config.json it honours; others must be at rest
    values: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # fields it honours at these values alone

    @abstractmethod
    def write(self, model: nn.Module, state: State, adapter: Adapter, parts: list[Part]) -> Written:
        """Return the folder's content; raises `ExportError` naming what the format cannot say."""

    def complete(self, config: Mapping[str, Any], read: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Any]:
        """Return the configuration with what only the file's shared tensors tell (`read` gives them), if any."""
        return config

    @abstractmethod
    def spec(self, config: Mapping[str, Any], site: Site | None, shapes: Mapping[str, tuple[int, ...]]) -> MethodSpec:
        """Return the delta's settings at a layer (its tensors' shapes given), or those of the whole file for None."""

    @abstractmethod
    def fill(self, delta: Delta, site: Site, tensors: Mapping[str, Tensor]) -> None:
        """Copy a layer's tensors into its delta. Raises `StoreError` where they are not of its shape."""

    def init(self, config: Mapping[str, Any]) -> Any:
        """Return the initialiser that must rebuild the start, or "default" where nothing needs one."""
        return "default"

    def check_shared(  # noqa: B027 - most methods share nothing
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], adapter: Adapter, state: State
    ) -> None:
        """Raise `StoreError` where the file's shared tensors are not those of the built adapter."""


def one_value(parts: list[Part], setting: str, peft_type: str) -> Any:
    """Return a setting that all layers must share in PEFT's format. Raises `ExportError` naming two that differ."""
    first = getattr(parts[0].pairs[0][1], setting)
    for part in parts:
        value = getattr(part.pairs[0][1], setting)
        if value != first:
            raise ExportError(
                f"PEFT's {peft_type} has one {setting} for all layers, and it is {first} at {parts[0].path} and "
                f"{value} at {part.path}: {nearest_kind(parts)}."
            )
    return first


def only_linear(parts: list[Part], peft_type: str, kinds: tuple[str, ...] = ("linear",)) -> None:
    """Raise `ExportError` where PEFT's method does not take a layer of this kind, or takes it whole or not at all."""
    for part in parts:
        if part.kind not in kinds:
            raise ExportError(
                f"PEFT's {peft_type} takes layers of kind {' or '.join(kinds)}, and {part.path} is of kind "
                f"{part.kind}: {nearest_kind(parts)}."
            )
        if part.delta is None:
            raise ExportError(f"PEFT's {peft_type} has no row ranges, and {part.path} has one: {nearest_kind(parts)}.")


def nearest_kind(parts: list[Part]) -> str:
    """Return the remedy: plain LoRA where it is exact, else merged weights."""
    if all(part.factors() is not None for part in parts):
        return "export with kind='lora', which is exact here"
    return "export with kind='merged', or approximately with kind='lora' and a rank"
