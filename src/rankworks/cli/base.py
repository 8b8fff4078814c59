"""The base model an adapter belongs to: the one that is named, else the one its run was made with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankworks.core.errors import ConfigError


def load_base(adapter: Path, name: str | None, dtype: str | None = None) -> tuple[Any, Any, str]:
    """Return (model, tokenizer, name) of the base of the adapter in folder `adapter`.

    name: a sample name, a folder or a hub id; None takes what the run that made the adapter used. A classifier gets the
    classes it was trained with; a base that the run quantised is quantised alike. Raises `ConfigError` where the base
    is not known, and what `load_model` raises.
    """
    from rankworks.core.hub import load_model

    known = made_with(adapter)
    chosen = name or known.get("name") or known.get("recorded")
    if not chosen:
        raise ConfigError(f"{adapter} does not say which model it was made for: name it with --model.")
    options: dict[str, Any] = {"dtype": dtype or known.get("dtype")}
    if known.get("task") == "classification":
        options |= {"task": "classification", "labels": known.get("labels")}
    model, tokenizer = load_model(chosen, **options)
    if known.get("quantise") and chosen == known.get("name"):
        _quantise(model, known)
    return model, tokenizer, str(chosen)


def _quantise(model: Any, known: Mapping[str, Any]) -> None:
    """Bring the base to the values that the run's adapter was trained on, in the weights' own type."""
    from rankworks.core.spec import AdaptSpec
    from rankworks.train.config import ModelConfig
    from rankworks.train.quantising import products, quantise_base

    settings = ModelConfig(name=str(known["name"]), quantise=known["quantise"]).quantise
    assert settings is not None
    spec = AdaptSpec.from_flat({"delta": "lora", **known.get("adapt", {})})
    quantise_base(model, settings.model_copy(update={"holder": "dense"}), products(model, spec))


def made_with(adapter: Path) -> dict[str, Any]:
    """Return what is known of an adapter's base: `name`, `dtype`, ... and `labels` of its run, `recorded` in itself.

    A run leaves its configuration and its measurements beside the adapter.
    """
    import json

    import yaml

    run = adapter.parent
    known: dict[str, Any] = {}
    config = _read(run / "config.yaml", yaml.safe_load)
    model = config.get("model")
    if isinstance(model, Mapping):
        known |= {key: model.get(key) for key in ("name", "dtype", "task", "quantise")}
        known["adapt"] = config.get("adapt")
    measured = _read(run / "before.json", json.loads)
    confusion = measured.get("confusion")
    if isinstance(confusion, Mapping):
        known["labels"] = list(confusion.get("classes", []))
    recorded = _read(adapter / "adapter.json", json.loads).get("model")
    if not recorded:
        recorded = _read(adapter / "adapter_config.json", json.loads).get("base_model_name_or_path")
    known["recorded"] = _sample_name(str(recorded)) if recorded else None
    return known


def _read(path: Path, parse: Any) -> Mapping[str, Any]:
    """Return what a file says; empty where it is not there or is not what it should be."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _sample_name(recorded: str) -> str:
    """Return the name of a sample model for the place it has in the cache: the place is another one elsewhere."""
    from rankworks.core.hub import sample_models

    last = Path(recorded).name
    return next((sample.name for sample in sample_models() if sample.entry_name == last), recorded)
