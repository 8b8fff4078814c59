"""report.html: what it tells is what the run's folder holds, and it needs nothing but itself."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy.stats import binomtest

from rankworks.core.errors import StoreError
from rankworks.train import Confusion, RunResult, Shown
from rankworks.train.report import gather, interval, write_report
from rankworks.train.report.charts import loss_chart, smoothed
from rankworks.train.report.gather import per_class
from rankworks.train.report.words import method

CLASSES = ["sport", "a <b>bold</b> class"]
CONFIG = {
    "model": {"name": "some-model"},
    "data": {"name": "some-data"},
    "adapt": {"delta": "lora", "rank": 7, "init": "pissa"},
    "output": "runs/x",
}


def finished_run(folder: Path, steps: int = 30, **changes: Any) -> RunResult:
    """Write the folder of a run that looks finished."""
    result = RunResult(
        before={"accuracy": 0.25},
        after={"accuracy": 0.75},
        trainable_parameters=1234567,
        total_parameters=98765432,
        adapter_bytes=4_900_000,
        tokens_per_second=321.0,
        peak_memory_bytes=1_500_000_000,
        adapter=str(folder / "adapter"),
        steps=steps,
        seconds=200.0,
        examples=[Shown("A headline\n\n</script><script>alert(1)</script>", "sport", "sport", CLASSES[1])],
        confusion=Confusion(CLASSES, [[3, 1], [1, 3]]),
        output=str(folder),
        judged=8,
    )
    for name, value in changes.items():
        setattr(result, name, value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result.to_dict()))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    before = {"metrics": result.before, "answers": [], "confusion": {"classes": CLASSES, "counts": [[2, 2], [4, 0]]}}
    (folder / "before.json").write_text(json.dumps(before))
    rows = [{"step": i, "loss": 1 / i, "lr": 1e-3} for i in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return result


class Page(HTMLParser):
    """What a browser would fetch, and the text outside scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.scripts = 0
        self._hidden = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note addresses."""
        self._hidden = tag in ("script", "style")
        self.scripts += tag == "script"
        self.fetched += [str(v) for k, v in attrs if k in ("src", "href", "action", "poster", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        """Text goes on."""
        self._hidden = False

    def handle_data(self, data: str) -> None:
        """Keep text."""
        if not self._hidden:
            self.text.append(data)


def test_it_tells_the_numbers_of_the_run(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    path = write_report(tmp_path / "run", "rankworks train mine.yaml")
    text = " ".join(Page(path.read_text()).text)
    for part in (
        "some-model on some-data with LoRA (rank 7) from pissa", "25.0 %", "75.0 %", "1,234,567", "1.25 %", "4.9 MB",
        "3 min 20 s", "321", "1.5 GB", "A headline", "delta: lora", "rankworks train mine.yaml",
        f"rankworks train {tmp_path / 'run' / 'config.yaml'}",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("adapt", "words"),
    [
        ({"delta": "dora"}, "DoRA"),
        ({"delta": {"delta": "vera", "rank": 64}, "rank": 8}, "VeRA (rank 8)"),
        ({"rank": 4, "init": {"init": "pissa", "iterations": 4}}, "LoRA (rank 4) from pissa"),
        ({"ranks": {"ranks": "adalora", "target": 2}, "select": "layra"}, "LoRA, ranks by adalora, sites by layra"),
        ({"delta": "mine", "init": None}, "mine"),
    ],
)
def test_a_method_in_words(adapt: dict[str, Any], words: str) -> None:
    assert method(adapt) == words


def test_it_asks_the_network_for_nothing_and_runs_nothing_from_the_data(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    source = write_report(tmp_path / "run").read_text()
    page = Page(source)
    assert page.fetched == []
    assert "@import" not in source.split("</style>")[0]
    assert not re.search(r"url\(", source.split("</style>")[0])
    assert "<script>alert(1)" not in source
    assert "<b>bold</b>" not in source
    scripts = page.scripts
    finished_run(tmp_path / "plain", examples=[])
    assert Page(write_report(tmp_path / "plain").read_text()).scripts == scripts


def test_the_interval_is_wilson_s() -> None:
    low, high = interval(0.75, 8)
    assert (low, high) == tuple(binomtest(6, 8).proportion_ci(method="wilson"))
    assert low < 0.75 < high
    centre, half = (0.75 + 1.959964**2 / 16) / (1 + 1.959964**2 / 8), (high - low) / 2
    assert (low + high) / 2 == pytest.approx(centre, abs=1e-6)
    assert half == pytest.approx(
        1.959964 / (1 + 1.959964**2 / 8) * (0.75 * 0.25 / 8 + 1.959964**2 / (4 * 64)) ** 0.5, abs=1e-6
    )


def test_smoothing_keeps_a_straight_line_and_the_length() -> None:
    line = [3.0 - 0.1 * i for i in range(20)]
    assert smoothed(line, 2)[2:-2] == pytest.approx(line[2:-2])
    assert smoothed([5.0], 3) == [5.0]
    assert len(smoothed(line, 4)) == len(line)


def test_accuracy_by_class_counts_rows() -> None:
    assert per_class(Confusion(["a", "b"], [[3, 1], [0, 0]])) == {"a": (3, 4), "b": (0, 0)}


def test_the_loss_chart_shows_every_step_and_the_rate(tmp_path: Path) -> None:
    finished_run(tmp_path / "run", steps=30)
    chart = loss_chart(gather(tmp_path / "run"))
    assert chart is not None
    traces = {trace.name: trace for trace in chart.data}
    assert len(traces["loss of the step"].y) == 30
    assert list(traces["learning rate"].y) == [1e-3] * 30


@pytest.mark.parametrize("lost", ["before.json", "metrics.jsonl"])
def test_a_folder_that_lost_a_part_still_has_a_report(tmp_path: Path, lost: str) -> None:
    finished_run(tmp_path / "run")
    (tmp_path / "run" / lost).unlink()
    text = " ".join(Page(write_report(tmp_path / "run").read_text()).text)
    assert "75.0 %" in text
    assert ("Training" in text) == (lost != "metrics.jsonl")


def test_a_metrics_file_that_was_cut_off_is_read_to_the_cut(tmp_path: Path) -> None:
    finished_run(tmp_path / "run", steps=5)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-10])
    assert [row["step"] for row in gather(tmp_path / "run").steps] == [1, 2, 3, 4]


def test_metrics_without_classes_are_a_table(tmp_path: Path) -> None:
    finished_run(
        tmp_path / "run",
        before={"exact_match": 0.1, "perplexity": 20.0},
        after={"exact_match": 0.6, "perplexity": 3.25},
        confusion=None,
        judged=10,
        examples=[Shown("1 + 1?", "2", "3", "2 & more")],
    )
    text = " ".join(Page(write_report(tmp_path / "run").read_text()).text)
    for part in ("60.0 %", "exact match, before and after", "3.25", "2 & more", "after: 31.3 to 83.2 %", "10 records"):
        assert part in text, part


def test_an_unfinished_run_has_no_report(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(StoreError, match="no finished run"):
        write_report(tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()
