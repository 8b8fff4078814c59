"""Small pieces the tests of the training room share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.adapt import adapt
from rankworks.train.batching.batches import Example
from rankworks.train.config import OptimConfig, TrainConfig
from rankworks.train.loop import Loop
from rankworks.train.losses.loss import IGNORE
from tiny import byte_tokenizer, tiny_llama

CLASSES = ["sport", "business", "tech"]
WORDS = {"sport": "goal match team", "business": "bank profit shares", "tech": "chip phone code"}


def make_examples(count: int = 24, seed: int = 0) -> list[Example]:
    """Random examples of 5 to 29 tokens whose last three are learned."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(5, 30, (1,), generator=generator))
        ids = tuple(torch.randint(3, 250, (length,), generator=generator).tolist())
        made.append(Example(ids, (*[IGNORE] * (length - 3), *ids[-3:])))
    return made


def adapted(**config: Any) -> nn.Module:
    """A tiny Llama with LoRA."""
    return adapt(tiny_llama(**config), "lora", rank=4, seed=1)


def make_loop(model: nn.Module | None = None, folder: Path | None = None, **settings: Any) -> Loop:
    """A loop of six steps of eight examples, with settings of `TrainConfig` and (lr, clip, ...) of `OptimConfig`."""
    optim = {k: settings.pop(k) for k in list(settings) if k in OptimConfig.model_fields}
    keywords = {k: settings.pop(k) for k in ("hooks", "evaluate") if k in settings}
    train = TrainConfig(**{"steps": 6, "batch_size": 8, **settings})
    model = adapted() if model is None else model
    return Loop(
        model, make_examples(), train, OptimConfig(**{"lr": 1e-2, **optim}), folder=folder, progress=False, **keywords
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, copied."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def records(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Classification records whose words tell the class."""
    generator = random.Random(seed)
    made = []
    for i in range(count):
        label = CLASSES[i % 3]
        words = generator.choices(WORDS[label].split(), k=2)
        made.append({"text": " ".join(words), "label": label})
    return made


def small_run(folder: Path, **blocks: Any) -> dict[str, Any]:
    """The configuration of a run on a tiny model and classification files, both written to `folder` if not there."""
    model = folder / "model"
    if not model.exists():
        tiny_llama().save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
        for name, count, seed in (("train", 30, 0), ("test", 12, 1)):
            lines = [json.dumps(record) for record in records(count, seed)]
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
    config: dict[str, Any] = {
        "model": {"name": str(model), "device": "cpu"},
        "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "max_length": 128},
        "adapt": {"delta": "lora", "rank": 4},
        "optim": {"lr": 1e-2},
        "train": {"steps": 6, "batch_size": 4, "save_every": 2},
        "output": str(folder / "run"),
    }
    for block, settings in blocks.items():
        config[block] = {**config.get(block, {}), **settings} if isinstance(settings, dict) else settings
    return config
