"""`rankworks plan`: what adapting a model costs, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from rankworks.cli.options import AsJson
from rankworks.cli.output import Output, facts, output, table


def plan(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SETTING=VALUE",
            help="Further settings of the method, e.g. init=pissa, or of the optimizer, e.g. optim.rank=256",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="A built-in shape, a folder with config.json or a hub id.", show_default=False
        ),
    ] = None,
    delta: Annotated[
        str, typer.Option("--delta", "-d", help="The method; none: no adapter, every weight is trained.")
    ] = "lora",
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Its rank.", show_default="the method's")] = None,
    targets: Annotated[
        str | None,
        typer.Option("--targets", "-t", help="Which weights, e.g. q_proj,v_proj.", show_default="all-linear"),
    ] = None,
    fits: Annotated[
        str | None, typer.Option(help="Memory to fit in, e.g. 24GB: say so, and the largest batch.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a micro-batch.")] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    dtype: Annotated[
        str | None, typer.Option(help="Base weights: float32, bfloat16, int8, nf4.", show_default="bfloat16")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit, sgd, galore, ...")] = "adamw",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="With gradient checkpointing.")] = False,
    layerwise: Annotated[bool, typer.Option("--layerwise", help="Step in the backward pass, free gradients.")] = False,
    every: Annotated[bool, typer.Option("--all", help="All methods side by side.")] = False,
    budget: Annotated[
        int | None, typer.Option(help="With --all: the rank that trains about so many parameters.", show_default=False)
    ] = None,
    shapes: Annotated[bool, typer.Option("--shapes", help="List the built-in shapes and leave.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count parameters and estimate memory, for any model and method.

    Examples:
      rankworks plan --model llama-2-7b --delta dora --rank 16 --fits 24GB
      rankworks plan --model llama-2-7b --all --targets q_proj,v_proj
      rankworks plan --model llama-2-7b --all --budget 20000000
      rankworks plan --model ./my-model --rank 64 init=pissa dropout=0.05
      rankworks plan --model llama-7b --delta none --optimizer galore \\
          optim.rank=1024 optim.rule=adamw8bit --layerwise --fits 24GB
      rankworks plan --shapes                           the built-in shapes

    No weights are loaded. Counts are exact: the adapter is really built, only
    without numbers. So are the bytes of weights, gradients, optimizer state
    and file; activations and the peak are estimated from a traced step.
    """
    from rankworks.core.errors import ConfigError
    from rankworks.plan import shape_names

    with output(as_json) as out:
        if shapes:
            out.show("\n".join(shape_names()))
            out.emit(shape_names())
            return
        if model is None:
            raise ConfigError(
                "say which model: --model llama-2-7b, a folder or a hub id; --shapes lists the built-in ones."
            )
        given = _settings(settings or [])
        steps = {"optimizer": optimizer, **given.pop("optim", {})}
        step = {
            "fits": fits, "batch_size": batch_size, "sequence": sequence, "dtype": dtype, "optimizer": steps,
            "gradient_checkpointing": checkpointing, "layerwise": layerwise,
        }  # fmt: skip
        given |= {name: value for name, value in (("rank", rank), ("targets", targets)) if value is not None}
        if budget is not None and not every:
            raise ConfigError("--budget compares methods: give --all with it.")
        if every:
            _compare(out, _known(model), budget, given, step)
        else:
            _one(out, _known(model), delta, given, step)


def _told(settings: Mapping[str, Any]) -> str:
    """Return settings in words, those of a method within a method in brackets."""
    words = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            words.append(f"{key} ({_told(value)})")
        else:
            words.append(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(words)


def _settings(texts: list[str]) -> dict[str, Any]:
    """Return the settings given as key=value, read as YAML."""
    from rankworks.train.config import override

    return override({}, texts)


def _known(model: str) -> str:
    """Return the folder of a sample model that has no built-in shape, else what was given."""
    from rankworks.core.hub import sample_models
    from rankworks.core.hub.shapes import find_shape

    if find_shape(model) is None:
        for sample in sample_models():
            if sample.name == model and sample.cached:
                return str(sample.folder())
    return model


def _one(out: Output, model: str, delta: str, given: dict[str, Any], step: dict[str, Any]) -> None:
    from rankworks.plan import format_bytes
    from rankworks.plan import plan as planned

    with out.waiting(f"planning {model} ..."):
        told = planned(model, delta, **given, **step)
    out.head(f"{told.model} ({told.dtype}), {told.what}")
    adapted = told.adapts
    rows = f"{told.batch_size} x {told.sequence} tokens" + (
        ", gradient checkpointing" if told.gradient_checkpointing else ""
    )
    of = f", {told.percent:.4g} % of {told.base_parameters + told.trainable_parameters:,}" if adapted else ""
    shown = {
        "settings": _told(told.settings),
        "trainable": f"{told.trainable_parameters:,} parameters{of}",
        "adapter file": format_bytes(told.adapter_bytes),
        "weights": format_bytes(told.weight_bytes),
        "adapter": f"{format_bytes(told.adapter_bytes + told.frozen_bytes)} in memory",
        "gradients": format_bytes(told.gradient_bytes) + ("  (one at a time)" if told.layerwise else ""),
        "optimizer": f"{format_bytes(told.optimizer_bytes)}  ({told.optimizer})",
        "activations": f"{format_bytes(told.activation_bytes)}  ({rows}; estimated)",
        "peak": f"{format_bytes(told.peak_bytes)}  (estimated)",
        "operations": f"{told.step_flops:.3g} per step",
    }
    if not adapted:
        shown = {name: text for name, text in shown.items() if name not in ("settings", "adapter file", "adapter")}
    if told.fit is not None:
        shown["verdict"] = str(told.fit)
    out.show(facts(shown))
    for note in told.notes:
        out.show(f"  note: {note}")
    out.emit(told.to_dict())


def _compare(out: Output, model: str, budget: int | None, given: dict[str, Any], step: dict[str, Any]) -> None:
    from rankworks.plan import compare, format_bytes

    told = compare(model, budget=budget, **given, **step)
    title = (
        f"{told.plans[0].model} ({told.plans[0].dtype}), {told.plans[0].targets}"
        if told.plans
        else f"{model}: no method fits"
    )
    out.head(title)
    names = ["method", "rank", "trainable", "%", "file", "optimizer", "activations", "peak"]
    fitting = any(p.fit for p in told.plans)
    listed = table(*names, *(["largest batch"] if fitting else []), right=" ".join(names[1:]) + " largest batch")
    for p in told.plans:
        inner = p.settings.get("inner")
        rank = p.settings.get("rank") or (inner.get("rank") if isinstance(inner, dict) else None)
        cells = [p.delta, str(rank or ""), f"{p.trainable_parameters:,}", f"{p.percent:.3g}"]
        cells += [format_bytes(b) for b in (p.adapter_bytes, p.optimizer_bytes, p.activation_bytes, p.peak_bytes)]
        listed.add_row(*cells, *([str(p.fit.largest_batch) if p.fit else ""] if fitting else []))
    out.show(listed)
    for key, reason in told.skipped.items():
        out.show(f"  {key} left out: {reason}")
    out.emit(told.to_dict())
