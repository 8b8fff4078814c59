"""What a person sees while a comparison goes on: a table of the arms on a terminal, a line per run elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rankworks.compare.session import Standing
from rankworks.train.report.words import duration

LINE_EVERY = 15.0
"""Seconds between plain lines within a run where there is no terminal."""


class Board:
    """The display of a comparison on standard error. show: False is silent.

    seeds, trials: how many reruns and trials an arm has. The time that is left follows from what all processes that
    work on the comparison have finished since this one began to look.
    """

    def __init__(self, metric: str, tuned_on: str, trials: int, seeds: int, show: bool = True):
        self.metric, self.tuned_on, self.trials, self.seeds, self.show = metric, tuned_on, trials, seeds, show
        self.console = Console(stderr=True, highlight=False)
        self.standings: dict[str, Standing] = {}
        self.doing: tuple[str, str, int] | None = None  # arm, cell, steps
        self.step = 0
        self.began, self.had = time.monotonic(), 0  # when runs were first counted, and how many were done then
        self.live: Live | None = None
        self._last = time.monotonic()

    def __enter__(self) -> Board:
        if self.show and self.console.is_terminal:
            self.live = Live(self._table(), console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    # ---- what the session tells -----------------------------------------------------------------------------------

    def begin(self, standings: Sequence[Standing]) -> None:
        """Show all arms; some may be done by an earlier call or another process."""
        self.standings = {s.arm.label: s for s in standings}
        self.began, self.had = time.monotonic(), self._done_runs()
        self._draw()

    def update(self, standing: Standing) -> None:
        """Show what is now known of an arm."""
        known = self.standings.get(standing.arm.label)
        self.standings[standing.arm.label] = standing
        if standing.done and (known is None or not known.done):
            self._line(f"{standing.arm.label}: {self._state(standing)}", always=True)
        self._draw()

    def cell(self, label: str, name: str, lr: float | None, steps: int) -> None:
        """Show which run begins."""
        self.doing, self.step = (label, name, steps), 0
        at = f" at lr {lr:g}" if lr is not None else ""
        self._line(f"{label}: {name}{at}, {self._left()}", always=True)
        self._draw()

    def tick(self, step: int) -> None:
        """Show the step of the run that goes on."""
        self.step = step
        if self.doing is not None:
            self._line(f"{self.doing[0]}: {self.doing[1]}, step {step}/{self.doing[2]}")
        self._draw()

    def did(self) -> None:
        """Note that a run is over."""
        self.doing = None

    def waiting(self) -> None:
        """Say that all that is left is in other hands."""
        self._line("waiting for what other processes do")
        self._draw()

    # ---- drawing --------------------------------------------------------------------------------------------------

    def _line(self, text: str, always: bool = False) -> None:
        if not self.show or self.live is not None:
            return
        now = time.monotonic()
        if always or now - self._last > LINE_EVERY:
            self._last = now
            print(text, file=sys.stderr, flush=True)

    def _draw(self) -> None:
        if self.live is not None:
            self.live.update(self._table())

    def _open_runs(self) -> int:
        """How many runs are left, as far as is known."""
        left = 0
        for s in self.standings.values():
            if not s.done:
                trials = len(s.agenda.open(s.seen)) if s.agenda is not None else self.trials
                left += trials * s.arm.tune.seeds + self.seeds - len(s.reruns)
        return left

    def _done_runs(self) -> int:
        """How many runs are known to be done, by whomever."""
        return sum(len(s.trials) * s.arm.tune.seeds + len(s.reruns) for s in self.standings.values())

    def _left(self) -> str:
        left, done = self._open_runs(), self._done_runs() - self.had
        if not done:
            return f"{left} runs left"
        return f"{left} runs left, about {duration((time.monotonic() - self.began) / done * left)}"

    def _state(self, s: Standing) -> str:
        if s.reason is not None:
            return f"failed: {s.reason}"
        if self.doing is not None and self.doing[0] == s.arm.label and not s.done:
            step = f", step {self.step}/{self.doing[2]}" if self.doing[2] else ""
            return f"{self.doing[1]}{step}"
        if s.done:
            told = [r.metrics[self.metric] for r in s.reruns.values() if self.metric in r.metrics]
            mean = f", {self.metric.replace('_', ' ')} {sum(told) / len(told):.4g}" if told else ""
            best = f"best lr {s.best.lr:g}" if s.best is not None else ""
            return f"done, {best}{mean}"
        return f"{len(s.trials)} trials" if s.trials else "waits"

    def _table(self) -> Table:
        table = Table(
            box=None, padding=(0, 2, 0, 0), title=Text(f"comparing: {self._left()}", "bold"), title_justify="left"
        )
        for name in ("arm", "state"):
            table.add_column(name, style="bold" if name == "arm" else "", no_wrap=True)
        for name in ("best lr", self.tuned_on):
            table.add_column(name, justify="right", no_wrap=True)
        room = max(8, self.console.height - 6)
        for s in self._shown(room):
            top = s.best
            style = "red" if s.reason else "green" if s.done else ""
            value = "" if top is None or top.value is None else f"{abs(top.value):.4f}"
            cells = (s.arm.label, self._state(s), f"{top.lr:g}" if top else "", value)
            table.add_row(*(Text(c, style if i == 1 else "", overflow="ellipsis") for i, c in enumerate(cells)))
        if len(self.standings) > room:
            table.caption = f"{sum(s.done for s in self.standings.values())} of {len(self.standings)} arms done"
        return table

    def _shown(self, room: int) -> list[Standing]:
        """Return the arms that a screen has room for, from a little before the one that goes on."""
        every = list(self.standings.values())
        at = next((i for i, s in enumerate(every) if self.doing and s.arm.label == self.doing[0]), 0)
        first = max(0, min(at - room // 3, len(every) - room))
        return every[first : first + room]
