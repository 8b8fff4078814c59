"""The tasks and methods of auto_rate.py: what is trained on what, and which pairs a rule may be calibrated on.

The split was fixed before any held-out pair was run. Calibration has few methods and tasks; held out are other methods,
other lengths of a run, another batch, other models and other data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

METHODS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora-r4": {"delta": "lora", "rank": 4, "alpha": 4},
    "lora-r8": {"delta": "lora", "rank": 8, "alpha": 8},
    "lora-r8-a64": {"delta": "lora", "rank": 8, "alpha": 64},
    "lora-r16": {"delta": "lora", "rank": 16, "alpha": 32},
    "lora-r64": {"delta": "lora", "rank": 64, "alpha": 16},
    "pissa": {"delta": "lora", "rank": 8, "alpha": 8, "init": "pissa"},
    "olora": {"delta": "lora", "rank": 8, "alpha": 8, "init": "olora"},
    "dora": {"delta": "dora", "inner": {"delta": "lora", "rank": 8, "alpha": 16}},
    "vera": {"delta": "vera"},
    "lora-xs": {"delta": "lora-xs", "rank": 16, "alpha": 16},
    "bone": {"delta": "bone", "rank": 16},
    "shira": {"delta": "shira", "rank": 8},
    "randlora": {"delta": "randlora"},
}

CALIBRATE: dict[str, list[str]] = {
    "minilm": ["lora-r8", "lora-r8-a64", "pissa", "vera", "full"],
    "minilm-long": ["lora-r8", "full"],
    "tiny": ["lora-r8", "pissa", "vera", "full"],
    "smol-arithmetic": ["lora-r16"],
}
HELD_OUT: dict[str, list[str]] = {
    "minilm": ["lora-r4", "lora-r16", "lora-r64", "olora", "dora", "lora-xs", "bone", "shira", "randlora"],
    "minilm-long": ["lora-r16", "pissa", "vera", "dora"],
    "tiny": ["lora-r4", "lora-r64", "olora", "dora", "lora-xs", "bone", "shira", "randlora"],
    "tiny-long": ["lora-r8", "pissa", "dora", "bone", "full"],
    "tiny-new": ["full", "lora-r64"],
    "smol-arithmetic": ["pissa"],
    "smol-bbc": ["lora-r8"],
    "smol-stdlib": ["dora"],
}


@dataclass(frozen=True)
class Setting:
    """How long a run of a task is, and on how much it is measured."""

    steps: int
    batch: int
    length: int
    held_out: int


SETTINGS = {
    "minilm": Setting(24, 16, 32, 120),
    "minilm-long": Setting(96, 8, 32, 120),
    "tiny": Setting(24, 16, 64, 96),
    "tiny-long": Setting(96, 8, 64, 96),
    "tiny-new": Setting(48, 16, 64, 96),
    "smol-arithmetic": Setting(20, 4, 160, 12),
    "smol-bbc": Setting(20, 4, 40, 24),
    "smol-stdlib": Setting(20, 4, 40, 24),
}


@dataclass(frozen=True)
class Loaded:
    """A model with what it learns and what it is measured on, in tokens."""

    model: nn.Module
    examples: list[Any]
    held_out: list[Any]
    pad: int


@cache
def load(task: str) -> Loaded:
    """Return a task, loaded once."""
    setting = SETTINGS[task]
    count = min(4 * setting.batch * setting.steps, 1600)
    if task.startswith("tiny"):
        return _tiny(task, setting, count)
    import rankworks as rw
    from rankworks.train.prepare import Prepared
    from rankworks.train.sources import load_task

    name = {"smol-arithmetic": "arithmetic", "smol-stdlib": "python-stdlib"}.get(task, "bbc-news")
    data = load_task({"name": name, "max_length": setting.length})
    if task.startswith("minilm"):
        model, tokenizer = rw.load_model("minilm-l6", "float32", task="classification", labels=data.classes, seed=0)
    else:
        model, tokenizer = rw.load_model("smollm2-135m", "float32")
    prepared = Prepared(data, model, tokenizer, progress=False)
    test = prepared.examples((data.test or data.valid or [])[: setting.held_out], "test")
    return Loaded(model, prepared.examples(data.train[:count], "train"), test[: setting.held_out], prepared.pad)


def _tiny(task: str, setting: Setting, count: int) -> Loaded:
    """A llama of 0.5 M numbers on bytes, after 300 steps on source code, adapts to arithmetic; `new` has had none."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from rankworks.train.batching.batches import Example
    from rankworks.train.config import OptimConfig, TrainConfig
    from rankworks.train.loop import Loop
    from rankworks.train.sources import load_task

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()

    def code(records: list[dict[str, Any]], limit: int) -> list[Example]:
        """Pieces of a document's bytes."""
        width = setting.length
        pieces = [
            r["text"].encode()[i : i + width] for r in records for i in range(0, min(len(r["text"]), 4000), width)
        ]
        return [Example(tuple(p), tuple(p)) for p in pieces[:limit] if len(p) > 8]

    def sums(records: list[dict[str, Any]]) -> list[Example]:
        """The end of the question is read, the solution learned."""
        made = []
        for r in records:
            answer = r["completion"].encode()[: setting.length // 2]
            asked = r["prompt"].encode()[-(setting.length - len(answer)) :]
            made.append(Example(tuple(asked + answer), (*[-100] * len(asked), *answer)))
        return made

    stdlib = load_task({"name": "python-stdlib"})
    if task == "tiny-new":
        return Loaded(model, code(stdlib.train, count), code(stdlib.test or [], setting.held_out), 0)
    before = TrainConfig(steps=300, batch_size=16, seed=0, save_every=None)
    Loop(model, code(stdlib.train, 4800), before, OptimConfig(lr=3e-3), progress=False).run()
    arithmetic = load_task({"name": "arithmetic"})
    test = sums((arithmetic.test or [])[: setting.held_out])
    return Loaded(model, sums(arithmetic.train[:count]), test, 0)


def train_config(task: str) -> Any:
    """Return the `train:` block of a task's runs."""
    from rankworks.train.config import TrainConfig

    return TrainConfig(steps=SETTINGS[task].steps, batch_size=SETTINGS[task].batch, seed=0, save_every=None)


def held_out_loss(loaded: Loaded) -> float:
    """Return the mean loss on the held-out examples."""
    from rankworks.train.batching.batches import Collator
    from rankworks.train.losses.heads import evaluating
    from rankworks.train.losses.objective import Objective

    collator, objective = Collator(loaded.pad), Objective(loaded.model)
    batches = [collator.batch(loaded.held_out[i : i + 24]) for i in range(0, len(loaded.held_out), 24)]
    with evaluating(loaded.model), torch.no_grad():
        total = sum(float(objective.loss(batch)) for batch in batches)
    return total / sum(batch.learned for batch in batches)


@contextmanager
def adapted(loaded: Loaded, method: str) -> Iterator[nn.Module]:
    """The model ready to be trained by a method; afterwards it is what it was."""
    import rankworks as rw
    from rankworks.core.spec import AdaptSpec

    model, settings = loaded.model, METHODS[method]
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    try:
        if settings is None:
            model.requires_grad_(True)
        else:
            heads = [n for n, _ in model.named_children() if n in ("classifier", "score")]
            rw.adapt(model, AdaptSpec.from_flat({"seed": 0, "full": heads, **settings}))
        yield model
    finally:
        if settings is not None:
            rw.detach(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
                parameter.grad = None
                parameter.requires_grad_(flags[name])
        model.eval()


def pairs(which: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Return (task, method) of one side of the split."""
    return [(task, method) for task, names in which.items() for method in names]
