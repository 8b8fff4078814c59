"""`rankworks inspect`: what an adapter is, from its folder alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rankworks.cli.options import AsJson
from rankworks.cli.output import Output, facts, output, short, table

TAGGED = ("delta", "init", "ranks", "select")
"""The settings that name a method within its own settings."""

FEW = 14
"""How many sites are listed without --all."""


def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter's folder (ours or PEFT's), or the folder of a run.")],
    model: Annotated[
        str | None, typer.Option(help="Its base: also show how much each weight changes.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help=f"List every site, not only {FEW}.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show an adapter: method, settings, base, and its tensors per site.

    Examples:
      rankworks inspect runs/smollm2-bbc-lora/adapter
      rankworks inspect runs/smollm2-bbc-lora --model smollm2-135m
      rankworks inspect some-peft-adapter --json

    Without --model no model is loaded: everything is read from the folder.
    With it, the norm of each weight's change is shown too, alone and as a
    share of the weight's own. Nothing in the folder is ever executed.
    """
    from rankworks.cli.folder import read_folder

    folder = read_folder(path)
    with output(as_json) as out:
        changes = _changes(folder.path, model) if model is not None else None
        _show(out, folder, changes, everything)
        described = asdict(folder)
        for site, shown in zip(folder.sites, described["sites"], strict=True):
            shown |= {"numbers": site.numbers, "bytes": site.bytes}
            if changes is not None and site.site in changes["by_site"]:
                shown |= changes["by_site"][site.site]
        if changes is not None:
            described |= {"trainable": changes["trainable"], "total": changes["total"]}
        out.emit(described)


def _show(out: Output, folder: Any, changes: dict[str, Any] | None, everything: bool) -> None:
    from rankworks.cli.base import made_with
    from rankworks.train.report.words import size

    ranks = folder.settings.get("ranks")
    schedule = f" with {ranks['ranks']}" if isinstance(ranks, dict) else ""
    out.head(f"{folder.method} adapter{schedule}, written by {folder.written_by}")
    known = made_with(folder.path)
    rows = {
        "folder": short(folder.path),
        "base": known.get("name") or known.get("recorded") or "not recorded",
        "settings": ", ".join(f"{key} {_brief(value)}" for key, value in folder.settings.items()),
        "sites": f"{len(folder.sites)}" + (f", and {len(folder.full)} modules in full" if folder.full else ""),
        "parameters": f"{folder.parameters:,} trained",
        "file": size(folder.bytes),
    }
    if changes is not None:
        rows["parameters"] += f", {100 * changes['trainable'] / max(changes['total'], 1):.3g} % of {changes['total']:,}"
    out.show(facts(rows))
    out.show()
    headings = ["site", "weight", "rank", "numbers", "tensors (norm)"]
    listed = table(*headings, *(["|change|", "of |weight|"] if changes else []), right="weight rank numbers |change|")
    both = [*folder.sites, *folder.full]
    shown = both if everything or len(both) <= FEW else both[:FEW]
    for site in shown:
        tensors = "  ".join(f"{t.name} {' x '.join(map(str, t.shape))} ({t.norm:.3g})" for t in site.tensors)
        shape = " x ".join(map(str, site.shape)) if site.shape else "in full" if site in folder.full else ""
        cells = [site.site, shape, str(site.rank or ""), f"{site.numbers:,}", tensors]
        if changes:
            row = changes["by_site"].get(site.site)
            cells += [f"{row['change']:.3g}", f"{100 * row['relative']:.2g} %"] if row else ["", ""]
        listed.add_row(*cells)
    out.show(listed)
    if len(shown) < len(both):
        out.show(f"... and {len(both) - len(shown)} more: --all lists them.")


def _changes(adapter: Path, name: str) -> dict[str, Any]:
    """Load base and adapter; return the norm of every site's change, and the totals."""
    from rankworks import load, summary
    from rankworks.cli.base import load_base

    model, _, _ = load_base(adapter, name)
    load(model, adapter)
    told = summary(model)
    return {
        "by_site": {row.site: {"kind": row.kind, "change": row.change, "relative": row.relative} for row in told.rows},
        "trainable": told.trainable,
        "total": told.total,
    }


def _brief(value: Any) -> str:
    """Return a setting in few words."""
    from rankworks.core.select import in_words

    if isinstance(value, dict):
        name = next((str(value[k]) for k in TAGGED if k in value), "")
        rest = [f"{k} {in_words(v) if k == 'chosen' else _brief(v)}" for k, v in value.items() if k not in TAGGED]
        return f"{name} ({', '.join(rest)})" if rest and name else name or ", ".join(rest)
    if isinstance(value, list):
        shown = ", ".join(_brief(v) for v in value[:6])
        return f"[{shown}{', ...' if len(value) > 6 else ''}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
