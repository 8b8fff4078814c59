"""The built-in shapes are the published models: sizes, names, and what a plan can do with each."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, MixtralConfig, RobertaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import rankworks as rw
from rankworks.core.errors import ConfigError, UnknownNameError
from rankworks.core.hub.shapes import find_shape, get_shape
from rankworks.plan import shape_names
from rankworks.plan.source import open_source


@pytest.mark.parametrize("name", shape_names())
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    source = open_source(name)
    assert source.parameters == get_shape(name).parameters
    assert source.weight_bytes >= 2 * source.parameters
    assert all(p.is_meta for p in source.model.parameters())


def test_the_sizes_everybody_quotes() -> None:
    quoted = {
        "llama-60m": 58_073_600,
        "llama-130m": 134_105_856,
        "llama-350m": 367_969_280,
        "llama-1b": 1_339_082_752,
        "llama-7b": 6_738_415_616,
        "llama-2-7b": 6_738_415_616,
        "llama-3-8b": 8_030_261_248,
        "llama-3.2-3b": 3_212_749_824,
        "mistral-7b": 7_241_732_096,
        "gpt2": 124_439_808,
        "roberta-base": 124_645_632,
        "smollm2-135m": 134_515_008,
        "minilm-l6": 22_713_216,
        "gemma3-270m": 268_098_176,
    }
    assert {name: get_shape(name).parameters for name in quoted} == quoted


@pytest.mark.parametrize("name", ["gpt2", "deberta-v3-base", "vit-b-16", "gemma3-270m", "qwen3-0.6b", "roberta-base"])
def test_a_step_of_every_family_is_traced_with_and_without_checkpointing(name: str) -> None:
    kept = rw.plan(name, "lora", sequence=32)
    again = rw.plan(name, "lora", sequence=32, gradient_checkpointing=True)
    assert not kept.notes
    assert not again.notes
    assert 0 < again.activation_bytes < kept.activation_bytes
    assert again.step_flops > 1.1 * kept.step_flops, "the layers run twice"


def test_names_are_forgiving_and_hub_ids_of_known_models_need_no_hub() -> None:
    shape = find_shape("Llama_2_7B")
    assert shape is not None
    assert shape.name == "llama-2-7b"
    assert open_source("meta-llama/Llama-3.2-1B").title == "llama-3.2-1b"
    assert find_shape("llama-5-1b") is None
    with pytest.raises(UnknownNameError, match="llama-2-7b"):
        get_shape("lama-2-7b")


def test_a_configuration_object_is_built_for_what_it_was_saved_for() -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert type(open_source(LlamaConfig(**tiny)).model).__name__ == "LlamaForCausalLM"
    assert type(open_source(RobertaConfig(**tiny)).model).__name__ == "RobertaModel"
    saved = RobertaConfig(**tiny, architectures=["RobertaForSequenceClassification"])
    assert type(open_source(saved).model).__name__ == "RobertaForSequenceClassification"
    told = rw.plan(LlamaConfig(**tiny), task="classification", sequence=8, full="score")
    assert told.trainable_parameters == 2 * 8 * (4 * 64 + 3 * 96) + 2 * 32
    with pytest.raises(ConfigError, match=r"unknown task 'casual-lm'.*causal-lm"):
        rw.plan(LlamaConfig(**tiny), task="casual-lm")
    assert "llama" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def test_a_mixture_of_experts_is_planned_expert_by_expert() -> None:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=128,
    )  # fmt: skip
    told = rw.plan(config, "lora", targets="down_proj", rank=2, sequence=16)
    assert told.sites == 2 * 4
    assert told.trainable_parameters == 2 * 4 * 2 * (32 + 64)
    assert not told.notes


def test_a_folder_and_what_is_not_one(tmp_path) -> None:
    LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4).save_pretrained(
        tmp_path
    )
    assert rw.plan(tmp_path, rank=1, sequence=8).trainable_parameters == 4 * 64 + 3 * 96
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        rw.plan(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        rw.plan(tmp_path)
    with pytest.raises(UnknownNameError, match=r"no-such-model"):
        rw.plan("no-such-model")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'llama-2-7b'"):
        rw.plan("llama2-7b")
