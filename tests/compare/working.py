"""Processes that work on comparisons, some of them killed; a script for `test_compare_durable.py`.

The parent imports everything once and forks; each child runs the same comparison until it is done, or kills itself with
SIGKILL at a planned moment. Prints one JSON line per child: its scenario, exit status, cells done and leaderboard.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from comparing import small_compare

from rankworks.compare import compare, study
from rankworks.compare.trial import Bench


def work(folder: Path, name: str, report: int, how: str, at: int) -> None:
    """Do the comparison. how: "after" dies when `at` cells are finished and one has begun; "in" while the `at`-th is
    written, between its record and its state.
    """
    done = 0
    finish, run = study.Claim.finish, Bench.run

    def counted(self, *args, **options):
        nonlocal done
        done += 1
        if how == "in" and done == at:
            self.trial.set_user_attr("record", {"half": "written"})
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(self, *args, **options)

    def begun(self, arm, recipe, **options):
        if how == "after" and done == at:
            options["look"] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return run(self, arm, recipe, **options)

    study.Claim.finish, Bench.run = counted, begun
    storage = f"sqlite:///{folder / 'shared.db'}"
    result = compare(
        small_compare(folder, output=str(folder / name), storage=storage, tune={"prune": False}), progress=False
    )
    rows = [[r.method, r.mean, r.low, r.high, r.lr] for r in result.leaderboard]
    os.write(report, json.dumps({"cells": done, "rows": rows, "complete": result.complete}).encode())


def child(folder: Path, name: str, how: str = "", at: int = 0) -> tuple[int, int]:
    """Fork; return the child's number and the end of a pipe that its report comes through."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    code = 1
    try:
        work(folder, name, writer, how, at)
        code = 0
    finally:
        os._exit(code)


def end(scenario: str, pid: int, reader: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    told = os.read(reader, 1 << 16)
    print(json.dumps({"scenario": scenario, "status": status, **(json.loads(told) if told else {})}), flush=True)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name in ("whole", "broken", "shared"):
        (folder / name).mkdir()
        small_compare(folder / name)
    end("whole", *child(folder / "whole", "out"))
    for how, at in (("after", 1), ("in", 1), ("after", 3)):
        end("killed", *child(folder / "broken", "out", how, at))
    (folder / "broken" / "killed.db").write_bytes((folder / "broken" / "shared.db").read_bytes())
    end("again", *child(folder / "broken", "out"))
    children = [child(folder / "shared", name) for name in ("one", "two")]
    for each in children:
        end("shared", *each)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
