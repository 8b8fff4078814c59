"""A model with new random weights, to be trained from nothing: a published shape with the vocabulary of a tokenizer.

The shape is one of the built-in ones (`rankworks plan --shapes` lists them), a folder with a config.json or a hub id,
with some of its settings replaced where that is asked for (reshape.py). The weights are drawn as the architecture's own
code draws them, from a seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from rankworks.core.errors import ConfigError, UnknownNameError, did_you_mean
from rankworks.core.hub.reshape import reshaped
from rankworks.core.hub.shapes import find_shape, shape_names


def fresh_config(
    name: str, where: str | None, options: dict[str, Any], changes: Mapping[str, Any] | None = None
) -> PretrainedConfig:
    """Return the configuration of a built-in shape, or of what lies at `where`, with `changes` of its settings.

    Raises `UnknownNameError` or `ConfigError`.
    """
    shape = find_shape(name)
    if shape is None and where is None:
        raise UnknownNameError(f"no model shape is called {name!r}.{did_you_mean(name, shape_names())}")
    if shape is not None and shape.task != "causal-lm":
        raise ConfigError(f"{name} is a {shape.task} model: only language models are trained from random weights.")
    if shape is not None:
        config = AutoConfig.for_model(shape.kind, **shape.settings)
    else:
        config = AutoConfig.from_pretrained(str(where), **options)
    if not changes:
        return config
    settings = dict(shape.settings) if shape is not None else config.to_dict()
    settings.pop("model_type", None)
    return reshaped(config.model_type, settings, changes)


def fresh_model(config: PretrainedConfig, tokenizer: Any, dtype: Any, seed: int) -> Any:
    """Return the model, its vocabulary as large as the tokenizer's, with weights drawn from `seed`."""
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return model.to(kind) if kind is not None else model
