"""Write what follows from the registry and from results: pages of methods, tables and the README's picture.

    python docs/generate.py           write docs/methods/, the tables of README.md and of docs/, and the picture
    python docs/generate.py --check   exit 1 where a table is not what the registry or the results say, or the picture

mkdocs calls `on_pre_build`, so the site is never behind the code.
"""

from __future__ import annotations

import inspect
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from measured import with_tables  # noqa: E402 - it lies beside this file, which mkdocs runs as a hook

FEW = {"compare-minilm-bbc-8": "8 articles of each topic", "compare-minilm-bbc-64": "64 articles of each topic"}
"""The comparisons of the README's picture and what its panels are called."""
PICTURE = ROOT / "results" / "minilm-bbc.svg"
METHODS = "<!-- methods: made by docs/generate.py -->", "<!-- end of methods -->"
"""Where the table of methods begins and ends."""


def link(paper: str) -> str:
    """Return a Markdown link for an arXiv number, or the text as it is."""
    return f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})" if paper.startswith("arXiv:") else paper


def table(pages: str = "") -> str:
    """Return the table of all methods; `pages` is the path prefix of their pages ('' for no links)."""
    from rankworks import methods

    lines = ["| axis | key | method | year | paper | what it does |", "|---|---|---|---|---|---|"]
    for m in methods():
        key = f"[`{m.key}`]({pages}{page_name(m)})" if pages else f"`{m.key}`"
        lines.append(f"| {m.axis} | {key} | {m.title} | {m.year} | {link(m.paper)} | {m.summary} |")
    return "\n".join(lines)


def page_name(method: Any) -> str:
    """Return the file name of a method's page."""
    return f"{method.axis}-{method.key}.md"


def use(method: Any) -> str:
    """Return the line of Python that uses a method."""
    from rankworks.core.registry import get
    from rankworks.core.site import Shape

    if method.axis == "optimizer":
        return f'optimizer = rw.make_optimizer(model, "{method.key}", lr=2e-4)'
    if method.axis == "delta":
        return f'rw.adapt(model, "{method.key}")'
    if method.axis == "init":
        delta = "lora" if 2 in method.cls.fills else "lora-xs" if method.key == "lora-sb" else "nlora"
        settings = get("delta", delta).Spec()
        needs = method.cls.needs_at(method.Spec(), settings, Shape(64, 64))
        given = ", evidence=evidence" if needs else ""
        return f'rw.adapt(model, "{delta}", init="{method.key}"{given})'
    if getattr(method.cls, "searches", False):  # a run on data finds what to adapt
        return f'rw.train.run("run.yaml", ["adapt.select={method.key}"])'
    return f'rw.adapt(model, "lora", {method.tag}="{method.key}")'


def page(method: Any) -> str:
    """Return a method's page: its module's text, its settings, how to use it, what it promises."""
    text = inspect.getdoc(inspect.getmodule(method.cls)) or ""
    title, _, rest = text.partition("\n")
    lines = [f"# {method.title} (`{method.key}`)", "", title, ""]
    lines += [f"{method.axis}, {method.year}, {link(method.paper)}", "", "```text", rest.strip("\n"), "```", ""]
    lines += ["## Settings", "", "| setting | default | meaning |", "|---|---|---|"]
    for name, field in method.Spec.model_fields.items():
        if name != method.tag:
            default = getattr(field.default, "key", field.default)
            lines.append(f"| `{name}` | `{default!r}` | {field.description or ''} |")
    lines += ["", "## Use", "", "```python", "import rankworks as rw", "", use(method), "```", ""]
    if method.axis == "delta":
        kinds = ", ".join(method.cls.kinds)
        start = "unchanged, bit for bit" if method.cls.unchanged_at_init else "changed, by design"
        lines += [
            "## Facts the conformance suite checks",
            "",
            f"- takes sites of kind {kinds}",
            f"- {'adds to' if method.cls.additive else 'multiplies'} the weight; merging is exact",
            f"- the output at the start is {start}",
            "",
        ]
    return "\n".join(lines)


def write_pages(folder: Path) -> None:
    """Write the index and every method's page into `folder`."""
    from rankworks import methods

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.md").write_text(f"# Methods\n\n{table(pages='./')}\n")
    for method in methods():
        (folder / page_name(method)).write_text(page(method))


def between(text: str, marks: tuple[str, str], made: str) -> str:
    """Return a text with what was made between two marks."""
    head, rest = text.split(marks[0])
    tail = rest.split(marks[1])[1]
    return f"{head}{marks[0]}\n{made}\n{marks[1]}{tail}"


def readme_with_table(text: str) -> str:
    """Return the README with the registry's table."""
    return between(text, METHODS, table())


def few_shot_picture() -> str:
    """Return the README's picture: the methods on few articles and on more, side by side."""
    from rankworks.compare import CompareResult
    from rankworks.compare.report import picture

    results = [CompareResult.from_file(PICTURE.parent / name / "result.json") for name in FEW]
    return picture(results, list(FEW.values()))


def bring_results(folder: Path) -> None:
    """Copy what the pages link to of results and benchmarks, reports included, to where they look for it."""
    wanted = [*(ROOT / "results").glob("*.*"), *(ROOT / "results").glob("*/re*.*"), ROOT / "benchmarks" / "README.md"]
    for path in wanted:
        if path.suffix in (".md", ".svg", ".html"):
            there = folder / path.relative_to(ROOT)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, there)


def on_pre_build(config: Any) -> None:
    """Hook of mkdocs: write the pages before the site is built."""
    write_pages(Path(config["docs_dir"]) / "methods")
    bring_results(Path(config["docs_dir"]))


def main() -> int:
    """Write everything, or with --check compare what is committed."""
    readme = ROOT / "README.md"
    made = {readme: readme_with_table(readme.read_text()), PICTURE: few_shot_picture()}
    made |= {page: with_tables(page.read_text()) for page in sorted((ROOT / "docs").glob("*.md"))}
    if "--check" in sys.argv:
        behind = [str(path.relative_to(ROOT)) for path, text in made.items() if path.read_text() != text]
        if behind:
            print(f"{' and '.join(behind)}: behind the registry or the results; run `python docs/generate.py`.")
        return 1 if behind else 0
    for path, text in made.items():
        path.write_text(text)
    write_pages(ROOT / "docs" / "methods")
    return 0


if __name__ == "__main__":
    sys.exit(main())
