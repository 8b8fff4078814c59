"""The application: its commands, and what becomes of errors.

A `RankworksError` is one paragraph on standard error and exit status 2; stopping a run with Ctrl-C is status 130. Any
other exception is a bug of ours and shows its traceback.
"""

from __future__ import annotations

import logging
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rankworks.cli import check, compare, demo, export, inspect, merge, methods, plan, train
from rankworks.cli.output import complain
from rankworks.core.errors import RankworksError

STOPPED = 130
"""Exit status of a program that was stopped from the keyboard: 128 + SIGINT."""


class Commands(TyperGroup):
    """The group of commands, which turns what the user caused into a message and an exit status."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order in which a newcomer needs them."""
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what the user caused is told in a paragraph."""
        warnings.simplefilter("ignore", FutureWarning)  # libraries' words to programmers, not to those who run this
        warnings.simplefilter("ignore", DeprecationWarning)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels not used here
        try:
            return super().invoke(ctx)
        except RankworksError as error:
            complain(str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            complain("stopped.", "")
            raise typer.Exit(STOPPED) from None


app = typer.Typer(
    cls=Commands,
    name="rankworks",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        from rankworks import __version__

        typer.echo(f"rankworks {__version__}")
        raise typer.Exit


@app.callback()
def rankworks(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """One workbench for low-rank adaptation of models.

    Fine-tune a model with any method, see what it cost, hand over the result.
    To begin with:  rankworks demo

    Every command has a --help with examples. With --json, standard output
    ends in exactly one line of JSON, and what is meant for people goes to
    standard error. Bad input: one paragraph there, and exit status 2.
    """


app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("compare")(compare.compare)
app.command("methods")(methods.methods)
app.command("plan")(plan.plan)
app.command("check")(check.check)
app.command("inspect")(inspect.inspect)
app.command("merge")(merge.merge)
app.command("export")(export.export)
