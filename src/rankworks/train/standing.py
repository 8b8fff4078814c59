"""What an output folder holds already: an unfinished run or search, of this very configuration or of another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rankworks.core.errors import ConfigError
from rankworks.core.files import atomic_write
from rankworks.train.config import RunConfig

FREE = {"output": None, "evaluate": None, "train": ("eval_every", "save_every", "keep", "log_every", "tensorboard")}
"""Settings that may change between a run and its continuation: they do not move the weights."""


def unfinished(config: RunConfig) -> bool:
    """Say whether the output folder holds an unfinished run of this configuration, with a checkpoint to go on from.

    Raises `ConfigError` naming the settings that differ, when it holds an unfinished run of another one.
    """
    if config.output is None:
        return False
    folder = Path(config.output)
    if (folder / "result.json").exists() or not list((folder / "checkpoints").glob("step-*")):
        return False
    return same(config, folder / "config.yaml", "an unfinished run")


def same(config: RunConfig, file: Path, what: str) -> bool:
    """Say whether a recorded configuration is this one; False where there is none.

    Raises `ConfigError` naming the settings that differ.
    """
    try:
        earlier = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return False
    differing = _differences(_fixed(earlier), _fixed(_plain(config)))
    if differing:
        raise ConfigError(
            f"{file.parent} holds {what} with other settings ({', '.join(differing)}): use those settings to go "
            "on with it, resume=False (on the command line --restart) to start over, or another output."
        )
    return True


def record(config: RunConfig, file: Path) -> None:
    """Write down the configuration, every setting."""
    atomic_write(file, yaml.safe_dump(_plain(config), sort_keys=False))


def _plain(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as YAML can hold it."""
    return json.loads(config.model_dump_json())


def _fixed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that must not change between a run and its continuation, flat."""
    flat: dict[str, Any] = {}
    for block, settings in values.items():
        free = FREE.get(block, ())
        if free is None:
            continue
        if not isinstance(settings, Mapping):
            flat[block] = settings
            continue
        flat |= {f"{block}.{key}": value for key, value in settings.items() if key not in free}
    return flat


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return `key: earlier -> now` for every setting that differs."""
    return [
        f"{key}: {earlier.get(key)} -> {now.get(key)}"
        for key in sorted({*earlier, *now})
        if earlier.get(key) != now.get(key)
    ]
