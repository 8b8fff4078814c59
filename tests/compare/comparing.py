"""Small pieces the tests of comparisons share: a tiny model and files, and a budget of seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import byte_tokenizer, tiny_llama

CLASSES = ["sport", "business", "tech"]
WORDS = {"sport": "goal match team", "business": "bank profit shares", "tech": "chip phone code"}


def records(count: int, shift: int = 0) -> list[dict[str, str]]:
    """Classification records whose words tell the class."""
    made = []
    for i in range(count):
        label = CLASSES[i % 3]
        words = WORDS[label].split()
        made.append({"text": f"{words[(i + shift) % 3]} {words[(i // 3) % 3]}", "label": label})
    return made


def small_compare(folder: Path, **blocks: Any) -> dict[str, Any]:
    """The configuration of a comparison of two methods on a tiny model; blocks are merged, other values replaced."""
    model = folder / "model"
    if not model.exists():
        tiny_llama().save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
        for name, count, shift in (("train", 30, 0), ("valid", 9, 1), ("test", 12, 2)):
            lines = [json.dumps(record) for record in records(count, shift)]
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "valid", "test")}
    config: dict[str, Any] = {
        "model": {"name": str(model), "device": "cpu"},
        "data": {**files, "max_length": 128, "chat": True},
        "adapt": {"rank": 4},
        "methods": ["lora", "vera"],
        "train": {"batch_size": 4},
        "budget": {"trials": 3, "steps": 4, "seeds": 2},
        "tune": {"lr": {"low": 1e-3, "high": 1e-1}, "widen": 0},
        "output": str(folder / "out"),
    }
    for block, settings in blocks.items():
        old = config.get(block)
        config[block] = {**old, **settings} if isinstance(settings, dict) and isinstance(old, dict) else settings
    return config
