"""The tokenizer of bytes loses nothing, and a model that was saved with it brings it along."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.hub.byte_level import END, byte_letters, byte_tokenizer
from rankworks.train.whole import save_model

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def ids_of(text: str) -> list[int]:
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def test_the_letters_are_those_every_byte_level_vocabulary_has() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(byte_letters()) == sorted(ByteLevel.alphabet())
    for byte in range(128):
        assert ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(byte))[0][0] == byte_letters()[byte]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  a\tb \r\n\n",
        "don't , stop .",
        "naïve 价格 Ω 👩‍🚀 e\u0301 \ufeff\u200b\x00\x7f",
        "¡¢­ÿĀŁ",
        " \u00a0x\u2028y",
    ],
)
def test_tokens_are_the_bytes_of_the_text_and_give_it_back(text: str) -> None:
    ids = ids_of(text)
    assert ids == list(text.encode())
    assert byte_tokenizer().decode(ids) == text


def test_any_text_survives() -> None:
    draw = random.Random(0)
    planes = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    text = "".join(chr(draw.randint(*draw.choice(planes))) for _ in range(5000))
    assert set(ids_of(text)) >= set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}  # which UTF-8 never has
    assert byte_tokenizer().decode(ids_of(text)) == text


def test_every_byte_has_its_token_and_the_end_of_text_is_one_more() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.convert_ids_to_tokens(list(range(256))) == byte_letters()
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (257, 256, 256)
    ids = ids_of(f"a{END}b")
    assert ids == [97, 256, 98]
    assert tokenizer.decode(ids) == f"a{END}b"


def test_it_is_saved_with_a_model_and_read_back(tmp_path: Path) -> None:
    model, tokenizer = rw.load_model("llama-60m", start="random", tokenizer="bytes", shape=SHAPE)
    assert model.get_input_embeddings().weight.shape == (257, 32)
    assert model.config.eos_token_id == model.config.pad_token_id == 256
    save_model(model, tokenizer, tmp_path / "model")
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "def naïve():\n\treturn  '价' "
    assert again(text)["input_ids"] == list(text.encode())
    assert again.decode(again(text)["input_ids"]) == text
    assert (again.eos_token_id, again.pad_token_id, len(again)) == (256, 256, 257)
    _, own = rw.load_model(tmp_path / "model")
    assert own(text)["input_ids"] == list(text.encode())


def test_pretrained_weights_keep_their_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"start='random'"):
        rw.load_model("smollm2-135m", tokenizer="bytes")
