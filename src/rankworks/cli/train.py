"""`rankworks train`: one run from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankworks.cli.options import AsJson, Folder, Overrides
from rankworks.cli.output import Output, command, complain, output, short

if TYPE_CHECKING:
    from rankworks.train.config import RunConfig
    from rankworks.train.result import RunResult


def train(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A YAML file, a recipe's name, or an earlier run's folder.")
    ],
    overrides: Overrides = None,
    folder: Folder = None,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on with the unfinished run the folder holds, or start over.")
    ] = True,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html at the end.")] = True,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model: measure it, adapt it, train, measure again, save.

    Examples:
      rankworks train smollm2-bbc-lora                  a recipe, by name
      rankworks train my.yaml optim.lr=1e-3 train.steps=100
      rankworks train my.yaml adapt.delta=dora -o runs/dora
      rankworks train my.yaml optim.lr=auto             the rate is measured
      rankworks train my.yaml adapt=none optim.name=galore    the whole model
      rankworks train my.yaml --json | tail -1          for a program

    Shown at the end: the measurement before and after, the model's answers
    before and after, what it cost, where the adapter lies, what to do next.

    The output folder then holds adapter/, config.yaml (every setting, also
    those left out), metrics.jsonl, result.json and report.html.

    A run that was stopped goes on from its last checkpoint when the same
    command is given again, and ends bit for bit as if it had not been.

    Several processes or GPUs:
      torchrun --nproc-per-node 2 -m rankworks train my.yaml

    --json ends standard output with before, after (accuracy where it is
    classification), trainable_parameters, adapter_bytes, tokens_per_second,
    peak_memory_bytes, adapter, and more.
    """
    launch(file, overrides or [], folder, resume=resume, report=report, as_json=as_json)


def launch(
    file: str,
    overrides: list[str],
    folder: Path | None,
    *,
    resume: bool = True,
    report: bool = True,
    as_json: bool = False,
) -> None:
    """Train from a file or a recipe, and show what came of it."""
    with output(as_json) as out:
        from rankworks.train.processes import leave

        told = conduct(out, file, overrides, folder, resume=resume, report=report)
        if told is not None:
            out.emit(told)
        leave()


def conduct(
    out: Output, file: str, overrides: list[str], folder: Path | None, *, resume: bool = True, report: bool = True
) -> dict[str, Any] | None:
    """Train and show what came of it; return what a program reads, None in a process that does not lead."""
    from rankworks.cli.recipes import find

    path = find(file)
    again = ["train", file, *overrides, *(["--output", str(folder)] if folder else [])]
    config = read(path, overrides, folder)
    _open(out, config, resume)
    try:
        result = _run(config, resume)
    except KeyboardInterrupt:
        _stopped(config, again)
        raise typer.Exit(130) from None
    if not _leads():
        return None
    from rankworks.cli.after import show_result, summary_line

    written = None
    if report and result.output:
        from rankworks.train.report import write_report

        written = write_report(result.output, command(*again))
    show_result(out, config, result, written)
    return summary_line(result, written)


def read(path: Path, overrides: list[str], folder: Path | None = None) -> RunConfig:
    """Return the whole configuration of a run, checked before anything is loaded; every problem is named at once."""
    from rankworks.core.errors import ConfigError
    from rankworks.core.spec import AdaptSpec
    from rankworks.train.config import load_config

    config = load_config(path, overrides)
    if config.adapt is not None:
        AdaptSpec.from_flat({"delta": "lora", **config.adapt}, f"{path}: adapt")
    missing = [block for block in ("model", "data") if getattr(config, block) is None]
    if missing:
        raise ConfigError(
            f"{path} has no {' and no '.join(missing)}, which a run needs, e.g. model: {{name: smollm2-135m}}."
        )
    if folder is not None:
        config.output = str(folder)
    elif config.output is None:
        config.output = f"runs/{path.stem}"
    return config


def _open(out: Output, config: RunConfig, resume: bool) -> None:
    """Say what is about to happen: loading takes seconds in which nothing else is seen."""
    from rankworks.train.api import unfinished
    from rankworks.train.report.words import headline

    latest = Path(str(config.output)) / "checkpoints" / "latest"
    again = resume and unfinished(config)
    step = f", going on after step {_step(latest)}" if again else ""
    searched = Path(str(config.output)) / "search" / "checkpoints" / "latest"
    if resume and not again and searched.is_file():
        step = f", going on with the search after its step {_step(searched)}"
    if _leads():
        out.show(
            f"{headline(config.model_dump(mode='json'))}; everything is written to {short(str(config.output))}{step}"
        )


def _step(latest: Path) -> int:
    """Return the step of the checkpoint that the file `latest` names."""
    return int(latest.read_text().strip().rpartition("-")[2])


def _run(config: RunConfig, resume: bool) -> RunResult:
    from rankworks.train import run

    return run(config, resume=resume)


def _leads() -> bool:
    """Whether this process is the one that speaks, of several."""
    from rankworks.train.processes import processes

    return processes().is_main_process


def _stopped(config: RunConfig, again: list[str]) -> None:
    """Say how to go on after Ctrl-C."""
    folder = Path(str(config.output))
    for whose, parent in (("The", folder), ("The search's", folder / "search")):
        latest = parent / "checkpoints" / "latest"
        if latest.is_file():
            kept = f"{whose} checkpoint of step {_step(latest)} is safe in {short(latest.parent)}"
            complain(f"stopped. {kept}; to go on from it:\n  {command(*again)}", "")
            return
    every = config.train.save_every
    kept = f"one is written every {every} steps" if every else "train.save_every is null, so none is written"
    complain(
        f"stopped before the first checkpoint ({kept}): the same command starts over. With train.save_every=20 a run "
        "that is stopped loses at most 20 steps.",
        "",
    )
