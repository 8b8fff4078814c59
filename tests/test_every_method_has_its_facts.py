"""Every registered method, on every axis, has a file of facts under its own name that speaks of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rankworks.core.registry import Method, methods

HERE = Path(__file__).resolve().parent
OURS = [m for m in methods() if m.origin.startswith("rankworks.")]


def names(method: Method) -> set[str]:
    """What a method's file may be called: by its key, or by its module, which two methods may share."""
    return {method.key.replace("-", "_"), method.cls.__module__.rpartition(".")[2]}


NAMES = {name for method in OURS for name in names(method)}


def owner(path: Path) -> str:
    """The longest name that a file begins with: `test_lora_xs.py` is not lora's."""
    stem = path.stem.removeprefix("test_")
    return max((name for name in NAMES if f"{stem}_".startswith(f"{name}_")), key=len, default="")


@pytest.mark.parametrize("method", OURS, ids=lambda m: f"{m.axis}-{m.key}")
def test_it_has_a_file_of_its_name_that_speaks_of_it(method: Method) -> None:
    folder = HERE / ("optim" if method.axis == "optimizer" else "methods")
    found = [path for path in sorted(folder.glob("test_*.py")) if owner(path) in names(method)]
    assert any(path.stem.removeprefix("test_") in names(method) for path in found), f"{method.key} has no file"
    text = "\n".join(path.read_text(encoding="utf-8") for path in found)
    assert re.search(rf'"{re.escape(method.key)}"|\b{method.cls.__name__}\b', text), found
    assert text.count("\ndef test_") >= 3, found


def test_a_file_belongs_to_the_longest_name() -> None:
    files = {"lora": "test_lora_bias.py", "lora_xs": "test_lora_xs.py", "lora_squeeze": "test_lora_squeeze_stages.py"}
    assert {name: owner(Path(file)) for name, file in files.items()} == {name: name for name in files}
