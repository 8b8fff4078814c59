"""The page: one file with its styles, figures and the code that draws them inside. It asks the network for nothing."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import yaml

from rankworks.core.files import atomic_write
from rankworks.train.report.charts import class_chart, loss_chart
from rankworks.train.report.gather import SHARES, Evidence, gather, interval
from rankworks.train.report.pieces import answers, matrices, measures, shown, tiles
from rankworks.train.report.words import duration, size

NAME = "report.html"
FIGURE = {"displayModeBar": False, "responsive": True, "displaylogo": False}


def write_report(folder: str | Path, command: str | None = None) -> Path:
    """Write `report.html` into the folder of a finished run; return its path.

    command: how the run was started, where that is not `rankworks train <folder>/config.yaml`. Raises `StoreError`
    where the folder holds no finished run.
    """
    evidence = gather(folder)
    path = evidence.folder / NAME
    atomic_write(path, render(evidence, command))
    return path


def render(evidence: Evidence, command: str | None = None) -> str:
    """Return the page as text."""
    from plotly.offline import get_plotlyjs

    title, confusion, loss = headline(evidence), evidence.result.confusion, loss_chart(evidence)
    parts = [_header(evidence, title), _section("What it cost", _cost(evidence))]
    if loss is not None:
        parts.append(_section("Training", _figure(loss)))
    if confusion is not None:
        parts.append(_section("Which class is taken for which", matrices(evidence.before, confusion)))
        parts.append(_section("Accuracy of each class", _figure(class_chart(evidence.before, confusion))))
    elif len(evidence.result.after) > 1:
        parts.append(_section("Measured", measures(evidence.result.before, evidence.result.after)))
    if evidence.result.examples:
        parts.append(_section("Answers before and after", answers(evidence.result.examples, confusion is not None)))
    parts += [_section("Run it again", _again(evidence, command)), _section("Where it ran", _machine(evidence))]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_part('page.css')}</style>\n"
        f"<script>{get_plotlyjs()}</script>\n</head>\n"
        f"<body>\n<main>\n{''.join(parts)}</main>\n<script>\n{_part('page.js')}</script>\n</body>\n</html>\n"
    )


def headline(evidence: Evidence) -> str:
    """Return what was trained: `smollm2-135m on bbc-news with LoRA (rank 16)`."""
    from rankworks.core.registry import methods

    adapt, data = evidence.config.get("adapt"), evidence.config.get("data") or {}
    source = data.get("name") or data.get("path") or data.get("train") or "its data"
    model = (evidence.config.get("model") or {}).get("name", "a model")
    if adapt is None:
        return f"{model} on {source}, trained as a whole"
    key = str(adapt.get("delta", "lora"))
    title = next((m.title for m in methods("delta") if m.key == key), key)
    title += f" (rank {adapt['rank']})" if "rank" in adapt else ""
    init = adapt.get("init")
    title += f" from {init.get('init') if isinstance(init, dict) else init}" if init else ""
    return f"{model} on {source} with {title}"


def _header(evidence: Evidence, title: str) -> str:
    name = evidence.headline
    before, after = evidence.result.before.get(name), evidence.result.after.get(name)
    if after is None or before is None:
        return f"<header><h1>{escape(title)}</h1></header>\n"
    note = ""
    if name in SHARES and evidence.evaluated:
        (a, b), (c, d) = interval(before, evidence.evaluated), interval(after, evidence.evaluated)
        note = (
            f"95 % interval before: {100 * a:.1f} to {100 * b:.1f} %, after: {100 * c:.1f} to {100 * d:.1f} % "
            f"(Wilson). The same {evidence.evaluated} records both times, in equal shares of their classes."
        )
    metric = escape(name.replace("_", " "))
    return (
        f"<header><h1>{escape(title)}</h1>\n"
        f'<div class="score"><b class="was">{shown(name, before)}</b><span class="arrow">&rarr;</span>'
        f'<b>{shown(name, after)}</b><span class="what">{metric}, before and after</span></div>\n'
        f'<p class="soft small">{note}</p></header>\n'
    )


def _cost(evidence: Evidence) -> str:
    result = evidence.result
    share = 100 * result.trainable_parameters / max(result.total_parameters, 1)
    return tiles(
        {
            "trainable": f"{result.trainable_parameters:,}",
            f"of {result.total_parameters:,}": f"{share:.3g} %",
            "model file" if result.model else "adapter file": size(result.model_bytes or result.adapter_bytes),
            f"for {result.steps} steps": duration(result.seconds),
            "tokens per second": f"{result.tokens_per_second:,.0f}",
            "peak memory": size(result.peak_memory_bytes),
        }
    )


def _again(evidence: Evidence, command: str | None) -> str:
    config = yaml.safe_dump(evidence.config, sort_keys=False, allow_unicode=True)
    own = f"rankworks train {evidence.folder / 'config.yaml'}"
    lines = own if command in (None, own) else f"{command}\n{own}"
    return (
        f"<pre>{escape(lines)}</pre>\n"
        '<p class="soft small">config.yaml, with every default written out:</p>'
        f'<pre class="wide">{escape(config)}</pre>'
    )


def _machine(evidence: Evidence) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in evidence.environment.items())
    return f'<dl class="small">{rows}</dl>'


def _figure(figure: Any) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config=FIGURE)


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{inner}</section>\n"


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
