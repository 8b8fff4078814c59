"""`rankworks export`: an adapter in the format another program reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rankworks.cli.options import AsJson
from rankworks.cli.output import Output, facts, output, short, table
from rankworks.core.errors import ExportError

WORST = 8
"""How many sites are listed where an export is approximate."""


def export(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder (ours or PEFT's), or the folder of a run.")
    ],
    target: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; a file name for gguf.")],
    kind: Annotated[str, typer.Option("--kind", "-k", help="peft, lora, merged or gguf.")] = "peft",
    model: Annotated[
        str | None,
        typer.Option(
            help="The base: a sample name, a folder or a hub id. By default that of the run.", show_default=False
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="lora, gguf: largest rank of any site.", show_default=False)] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="lora, gguf: share of each change's squared norm to keep, e.g. 0.99.", show_default=False),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the written numbers.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter for use elsewhere, and say how exact that is.

    Examples:
      rankworks export runs/bbc --kind peft -o bbc-peft       the same method
      rankworks export runs/bbc --kind lora -o bbc-lora       any as plain LoRA
      rankworks export runs/bbc --kind lora --energy 0.99 -o small
      rankworks export runs/bbc --kind gguf -o bbc.gguf       for llama.cpp
      rankworks export runs/bbc --kind merged -o bbc-merged   the whole model

    peft and lora are folders that PEFT and servers read. lora and gguf are
    exact where the change has exact factors; --rank or --energy approximate
    it, and the error of the sites is shown. What was written is read back and
    compared before it takes its name.
    """
    write(adapter, kind, target, model, as_json, rank=rank, energy=energy, dtype=dtype)


def write(adapter: Path, kind: str, target: Path, model: str | None, as_json: bool, **settings: Any) -> None:
    """Load base and adapter, export, and show the report."""
    from rankworks import load
    from rankworks.cli.base import load_base
    from rankworks.cli.folder import adapter_folder, read_folder
    from rankworks.core.errors import UnknownNameError, did_you_mean
    from rankworks.export.api import KINDS
    from rankworks.export.api import export as to

    if kind not in KINDS:
        raise UnknownNameError(f"no export kind is called {kind!r}.{did_you_mean(kind, KINDS)}")
    folder = adapter_folder(adapter)
    _keep(target, folder, "the adapter")
    read_folder(folder)  # whatever is wrong with it is said before a model is loaded
    with output(as_json) as out:
        base, tokenizer, name = load_base(folder, model)
        _keep(target, Path(name).expanduser(), "the base model")
        load(base, folder)
        given = {key: value for key, value in settings.items() if value is not None}
        if kind == "merged":
            given["tokenizer"] = tokenizer
        report = to(base, target, kind, **given)
        _show(out, report, name)
        out.emit({"model": name, **report.to_dict()})


def _keep(target: Path, kept: Path, what: str) -> None:
    """Raise where the export would take the place of what it is made from."""
    if kept.exists() and kept.resolve().is_relative_to(target.expanduser().resolve()):
        raise ExportError(f"{target} holds {what} itself and would be replaced: choose another place with --output.")


def _show(out: Output, report: Any, base: str) -> None:
    from rankworks.train.report.words import size

    out.head(f"{report.method} exported as {report.kind}")
    ranks = sorted({site.rank for site in report.sites if site.rank is not None})
    rows = {
        "written": f"{short(report.path)}  ({size(report.bytes)})",
        "base": base,
        "sites": f"{len(report.sites)}"
        + (f", rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[1:] else "") if ranks else ""),
        "exact": "yes"
        if report.exact
        else f"no: the largest error of a site is {100 * report.error:.3g} % of its change",
        "read back": f"largest relative difference {report.verified:.2g}",
    }
    out.show(facts(rows))
    if not report.exact:
        out.head("largest errors")
        listed = table("site", "rank", "error", "energy kept", right="rank error energy")
        for site in sorted(report.sites, key=lambda s: -s.error)[:WORST]:
            listed.add_row(site.site, str(site.rank or ""), f"{100 * site.error:.3g} %", f"{100 * site.energy:.4g} %")
        out.show(listed)
    for note in report.notes:
        out.show(f"  note: {note}")
