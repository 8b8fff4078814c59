"""`load_model`: a sample name, a local folder or a hub id becomes a model and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rankworks.core.errors import ConfigError, DownloadError, UnknownNameError, did_you_mean
from rankworks.core.hub.byte_level import BYTES, byte_tokenizer
from rankworks.core.hub.fresh import fresh_config, fresh_model
from rankworks.core.hub.models import sample_models
from rankworks.core.hub.quiet import quiet
from rankworks.core.hub.reach import hub_reachable
from rankworks.core.hub.shapes import find_shape, shape_names

TASKS: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "encoder": AutoModel,
}

_NEW_HEADS = ("classifier.", "score.", "pooler.", "bert.pooler.", "roberta.pooler.", "pre_classifier.", "vit.pooler.")
"""Beginnings of the parameters a classifier may lack in the checkpoint it starts from: they are drawn anew."""


def load_model(
    name_or_path: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    task: str = "causal-lm",
    num_labels: int | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    start: str = "pretrained",
    tokenizer: str | Path | None = None,
    shape: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Return `(model, tokenizer)`, the model in eval mode.

    `name_or_path` is a sample's name (`sample_models()` lists them; fetched once, then offline), a local folder in
    transformers' format, or a hub id. `dtype` is that of the weights ("float32", "bfloat16", ...; None: as stored),
    `device` where they go (None: the CPU).

    `task` is "causal-lm", "classification" or "encoder" (hidden states only). A classifier is transformers' own class
    for the architecture, with `num_labels` classes (or the names in `labels`) and, where the checkpoint has no head, a
    new one drawn from `seed`. For minilm-l6 that is `BertForSequenceClassification`, which reads the first token
    through the pooler, although the sentence embeddings of this checkpoint are the mean over tokens: the head is
    new and trained either way, and a pooling of our own would be a class that no other library loads.
    For embeddings as they are, take `task="encoder"` and average the last hidden state over the attention mask.

    A tokenizer without a padding token pads with its end-of-text token.

    `start="random"` draws new weights from `seed` in place of reading any, to train a language model from nothing; then
    `name_or_path` may also be a built-in shape such as llama-60m (`rankworks.plan.shape_names()`). `tokenizer` names
    the model whose tokenizer is taken, or is "bytes" for one that reads byte by byte; such a shape needs it. `shape`
    replaces settings of the model's configuration, e.g. {"hidden_size": 256, "num_hidden_layers": 6}.

    Only safetensors are read, and code that comes with a model is never run. Raises `UnknownNameError`, `ConfigError`
    or `DownloadError`.
    """
    cls = TASKS.get(task)
    if cls is None:
        raise ConfigError(f"unknown task '{task}'.{did_you_mean(task, TASKS)}")
    if start == "random":
        return _fresh(str(name_or_path), tokenizer, dtype, device, task, seed, shape)
    if start != "pretrained":
        raise ConfigError(f"a model starts 'pretrained' or 'random', not {start!r}.")
    if shape or tokenizer == BYTES:
        what = "take another shape" if shape else "learn to read byte by byte"
        raise ConfigError(f"pretrained weights cannot {what}: give start='random' for new ones.")
    where, local = _resolve(str(name_or_path), task)
    options: dict[str, Any] = {"local_files_only": local or not hub_reachable()}
    with quiet():
        try:
            reader = _tokenizer(where if tokenizer is None else str(tokenizer), options)
            config = AutoConfig.from_pretrained(where, **options)
            if task == "classification":
                _set_labels(config, num_labels, labels)
            model = _from_pretrained(cls, where, config, dtype, seed, options)
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise _unloadable(str(name_or_path), where, local, task, error) from error
    _set_padding(model, reader)
    return model.to(device).eval() if device is not None else model.eval(), reader


def _fresh(
    name: str,
    tokenizer: str | Path | None,
    dtype: Any,
    device: Any,
    task: str,
    seed: int,
    shape: Mapping[str, Any] | None,
) -> tuple[Any, Any]:
    """Return a model of new weights with a tokenizer."""
    if task != "causal-lm":
        raise ConfigError(f"only language models start from random weights, not task '{task}'.")
    shaped = find_shape(name) is not None
    if shaped and tokenizer is None:
        raise ConfigError(f"{name} is a shape without a tokenizer: give one, e.g. tokenizer: smollm2-135m, or bytes.")
    if not shaped and "Did you mean" in (hint := did_you_mean(name, shape_names())):
        raise UnknownNameError(f"no model shape is called {name!r}.{hint}")
    where, local = (None, True) if shaped else _resolve(name, task)
    options: dict[str, Any] = {"local_files_only": local or not hub_reachable()}
    with quiet():
        try:
            reader = _tokenizer(str(where if tokenizer is None else tokenizer), options)
            config = fresh_config(name, where, options, shape)
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise _unloadable(name, str(where or tokenizer), local, task, error) from error
    if reader.pad_token_id is None and reader.eos_token_id is not None:
        reader.pad_token = reader.eos_token
    model = fresh_model(config, reader, dtype, seed)
    return model.to(device).eval() if device is not None else model.eval(), reader


