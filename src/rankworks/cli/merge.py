"""`rankworks merge`: fold an adapter into its base and write the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankworks.cli.export import write
from rankworks.cli.options import AsJson

Adapter = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="An adapter's folder (ours or PEFT's), or the folder of a run.")
]
Base = Annotated[
    str | None,
    typer.Option(help="The base: a sample name, a folder or a hub id. By default that of the run.", show_default=False),
]
Dtype = Annotated[
    str | None, typer.Option(help="Type of the written numbers: float32, bfloat16, float16.", show_default=False)
]


def merge(
    adapter: Adapter,
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder for the merged model.")],
    model: Base = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into its base and write the whole model.

    Examples:
      rankworks merge runs/smollm2-bbc-lora --output merged
      rankworks merge my-adapter --model ./my-base -o merged --dtype bfloat16

    The folder is one any transformers program loads. Before it takes its name
    the files are read back and their logits compared with those of base and
    adapter; the largest relative difference is shown and stored. Where they
    differ by more than rounding, nothing is written.
    """
    write(adapter, "merged", folder, model, as_json, dtype=dtype)
