"""Published model shapes by name, as configurations: enough to count and to plan, without a byte of weights.

A shape is transformers' own configuration class (`kind`) with the numbers that differ from its defaults, so a plan
sees the same module names as a real model. `parameters` is the published total of distinct weights; a test builds
every shape and compares. The LLaMA sizes of 60M to 1B are those of the low-rank pretraining literature (GaLore,
arXiv:2403.03507); their 7B is LLaMA-7B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankworks.core.errors import UnknownNameError, did_you_mean


@dataclass(frozen=True)
class ModelShape:
    """A named shape: transformers' model type, its settings, the task it is built for and its published size."""

    name: str
    kind: str
    task: str
    parameters: int
    hub: str | None
    settings: dict[str, Any]


_SHAPES: dict[str, ModelShape] = {}


def shape_names() -> list[str]:
    """Return the names of all built-in shapes."""
    return list(_SHAPES)


def find_shape(name: str) -> ModelShape | None:
    """Return the shape of that name or hub id, in any case and with `_` for `-`; None where there is none."""
    key = name.strip().lower().replace("_", "-")
    if key in _SHAPES:
        return _SHAPES[key]
    return next((s for s in _SHAPES.values() if s.hub is not None and s.hub.lower() == name.strip().lower()), None)


def get_shape(name: str) -> ModelShape:
    """Return the shape; raises `UnknownNameError` with near names."""
    shape = find_shape(name)
    if shape is None:
        raise UnknownNameError(f"no model shape is called {name!r}.{did_you_mean(name, _SHAPES)}")
    return shape


def _add(name: str, kind: str, task: str, parameters: int, hub: str | None, **settings: Any) -> None:
    _SHAPES[name] = ModelShape(name, kind, task, parameters, hub, settings)


def _llama(
    name: str,
    parameters: int,
    hub: str | None,
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    kv: int | None = None,
    vocab: int = 32000,
    kind: str = "llama",
    **settings: Any,
) -> None:
    """A decoder of LLaMA's form: gated MLP, rotary positions, no biases unless its family has them."""
    _add(
        name,
        kind,
        "causal-lm",
        parameters,
        hub,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv or heads,
        vocab_size=vocab,
        **settings,
    )


def _decoders() -> None:
    _llama("llama-60m", 58_073_600, None, 512, 1376, 8, 8, max_position_embeddings=1024)
    _llama("llama-130m", 134_105_856, None, 768, 2048, 12, 12, max_position_embeddings=1024)
    _llama("llama-350m", 367_969_280, None, 1024, 2736, 24, 16, max_position_embeddings=1024)
    _llama("llama-1b", 1_339_082_752, None, 2048, 5461, 24, 32, max_position_embeddings=1024)
    _llama("llama-7b", 6_738_415_616, "huggyllama/llama-7b", 4096, 11008, 32, 32)
    _llama("llama-13b", 13_015_864_320, "huggyllama/llama-13b", 5120, 13824, 40, 40)
    _llama("llama-30b", 32_528_943_616, "huggyllama/llama-30b", 6656, 17920, 60, 52)
    _llama("llama-65b", 65_285_660_672, "huggyllama/llama-65b", 8192, 22016, 80, 64)
    long: dict[str, Any] = {"max_position_embeddings": 4096}
    _llama("llama-2-7b", 6_738_415_616, "meta-llama/Llama-2-7b-hf", 4096, 11008, 32, 32, **long)
    _llama("llama-2-13b", 13_015_864_320, "meta-llama/Llama-2-13b-hf", 5120, 13824, 40, 40, **long)
    _llama("llama-2-70b", 68_976_648_192, "meta-llama/Llama-2-70b-hf", 8192, 28672, 80, 64, 8, **long)
    three: dict[str, Any] = {"vocab": 128256, "max_position_embeddings": 8192}
    _llama("llama-3-8b", 8_030_261_248, "meta-llama/Meta-Llama-3-8B", 4096, 14336, 32, 32, 8, **three)
    _llama("llama-3-70b", 70_553_706_496, "meta-llama/Meta-Llama-3-70B", 8192, 28672, 80, 64, 8, **three)
    three |= {"max_position_embeddings": 131072}
    _llama("llama-3.1-8b", 8_030_261_248, "meta-llama/Llama-3.1-8B", 4096, 14336, 32, 32, 8, **three)
    _llama("llama-3.1-70b", 70_553_706_496, "meta-llama/Llama-3.1-70B", 8192, 28672, 80, 64, 8, **three)
    three |= {"tie_word_embeddings": True}
    _llama("llama-3.2-1b", 1_235_814_400, "meta-llama/Llama-3.2-1B", 2048, 8192, 16, 32, 8, head_dim=64, **three)
    _llama("llama-3.2-3b", 3_212_749_824, "meta-llama/Llama-3.2-3B", 3072, 8192, 28, 24, 8, head_dim=128, **three)
    _llama(
        "mistral-7b", 7_241_732_096, "mistralai/Mistral-7B-v0.1", 4096, 14336, 32, 32, 8, kind="mistral",
        max_position_embeddings=32768, sliding_window=4096,
    )  # fmt: skip
    small: dict[str, Any] = {"vocab": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192}
    _llama("smollm2-135m", 134_515_008, "HuggingFaceTB/SmolLM2-135M", 576, 1536, 30, 9, 3, **small)
    _llama("smollm2-360m", 361_821_120, "HuggingFaceTB/SmolLM2-360M", 960, 2560, 32, 15, 5, **small)
    _llama("smollm2-1.7b", 1_711_376_384, "HuggingFaceTB/SmolLM2-1.7B", 2048, 8192, 24, 32, 32, **small)
    _llama(
        "gemma-7b", 8_537_680_896, "google/gemma-7b", 3072, 24576, 28, 16, 16, 256000, "gemma", head_dim=256,
        max_position_embeddings=8192,
    )  # fmt: skip
    _llama(
        "gemma3-270m", 268_098_176, "google/gemma-3-270m", 640, 2048, 18, 4, 1, 262144, "gemma3_text", head_dim=256,
        max_position_embeddings=32768, sliding_window=512,
    )  # fmt: skip
    for suffix, parameters, embd, layer, head in (
        ("", 124_439_808, 768, 12, 12),
        ("-medium", 354_823_168, 1024, 24, 16),
        ("-large", 774_030_080, 1280, 36, 20),
        ("-xl", 1_557_611_200, 1600, 48, 25),
    ):
        hub, width = f"openai-community/gpt2{suffix}", {"n_embd": embd, "n_layer": layer, "n_head": head}
        _add(f"gpt2{suffix}", "gpt2", "causal-lm", parameters, hub, **width)


