"""What the README and the documentation say is what the code does."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rankworks as rw
from rankworks.core.registry import unregister

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_readme_table_is_what_the_registry_says():
    generate = load(ROOT / "docs" / "generate.py")
    assert generate.readme_with_table(README) == README, "run `python docs/generate.py`"


def test_the_readme_s_picture_is_what_the_results_say() -> None:
    generate = load(ROOT / "docs" / "generate.py")
    name = generate.PICTURE.relative_to(generate.ROOT).as_posix()
    assert f"]({name})" in README
    assert generate.few_shot_picture() == generate.PICTURE.read_text(), "run `python docs/generate.py`"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_the_figures_of_a_page_are_those_that_were_measured(page: Path) -> None:
    text = page.read_text()
    assert load(ROOT / "docs" / "measured.py").with_tables(text) == text, "run `python docs/generate.py`"


def test_every_table_of_results_stands_somewhere() -> None:
    tables = load(ROOT / "docs" / "measured.py").TABLES
    asked = re.findall(r"<!-- table: (\S+),", "".join(page.read_text() for page in (ROOT / "docs").glob("*.md")))
    assert sorted(asked) == sorted(tables)


def test_a_page_is_made_for_every_method(tmp_path):
    load(ROOT / "docs" / "generate.py").write_pages(tmp_path)
    pages = {p.name for p in tmp_path.iterdir()}
    assert pages == {"index.md", *(f"{m.axis}-{m.key}.md" for m in rw.methods())}
    lora = (tmp_path / "delta-lora.md").read_text()
    assert "| `rank` | `8` | rank of the change |" in lora
    assert "y = W x + b + s (B A drop(x) + c)" in lora


def test_readme_method_is_the_example_and_is_under_sixty_lines():
    example = (ROOT / "examples" / "gain_lora.py").read_text()
    shown = next(b for b in blocks(README, "python") if "class GainLoRA" in b)
    assert shown in example
    assert len(example.splitlines()) < 60


def test_example_method_passes_the_conformance_suite():
    from rankworks.conformance import check_method

    try:
        report = check_method(load(ROOT / "examples" / "gain_lora.py").GainLoRA)
        assert report.ok, str(report)
    finally:
        unregister("delta", "gain-lora")


def test_every_verb_named_in_the_readme_exists():
    for name in set(re.findall(r"\brw\.(\w+)\(", README)):
        assert callable(getattr(rw, name)), name


@pytest.mark.slow
def test_readme_example_works_as_printed(tmp_path):
    code = next(b for b in blocks(README, "python") if "rw.load_model" in b)
    assert len(code.strip().splitlines()) <= 10
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (float(v) for v in re.findall(r"([\d.]+) -> ([\d.]+)", done.stdout)[-1])
    assert after > before + 0.2
    assert (tmp_path / "runs/readme/adapter/adapter.safetensors").exists()
    assert (tmp_path / "runs/readme/peft/adapter_config.json").exists()
