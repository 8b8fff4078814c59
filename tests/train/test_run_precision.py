"""A run measures in the numbers it trains in; answers are generated in the weights' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from training import adapted, make_loop

import rankworks as rw
from rankworks.train.config import EvaluateConfig
from rankworks.train.measuring.measure import Evaluator
from rankworks.train.precision import Precision, autocast, resolved
from rankworks.train.prepare import Prepared
from rankworks.train.sources import Task
from rankworks.train.sources.template import Template
from tiny import byte_tokenizer, tiny_llama

COLOURS = ["red", "green"]


def task(kind: str) -> Task:
    if kind == "classification":
        records = [{"text": f"item {i}", "label": COLOURS[i % 2]} for i in range(6)]
        return Task(kind, records, records, "colours", classes=COLOURS, template=Template(classes=tuple(COLOURS)))
    records = [{"prompt": f"{i} + 1 =", "completion": str(i + 1)} for i in range(4)]
    return Task("completion", records, records, "sums")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("kind", ["classification", "completion"])
def test_measured_as_it_trains(kind: str, precision: Precision) -> None:
    model: Any = tiny_llama()
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}  # generating or not: types of the products

    def look(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        seen[generating].add(output.dtype)

    generating, generate = False, model.generate

    def generated(*args, **kwargs):
        nonlocal generating
        generating = True
        try:
            return generate(*args, **kwargs)
        finally:
            generating = False

    model.generate = generated
    model.get_submodule("model.layers.0.self_attn.q_proj").register_forward_hook(look)
    prepared = Prepared(task(kind), model, byte_tokenizer(), progress=False)
    config = EvaluateConfig(max_new_tokens=2, exact_match=kind == "completion")
    evaluator = Evaluator(prepared, prepared.task.test, config, precision=precision)
    seen[False].clear()  # what the model can do is tried in its own type
    evaluator.measure(model)
    assert (torch.bfloat16 if precision == "bf16" else torch.float32) in seen[False]
    assert seen[True] == ({torch.float32} if kind == "completion" else set())


@pytest.mark.parametrize(("able", "came_to"), [({"amx_bf16": True}, "bf16"), ({"avx512_f": True}, "float32")])
def test_auto_is_what_the_processor_multiplies(
    able: dict[str, bool], came_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    cpu = torch.device("cpu")
    assert resolved("auto", cpu) == came_to
    assert (resolved("bf16", cpu), resolved("float32", cpu)) == ("bf16", "float32")
    with autocast(cpu, "auto"):
        assert torch.is_autocast_enabled("cpu") == (came_to == "bf16")
    model, tokenizer = tiny_llama(), byte_tokenizer()
    config = {"train": {"steps": 1, "precision": "auto"}, "optim": {"lr": 1e-3}}
    rw.adapt(model, "lora", rank=2)
    assert rw.train(model, tokenizer, task("completion"), config).precision == came_to


def test_what_another_trainer_asked_of_accelerate_is_not_ours() -> None:
    """TRL's trainers ask for bf16 by default, and accelerate remembers that for the whole process."""
    model = adapted()
    seen: set[torch.dtype] = set()
    model.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(lambda *given: seen.add(given[2].dtype))
    AcceleratorState._reset_state()
    try:
        assert Accelerator(cpu=True, mixed_precision="bf16").native_amp
        make_loop(model, steps=2).run()
    finally:
        AcceleratorState._reset_state()
    assert seen == {torch.float32}


def test_float32_is_left_as_it_is() -> None:
    with autocast(tiny_llama(), "float32"):
        assert not torch.is_autocast_enabled("cpu")
    with autocast(torch.device("cpu"), "bf16"):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