def _tokenizer(name: str, options: dict[str, Any]) -> Any:
    """Return the tokenizer of a sample model, a folder or a hub id, or the one of bytes."""
    if name == BYTES:
        return byte_tokenizer()
    samples = {sample.name: sample for sample in sample_models()}
    where = str(samples[name].folder()) if name in samples else name
    return AutoTokenizer.from_pretrained(where, **options)


def _resolve(name: str, task: str) -> tuple[str, bool]:
    """Return what transformers is to load, and whether that is a folder on this machine."""
    samples = {sample.name: sample for sample in sample_models()}
    if name in samples:
        if task not in samples[name].tasks:
            known = " or ".join(repr(t) for t in samples[name].tasks)
            raise ConfigError(f"{name} ({samples[name].title}) cannot be loaded for task '{task}'; use task={known}.")
        return str(samples[name].folder()), True
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return str(folder), True
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or folder.exists():
        raise UnknownNameError(f"'{name}' is not a folder with a model in it. {_samples_line(name)}")
    return name, False


def _check_folder(folder: Path) -> None:
    """Refuse an adapter folder and a folder of pickles, each with its remedy."""
    if not (folder / "config.json").is_file():
        adapter = any((folder / file).is_file() for file in ("adapter.json", "adapter_config.json"))
        hint = "it holds an adapter: load the base model it was trained on, then rankworks.load(model, folder)"
        raise ConfigError(f"{folder} has no config.json; {hint if adapter else 'it is not a model folder'}.")
    if not any(folder.glob("*.safetensors")):
        found = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        pickles = f" {found[0]} is a pickle, which can run code when read: convert it to safetensors." if found else ""
        raise ConfigError(f"{folder} holds no safetensors weights.{pickles}")


def _set_labels(config: Any, num_labels: int | None, labels: Sequence[str] | None) -> None:
    """Write the class names into the config; `num_labels` and `labels` must agree."""
    if labels is not None:
        if num_labels not in (None, len(labels)):
            raise ConfigError(f"num_labels is {num_labels} but labels names {len(labels)} classes; give one of them.")
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
    elif num_labels is not None:
        if num_labels < 1:
            raise ConfigError(f"num_labels must be at least 1 (given: {num_labels}).")
        config.num_labels = num_labels


def _from_pretrained(cls: Any, where: str, config: Any, dtype: Any, seed: int, options: dict[str, Any]) -> Any:
    """Load with new parameters drawn from `seed`; raises `ConfigError` if others than a head's are missing."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model, report = cls.from_pretrained(
            where,
            config=config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(_NEW_HEADS))
    if missing or report["mismatched_keys"]:
        names = ", ".join(str(key) for key in [*missing, *report["mismatched_keys"]][:5])
        raise ConfigError(f"The weights in {where} do not fill a {type(model).__name__}: {names} missing or misshapen.")
    return model


def _set_padding(model: Any, tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def _unloadable(name: str, where: str, local: bool, task: str, error: Exception) -> Exception:
    """Return the error for a model that transformers could not load."""
    reason = " ".join(str(error).split())
    if local:
        return ConfigError(f"{where} could not be loaded for task '{task}': {reason}")
    if hub_reachable():
        return UnknownNameError(f"'{name}' could not be loaded from the model hub: {reason} {_samples_line(name)}")
    line = f"'{name}' is no sample and no local folder, and the model hub cannot be reached. {_samples_line(name)}"
    return UnknownNameError(line) if "/" not in name else DownloadError(line)


def _samples_line(name: str) -> str:
    names = [sample.name for sample in sample_models()]
    return f"Sample models: {', '.join(names)}.{did_you_mean(name, names) if _near(name, names) else ''}"


def _near(name: str, names: list[str]) -> bool:
    return "Did you mean" in did_you_mean(name, names)
