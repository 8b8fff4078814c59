"""What a person sees when a run is over: the result, answers before and after, the cost, and what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from rankworks.cli.output import Output, command, facts, short, table
from rankworks.core.select import in_words
from rankworks.train.rates.rate import MeasuredRate
from rankworks.train.report import interval
from rankworks.train.report.words import duration, headline, size
from rankworks.train.result import SHARES

if TYPE_CHECKING:
    from rankworks.train.config import RunConfig
    from rankworks.train.result import RunResult, Shown

SHOWN = 3
"""How many answers are shown; the report has the rest."""


def show_result(out: Output, config: RunConfig, result: RunResult, report: Path | None) -> None:
    """Print the end of a run."""
    out.head(headline(config.model_dump(mode="json")))
    out.show(measures(result))
    if result.examples:
        out.head("before and after")
        for shown in result.examples[:SHOWN]:
            _answer(out, shown, result)
    out.head("what it cost")
    share = 100 * result.trainable_parameters / max(result.total_parameters, 1)
    cost = {
        "trainable": f"{result.trainable_parameters:,} parameters, {share:.3g} % of {result.total_parameters:,}",
        "speed": f"{result.tokens_per_second:,.0f} tokens/s over {result.steps} steps in {duration(result.seconds)}",
        "peak memory": f"{size(result.peak_memory_bytes)}, {size(result.optimizer_bytes)} of it the optimizer's state",
    }
    if result.rate is not None:
        cost["learning rate"] = str(MeasuredRate(**result.rate))
    if result.chosen is not None:
        cost["chosen"] = in_words(result.chosen)
    if result.adapter:
        cost["adapter"] = f"{short(result.adapter)}  ({size(result.adapter_bytes)})"
    if result.model:
        cost["model"] = f"{short(result.model)}  ({size(result.model_bytes)})"
    if report is not None:
        cost["report"] = f"{short(report)}  (open it in a browser)"
    out.show(facts(cost))
    if result.adapter or result.model:
        out.head("try next")
        for line in next_commands(config, result):
            out.show("  " + line, soft_wrap=True)


def measures(result: RunResult):
    """Return the table of every metric before and after, with 95 % intervals where it is a share of records."""
    shown = table("", "before", "after", "95 % interval", right="before after")
    for name in result.after:
        before, after = result.before[name], result.after[name]
        if name in SHARES:
            between = ""
            if count := result.judged:
                (a, b), (c, d) = interval(before, count), interval(after, count)
                between = (
                    f"{100 * a:.0f} to {100 * b:.0f} %  ->  {100 * c:.0f} to {100 * d:.0f} %, on {count} test records"
                )
            shown.add_row(
                name.replace("_", " "),
                f"{100 * before:.1f} %",
                _better(f"{100 * after:.1f} %", after > before),
                between,
            )
        else:
            shown.add_row(name, f"{before:.4g}", _better(f"{after:.4g}", after < before), "")
    return shown


def next_commands(config: RunConfig, result: RunResult) -> list[str]:
    """Return three commands that work as they stand."""
    if config.adapt is None:
        return _after_whole(config, result)
    adapter, model = short(str(result.adapter)), config.model.name if config.model else ""
    folder = Path(short(str(result.output)))
    first = command("inspect", adapter, "--model", model)
    second = command("merge", adapter, "--model", model, "--output", folder / "merged")
    if config.adapt.get("delta", "lora") == "lora" and not config.adapt.get("select"):
        other = folder.with_name(f"{folder.name}-dora")
        return [first, second, command("train", folder, "adapt.delta=dora", "--output", other)]
    return [first, second, command("export", adapter, "--model", model, "--kind", "lora", "--output", folder / "lora")]


def _after_whole(config: RunConfig, result: RunResult) -> list[str]:
    """What to do with a model that was trained as a whole: adapt it, train it on, see what another optimizer needs."""
    folder, model = Path(short(str(result.output))), short(str(result.model))
    own = [f"model.name={model}", "model.start=pretrained", "model.tokenizer=null", "model.shape=null"]
    adapted = command("train", folder, *own, "adapt={delta: lora}", "--output", folder.with_name(f"{folder.name}-lora"))
    on = command("train", folder, *own, "--output", folder.with_name(f"{folder.name}-on"))
    return [adapted, on, command("plan", "--model", model, "--delta", "lora")]


def summary_line(result: RunResult, report: Path | None) -> dict[str, Any]:
    """Return what `--json` prints: the result without its lists, which are in the folder's result.json."""
    whole = result.to_dict()
    for key in ("losses", "valid", "examples", "confusion"):
        whole.pop(key)
    return {**whole, "report": str(report) if report else None}


def _answer(out: Output, shown: Shown, result: RunResult) -> None:
    """Print one record: its headline, and the answers."""
    headline = " ".join(shown.prompt.split("\n\n", 1)[0].split())
    out.show(Text(f"  {_cut(headline, 100)}", style="italic"))
    if result.confusion:
        line = Text(f"    is {shown.expected}; before: ")
        line.append(shown.before, style="green" if shown.before == shown.expected else "red")
        line.append(", after: ")
        line.append(shown.after, style="green" if shown.after == shown.expected else "red")
        out.show(line)
        return
    for name, text in (("expected", shown.expected), ("before", shown.before), ("after", shown.after)):
        out.show(f"    {name + ':':<9} {_cut(' '.join(text.split()), 100)}")


def _better(text: str, better: bool) -> Text:
    return Text(text, style="bold green" if better else "")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."
