"""A tokenizer that reads text byte by byte: token i is byte i of the text's UTF-8, and token 256 ends a text.

It is made in memory, needs no model and loses nothing: `decode(ids)` is the text, whatever its language. Sequences are
several times as long as those of a trained vocabulary; the embedding and the head of a model are small. A saved model
has it beside it, as files that `AutoTokenizer` reads.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BYTES = "bytes"
"""Its name in configurations."""

END = "<|endoftext|>"
"""The token after a text; also the padding, which is never learned."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer, of 257 tokens."""
    inner = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(byte_letters())}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def byte_letters() -> list[str]:
    """Return the letter that stands for each byte in a byte-level vocabulary (GPT-2's): visible ones for themselves,
    the 68 others as the letters from 256 on, in their order.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + others.index(byte)) for byte in range(256)]
