"""What arms do to each class: the share of its records that each gets right, all seeds together."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import mean

from rankworks.compare.report.curves import ordered
from rankworks.compare.result import ArmResult, CompareResult, RerunResult
from rankworks.train.report.gather import interval, per_class
from rankworks.train.report.pieces import matrix, shown
from rankworks.train.result import Confusion

WIDE = 14
"""Classes up to which a confusion matrix is readable."""


def pooled(reruns: Sequence[RerunResult]) -> Confusion | None:
    """Return the confusion of all seeds together."""
    found = [r.confusion for r in reruns if r.confusion is not None]
    if not found:
        return None
    size = range(len(found[0].classes))
    return Confusion(found[0].classes, [[sum(c.counts[i][j] for c in found) for j in size] for i in size])


def class_table(result: CompareResult, confidence: float) -> str:
    """Return arms by classes, and the confusion matrix of the arm that a reader chooses; "" without classes."""
    found = [(arm, confusion) for arm in ordered(result) if (confusion := pooled(arm.reruns)) is not None]
    if not found:
        return ""
    classes = found[0][1].classes
    shares = [right / total for _, c in found for right, total in per_class(c).values() if total]
    floor = min(shares)
    heads = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in classes)
    rows = "".join(_row(arm, confusion, floor, confidence) for arm, confusion in found)
    seeds = max(len(arm.reruns) for arm, _ in found)
    says = (
        f"Share of a class's test records that are right, in per cent, {seeds} seeds together; the darker the better "
        f"({100 * floor:.0f} to {100 * max(shares):.0f} %). Intervals are in the cells' tips."
    )
    table = (
        f'<div class="scroll"><table class="matrix classes" style="--columns: {len(classes)}"><thead><tr>'
        f'<th class="name"></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="soft small legend">{escape(says)}</p>'
    )
    return table + (_matrices(found) if len(classes) <= WIDE else "")


def _row(arm: ArmResult, confusion: Confusion, floor: float, confidence: float) -> str:
    cells = ""
    for name, (right, total) in per_class(confusion).items():
        if not total:
            cells += "<td></td>"
            continue
        share, (low, high) = right / total, interval(right / total, total, confidence)
        part = (share - floor) / (1 - floor) if floor < 1 else 1.0
        tip = f"{arm.label}, {name}: {right} of {total}; {100 * low:.1f} to {100 * high:.1f} %"
        ink = "; color: #fff" if part > 0.75 else ""
        cells += (
            f'<td style="background: rgba(var(--cell), {0.04 + 0.86 * part:.3f}){ink}" title="{escape(tip)}">'
            f"{100 * share:.0f}</td>"
        )
    return f'<tr><th scope="row">{escape(arm.label)}</th>{cells}</tr>'


def _matrices(found: Sequence[tuple[ArmResult, Confusion]]) -> str:
    """Return the confusion matrices of all arms, one seen at a time."""
    options = "".join(f"<option>{escape(arm.label)}</option>" for arm, _ in found)
    inner = "".join(
        f'<div class="scroll confusion" data-arm="{escape(arm.label)}"{" hidden" if i else ""}>{matrix(c)}</div>'
        for i, (arm, c) in enumerate(found)
    )
    return (
        '<h3>Which class is taken for which</h3><p class="small"><label>by '
        f'<select id="confused">{options}</select></label></p>{inner}'
        '<p class="soft small legend">A row is the right class, a column the answer; a cell counts records.</p>'
    )


def metric_table(result: CompareResult) -> str:
    """Return all metrics of all arms, means over the seeds; "" where there is only one metric, which is known."""
    found = {arm.label: [r.metrics for r in arm.reruns if r.metrics] for arm in ordered(result)}
    found = {label: metrics for label, metrics in found.items() if metrics}
    names = list(dict.fromkeys(name for metrics in found.values() for each in metrics for name in each))
    if len(names) < 2:
        return ""
    heads = "".join(f'<th class="number">{escape(name.replace("_", " "))}</th>' for name in names)
    rows = ""
    for label, metrics in found.items():
        values = {name: [m[name] for m in metrics if name in m] for name in names}
        cells = "".join(f'<td class="number">{shown(name, mean(v)) if v else ""}</td>' for name, v in values.items())
        rows += f"<tr><td>{escape(label)}</td>{cells}</tr>"
    head = f"<thead><tr><th>means over the seeds</th>{heads}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
