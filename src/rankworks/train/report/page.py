"""The page of a run: what it reached, what it cost, how it went, and how to do it again."""

from __future__ import annotations

from html import escape
from pathlib import Path

import yaml

from rankworks.core.files import atomic_write
from rankworks.core.hub.byte_level import BYTES
from rankworks.train.report.charts import class_chart, loss_chart
from rankworks.train.report.gather import Evidence, gather, interval
from rankworks.train.report.pieces import answers, matrices, measures, shown, tiles
from rankworks.train.report.shell import code, document, figure, pairs, section
from rankworks.train.report.words import duration, headline, size
from rankworks.train.result import SHARES

NAME = "report.html"


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
    title, confusion, loss = headline(evidence.config), evidence.result.confusion, loss_chart(evidence)
    parts = [_header(evidence, title), section("What it cost", _cost(evidence))]
    if loss is not None:
        parts.append(section("Training", figure(loss, "Loss and learning rate of every step")))
    if confusion is not None:
        parts.append(section("Which class is taken for which", matrices(evidence.before, confusion)))
        classes = class_chart(evidence.before, confusion)
        parts.append(section("Accuracy of each class", figure(classes, "Accuracy of each class before and after")))
    elif len(evidence.result.after) > 1:
        parts.append(section("Measured", measures(evidence.result.before, evidence.result.after)))
    if evidence.result.examples:
        parts.append(section("Answers before and after", answers(evidence.result.examples, confusion is not None)))
    parts += [section("Run it again", _again(evidence, command)), section("Where it ran", pairs(evidence.environment))]
    return document(title, "".join(parts))


def _header(evidence: Evidence, title: str) -> str:
    name = evidence.headline
    before, after = evidence.result.before.get(name), evidence.result.after.get(name)
    if after is None or before is None:
        return f"<header><h1>{escape(title)}</h1></header>\n"
    note = ""
    if name in SHARES and (count := evidence.result.judged):
        (a, b), (c, d) = interval(before, count), interval(after, count)
        classes = ", in equal shares of their classes" if evidence.result.confusion else ""
        note = (
            f"95 % interval before: {100 * a:.1f} to {100 * b:.1f} %, after: {100 * c:.1f} to {100 * d:.1f} % "
            f"(Wilson). The same {count} records both times{classes}."
        )
    metric = escape(name.replace("_", " "))
    bytewise = name == "perplexity" and (evidence.config.get("model") or {}).get("tokenizer") == BYTES
    per = " of a byte" if bytewise else ""
    return (
        f"<header><h1>{escape(title)}</h1>\n"
        f'<div class="score"><b class="was">{shown(name, before)}</b><span class="arrow">&rarr;</span>'
        f'<b>{shown(name, after)}</b><span class="what">{metric}{per}, before and after</span></div>\n'
        f'<p class="soft small">{note}</p></header>\n'
    )


def _cost(evidence: Evidence) -> str:
    result, whole = evidence.result, evidence.config.get("adapt") is None
    share = 100 * result.trainable_parameters / max(result.total_parameters, 1)
    kept = {"optimizer's state": size(result.optimizer_bytes)}
    return tiles(
        {
            "trainable": f"{result.trainable_parameters:,}",
            **(kept if whole else {f"of {result.total_parameters:,}": f"{share:.3g} %"}),
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
    return code(lines) + '<p class="soft small">config.yaml, with every default written out:</p>' + code(config, "wide")