def _qwen() -> None:
    rows = (
        ("0.5b", 494_032_768, 896, 4864, 24, 14, 2, 151936, True),
        ("1.5b", 1_543_714_304, 1536, 8960, 28, 12, 2, 151936, True),
        ("3b", 3_085_938_688, 2048, 11008, 36, 16, 2, 151936, True),
        ("7b", 7_615_616_512, 3584, 18944, 28, 28, 4, 152064, False),
        ("14b", 14_770_033_664, 5120, 13824, 48, 40, 8, 152064, False),
        ("32b", 32_763_876_352, 5120, 27648, 64, 40, 8, 152064, False),
        ("72b", 72_706_203_648, 8192, 29568, 80, 64, 8, 152064, False),
    )
    for size, parameters, hidden, mlp, layers, heads, kv, vocab, tied in rows:
        hub = f"Qwen/Qwen2.5-{size.upper()}"
        _llama(
            f"qwen2.5-{size}", parameters, hub, hidden, mlp, layers, heads, kv, vocab, "qwen2",
            tie_word_embeddings=tied, max_position_embeddings=32768,
        )  # fmt: skip
    for size, parameters, hidden, mlp in (("0.6b", 596_049_920, 1024, 3072), ("1.7b", 1_720_574_976, 2048, 6144)):
        hub = f"Qwen/Qwen3-{size.upper()}"
        _llama(
            f"qwen3-{size}", parameters, hub, hidden, mlp, 28, 16, 8, 151936, "qwen3", head_dim=128,
            tie_word_embeddings=True, max_position_embeddings=40960,
        )  # fmt: skip


def _encoder(
    name: str, kind: str, parameters: int, hub: str, hidden: int, layers: int, heads: int, **settings: Any
) -> None:
    """An encoder of BERT's form; the MLP is four times as wide as the hidden states."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    task = "image-classification" if kind == "vit" else "encoder"
    _add(name, kind, task, parameters, hub, intermediate_size=4 * hidden, **sizes, **settings)


def _encoders() -> None:
    roberta: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    _encoder("roberta-base", "roberta", 124_645_632, "FacebookAI/roberta-base", 768, 12, 12, **roberta)
    _encoder("roberta-large", "roberta", 355_359_744, "FacebookAI/roberta-large", 1024, 24, 16, **roberta)
    _encoder("bert-base", "bert", 109_482_240, "google-bert/bert-base-uncased", 768, 12, 12)
    _encoder("minilm-l6", "bert", 22_713_216, "sentence-transformers/all-MiniLM-L6-v2", 384, 6, 12)
    _encoder(
        "deberta-v3-base", "deberta-v2", 183_831_552, "microsoft/deberta-v3-base", 768, 12, 12, vocab_size=128100,
        type_vocab_size=0, relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type=["p2c", "c2p"], max_relative_positions=-1, position_biased_input=False,
    )  # fmt: skip
    _encoder("vit-b-16", "vit", 86_567_656, "google/vit-base-patch16-224", 768, 12, 12, num_labels=1000)
    _encoder("vit-l-16", "vit", 304_326_632, "google/vit-large-patch16-224", 1024, 24, 16, num_labels=1000)


_decoders()
_qwen()
_encoders()
