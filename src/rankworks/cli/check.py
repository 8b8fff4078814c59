"""`rankworks check`: the promises every method makes, tried on one."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from rankworks.cli.options import AsJson
from rankworks.cli.output import output, table


def check(
    key: Annotated[str | None, typer.Argument(help="A method's key, e.g. lora.", show_default=False)] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="FILE|MODULE[:CLASS]", help="Where a method of your own is defined.", show_default=False
        ),
    ] = None,
    axis: Annotated[
        str | None, typer.Option(help="The axis of KEY, where two have one of that name.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the conformance checks on a method, also on one of your own.

    Examples:
      rankworks check lora
      rankworks check --from my_method.py           runs the code of that file
      rankworks check --from my_package.mine:Mine
      rankworks check pissa --json                  ok, and a row per check

    Each check is a promise every method makes: the output is unchanged at the
    start, merged equals unmerged, loaded equals saved, the count equals its
    formula, gradients are right, a bad setting is refused with its remedy, ...

    Exit status 0 when all hold, 1 when one does not.
    """
    from rankworks import methods
    from rankworks.conformance import check_method, load_user_method
    from rankworks.core.errors import ConfigError, UnknownNameError, did_you_mean

    if source is not None:
        method = load_user_method(source)
        if key not in (None, method.key):
            raise ConfigError(f"{source} registers the key {method.key!r}, not {key!r}: leave the key out.")
    else:
        if key is None:
            raise ConfigError(
                "say which method to check, e.g. 'rankworks check lora', or give your own with --from FILE."
            )
        found = [m for m in methods() if m.key == key and axis in (None, m.axis)]
        if not found:
            raise UnknownNameError(f"no method is called {key!r}.{did_you_mean(key, [m.key for m in methods(axis)])}")
        method = found[0]
    with output(as_json) as out:
        with out.waiting(f"checking {method.title} ..."):
            report = check_method(method)
        out.head(f"{method.title}  ({method.axis}={method.key})")
        listed = table("check", "verdict", "seconds", "detail", right="seconds")
        for row in report.rows:
            style = {"fail": "red", "pass": "green"}.get(row.verdict, "dim")
            listed.add_row(row.check, Text(row.verdict, style), f"{row.seconds:.2f}", row.detail)
        out.show(listed)
        failed, held = report.failures(), [row for row in report.rows if row.verdict == "pass"]
        if failed:
            out.show(f"\n{len(failed)} of {len(report.rows)} checks fail: {', '.join(row.check for row in failed)}.")
        else:
            out.show(f"\nNo check fails: {len(held)} hold, {len(report.rows) - len(held)} do not apply.")
        out.emit(report.to_dict())
    if not report.ok:
        raise typer.Exit(1)
