"""Checkpoints from which a run goes on bit for bit, and which a crash can never leave half-written.

    checkpoints/
      step-00000040/   weights.*  optimizer.*  run.*   (tensors in safetensors, the rest in JSON)  sums.json
      latest           the name of the newest whole checkpoint

A checkpoint is written into a temporary folder beside, every file synced, and then renamed: under its final name it is
whole. `sums.json` holds the SHA-256 of every file, so one that rotted afterwards is passed over on resume. The older
checkpoints are removed only when the new one stands.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankworks.core.delta import Delta
from rankworks.core.errors import StoreError, TrainingError
from rankworks.core.files import atomic_folder, atomic_write
from rankworks.core.weights.integers import held_tensors
from rankworks.train.tensors import read_tree, write_tree

log = logging.getLogger(__name__)

NORMS = (nn.modules.batchnorm._NormBase,)
"""Modules whose buffers training moves (running means and variances)."""


def trained_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Return by name everything training may change: adapters (also their stored buffers), parameters, running means.

    The tensors are the model's own. Frozen banks and other buffers that are rebuilt are not among them; what the
    optimizer trains is, even where it is frozen for now.
    """
    held = {id(p) for group in (optimizer.param_groups if optimizer is not None else ()) for p in group["params"]}
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad or id(p) in held)
    found = {key: tensor for name, parameter in trained for key, tensor in _stored(name, parameter)}
    persistent = set(model.state_dict(keep_vars=True))
    for prefix, module in model.named_modules():
        if isinstance(module, Delta):
            found |= {f"{prefix}.{name}": p for name, p in module.named_parameters()}
        if isinstance(module, (Delta, *NORMS)):
            buffers = ((f"{prefix}.{name}", b) for name, b in module.named_buffers())
            found |= {name: b for name, b in buffers if name in persistent}
    return found


def _stored(name: str, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """A parameter under its name, or what holds its numbers where these are integers."""
    held = held_tensors(parameter)
    return [(name, parameter)] if held is None else [(f"{name}.{part}", tensor) for part, tensor in held.items()]


def load_trained_tensors(
    model: nn.Module, state: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Copy saved tensors into the model; raises `TrainingError` when names or shapes differ."""
    here = trained_tensors(model, optimizer)
    odd = sorted(set(here) ^ set(state)) or [n for n in here if here[n].shape != state[n].shape]
    if odd:
        raise TrainingError(
            f"the checkpoint was written for another adapter: {', '.join(odd[:5])} differ. Use the settings of the "
            "first run, or start over in another output folder."
        )
    with torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(state[name])


def random_states() -> dict[str, Any]:
    """Return the state of every random generator: python, numpy, torch, and the accelerators."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Set every random generator to a saved state."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


@dataclass
class Checkpoints:
    """The checkpoints of one run in `folder`, of which the newest `keep` stay."""

    folder: Path
    keep: int = 2

    def save(self, step: int, parts: dict[str, Any]) -> Path:
        """Write a checkpoint of the given parts (name -> tree). A full disk raises and leaves the older ones alone."""
        final = self.folder / f"step-{step:08d}"
        try:
            self._sweep()
            with atomic_folder(final) as folder:
                for name, tree in parts.items():
                    write_tree(folder, name, tree)
                sums = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
                atomic_write(folder / "sums.json", json.dumps(sums))
            atomic_write(self.folder / "latest", final.name)
        except StoreError as error:
            kept = self.newest()
            told = (
                f"The last good one is {kept}; the same command goes on from it."
                if kept
                else "There is no earlier one."
            )
            raise TrainingError(f"the checkpoint of step {step} was not saved. {error} {told}") from error
        for old in self._whole()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def newest(self) -> Path | None:
        """Return the newest checkpoint whose files are as they were written, or None."""
        whole = self._whole()
        pointer = self.folder / "latest"
        if pointer.is_file():
            named = self.folder / pointer.read_text().strip()
            whole = [path for path in whole if path != named] + ([named] if named in whole else [])
        for path in reversed(whole):
            if _intact(path):
                return path
            log.warning("%s is damaged and is passed over", path)
        return None

    def load(self, path: Path, parts: Iterable[str]) -> dict[str, Any]:
        """Read the parts of a checkpoint."""
        return {name: read_tree(path, name) for name in parts}

    def clear(self) -> None:
        """Remove all checkpoints: a new run starts here."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _whole(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def _sweep(self) -> None:
        """Remove what a killed process left half-written."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _intact(path: Path) -> bool:
    """Compare every file with its checksum."""
    try:
        sums = json.loads((path / "sums.json").read_text())
        return bool(sums) and all(_sha256(path / name) == total for name, total in sums.items())
    except (OSError, ValueError, AttributeError):
        return False
