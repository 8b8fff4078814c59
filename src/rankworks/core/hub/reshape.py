"""Another size of a known shape: settings of its configuration replaced, for a model of new weights.

A name that the configuration has not, or numbers that make no model, are refused before any weight is drawn: the model
is built once without numbers and called on two tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from rankworks.core.errors import ConfigError, UnknownNameError, did_you_mean

OF_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""Settings that follow from the tokenizer."""

DERIVED = ("head_dim", "num_key_value_heads")
"""Settings that a configuration file holds although they may follow from others."""


def reshaped(kind: str, settings: Mapping[str, Any], changes: Mapping[str, Any]) -> PretrainedConfig:
    """Return the configuration of transformers' model type `kind` with `changes` of its `settings`.

    What followed from the old numbers (`DERIVED`) follows from the new ones. Raises `UnknownNameError` for a name that
    is no setting, `ConfigError` for numbers that make no model.
    """
    old = AutoConfig.for_model(kind, **settings)
    aliases: dict[str, str] = old.attribute_map
    _check_names(old, changes)
    changes = {aliases.get(name, name): value for name, value in changes.items()}
    _check_numbers(old, changes)
    kept = {name: value for name, value in settings.items() if name in changes or not _derived(kind, settings, name)}
    try:
        config = AutoConfig.for_model(kind, **{**kept, **changes})
        _try(config)
    except (ValueError, TypeError, KeyError, RuntimeError, ArithmeticError, StrictDataclassError) as error:
        raise ConfigError(f"model.shape: {_told(changes)} makes no {kind} model: {_reason(error)}") from None
    return config


def _check_names(config: PretrainedConfig, changes: Mapping[str, Any]) -> None:
    of_all = set(PretrainedConfig().to_dict()) - {"tie_word_embeddings"}
    known = {*config.to_dict(), *config.attribute_map} - of_all - {"model_type", *OF_THE_TOKENIZER}
    for name in changes:
        if name in OF_THE_TOKENIZER:
            raise ConfigError(f"model.shape: {name} is the tokenizer's: leave it out, or choose another tokenizer.")
        if name not in known:
            raise UnknownNameError(
                f"model.shape: {config.model_type} models have no setting {name!r}.{did_you_mean(name, known)}"
            )


def _check_numbers(old: PretrainedConfig, changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        before = getattr(old, name, None)
        counts = isinstance(before, int) and not isinstance(before, bool) and before > 0
        if counts and isinstance(value, int) and value < 1:
            raise ConfigError(f"model.shape: {name} must be at least 1 (given: {value}).")


def _derived(kind: str, settings: Mapping[str, Any], name: str) -> bool:
    """Say whether a setting has the value it would have if it were not given."""
    if name not in DERIVED:
        return False
    without = AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if k != name})
    return getattr(without, name, None) == settings[name]


@torch.no_grad()
def _try(config: PretrainedConfig) -> None:
    """Build the model on the meta device and call it. Raises what that raises, and `ValueError` for its heads."""
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if groups and heads % groups:  # the call below would not see it
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        try:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long))
        except NotImplementedError:  # an operation that needs numbers, as routing to experts does
            return
        except RuntimeError as error:
            if "meta" not in str(error):
                raise


def _reason(error: Exception) -> str:
    """Return the sentence in a library's message, which may come wrapped in the names of its checks."""
    if isinstance(error, KeyError):
        return f"{error} is no known value."
    text = " ".join(str(error).split())[:300]
    return text.rpartition("Error: ")[2].rstrip(".") + "."


def _told(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in changes.items())
