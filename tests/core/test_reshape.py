"""A shape with some of its settings replaced: what follows from them follows, and what makes no model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rankworks as rw
from rankworks.core.errors import ConfigError, UnknownNameError
from rankworks.train.config import load_config
from tiny import tiny_llama


def loaded(name: str | Path = "llama-60m", **shape: Any) -> Any:
    return rw.load_model(name, start="random", tokenizer="bytes", shape=shape)[0]


def test_settings_replace_those_of_a_shape() -> None:
    model = loaded(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    config, layer = model.config, model.model.layers[0]
    assert (len(model.model.layers), config.hidden_size, config.head_dim, config.num_key_value_heads) == (3, 64, 16, 4)
    assert layer.mlp.gate_proj.weight.shape == (96, 64)
    assert loaded().config.hidden_size == 512  # the shape itself is as it was


def test_what_followed_from_the_old_numbers_of_a_folder_follows_from_the_new(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)  # its config.json holds head_dim 8 of hidden size 32, and 2 key heads of 4
    config = loaded(tmp_path, hidden_size=64).config
    assert (config.head_dim, config.num_key_value_heads, config.num_attention_heads) == (16, 2, 4)
    assert loaded(tmp_path, hidden_size=64, head_dim=8).config.head_dim == 8


def test_both_names_of_a_setting_are_known() -> None:
    by_either = [loaded("gpt2", n_layer=1, **{name: 48}).config.n_embd for name in ("n_embd", "hidden_size")]
    assert by_either == [48, 48]


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"hidden_sise": 64}, "Did you mean 'hidden_size'"),
        ({"num_layers": 2}, "Did you mean 'num_hidden_layers'"),
        ({"vocab_size": 300}, "vocab_size is the tokenizer's"),
        ({"num_hidden_layers": 0}, r"at least 1 \(given: 0\)"),
        ({"hidden_size": 250, "num_attention_heads": 4}, r"hidden size \(250\) is not a multiple of .* heads \(4\)"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 24}, "hidden_size 24 makes no llama model"),  # 8 heads of 3 numbers, which cannot be turned
        ({"hidden_size": "wide"}, "expected int, got str"),
        ({"hidden_act": "silly"}, "'silly' is no known value"),
    ],
)
def test_what_makes_no_model_is_refused_in_one_paragraph(shape: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        loaded(**shape)
    assert str(error.value).startswith("model.shape: ")
    assert "\n" not in str(error.value)
    assert isinstance(error.value, UnknownNameError) == ("Did you mean" in says)


def test_only_new_weights_take_a_shape() -> None:
    with pytest.raises(ConfigError, match=r"start='random'"):
        rw.load_model("smollm2-135m", shape={"hidden_size": 64})
    for setting in ({"shape": {"hidden_size": 64}}, {"tokenizer": "bytes"}):
        with pytest.raises(ConfigError, match="start: random"):
            load_config({"model": {"name": "smollm2-135m", **setting}})


def test_the_seed_alone_decides_the_weights() -> None:
    state = torch.get_rng_state()
    one, same = (loaded(hidden_size=32, num_hidden_layers=1, num_attention_heads=2) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), same.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
