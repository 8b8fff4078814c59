"""Options that several commands have, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings that replace the file's, e.g. train.batch_size=4", show_default=False
    ),
]
Folder = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder for everything that is written.", show_default="runs/<name of FILE>"),
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON; the rest goes to stderr.")]
