"""Processes that work on comparisons, some of them killed; a script for `test_compare_shared.py`.

    python working.py FOLDER [STORAGE]        by default a file of SQLite in FOLDER

The parent imports everything once and forks; each child runs the same comparison until it is done, or kills itself with
SIGKILL at a planned moment. Prints one JSON line per child: its scenario, exit status, cells done and leaderboard; and
one for each look at the record: by cell, the states of the trials that were made for it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from comparing import small_compare

from rankworks.compare import compare, study
from rankworks.compare.trial import Bench


def work(folder: Path, name: str, storage: str, how: str = "", at: int = 0) -> dict[str, Any]:
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
    kept = {"storage": storage, "study": folder.name}
    result = compare(small_compare(folder, output=str(folder / name), tune={"prune": False}, **kept), progress=False)
    rows = [[r.method, r.mean, r.low, r.high, r.lr] for r in result.leaderboard]
    return {"cells": done, "rows": rows, "complete": result.complete}


def states(name: str, storage: str) -> dict[str, Any]:
    """Return the states of all trials of a comparison, by cell and in the order in which they were made."""
    found: dict[str, list[str]] = {}
    for title in optuna.get_all_study_names(storage):
        if title.startswith(f"{name}/"):
            for trial in optuna.load_study(study_name=title, storage=storage).trials:
                found.setdefault(f"{title} {trial.user_attrs[study.CELL]}", []).append(trial.state.name)
    return {"states": found}


def child(job: Callable[..., dict[str, Any]], *arguments: Any) -> tuple[int, int]:
    """Fork; return the child's number and the end of a pipe that its report comes through."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    code = 1
    try:
        os.write(writer, json.dumps(job(*arguments)).encode())
        code = 0
    finally:
        os._exit(code)


def end(scenario: str, pid: int, reader: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    told = os.read(reader, 1 << 16)
    print(json.dumps({"scenario": scenario, "status": status, **(json.loads(told) if told else {})}), flush=True)


def main(folder: Path, storage: str = "") -> None:
    torch.set_num_threads(1)
    storage = storage or f"sqlite:///{folder / 'shared.db'}"
    whole, broken, shared = (folder / name for name in ("whole", "broken", "shared"))
    for each in (whole, broken, shared):
        each.mkdir()
        small_compare(each)
    children = [child(work, shared, name, storage) for name in ("one", "two")]  # neither finds any tables there
    for each in children:
        end("shared", *each)
    end("whole", *child(work, whole, "out", storage))
    for how, at in (("after", 1), ("in", 1), ("after", 3)):
        end("killed", *child(work, broken, "out", storage, how, at))
    end("broken off", *child(states, "broken", storage))
    end("again", *child(work, broken, "out", storage))
    for name in ("broken", "shared"):
        end(f"{name} at the end", *child(states, name, storage))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
