"""A comparison that is killed goes on, and one that several processes share is done once, in a file and on a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from postgres import server

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
CELLS = 2 * (3 + 2)  # two arms of three trials and two seeds


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What the processes of working.py did, by scenario."""
    folder = tmp_path_factory.mktemp("working")
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with server() if request.param == "postgresql" else nullcontext("") as storage:
        command = [sys.executable, str(HERE / "working.py"), str(folder), storage]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    by_scenario: dict[str, list[Any]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            by_scenario.setdefault(json.loads(line)["scenario"], []).append(json.loads(line))
    return by_scenario


def test_killed_at_any_moment_and_begun_again_it_ends_as_if_nothing_was(told: dict[str, list[Any]]):
    (whole,), (again,) = told["whole"], told["again"]
    assert (whole["status"], whole["cells"], whole["complete"]) == (0, CELLS, True)
    assert [attempt["status"] for attempt in told["killed"]] == [-9, -9, -9]
    # Finished: 1 and then 3. Begun, and broken off: one of each process.
    states = [state for each in told["broken off"][0]["states"].values() for state in each]
    assert (states.count("COMPLETE"), states.count("RUNNING")) == (4, 1)
    assert states.count("FAIL") == 2  # the next process saw that these were dead
    assert (again["status"], again["cells"]) == (0, CELLS - 4)
    assert again["rows"] == whole["rows"]
    for name, each in told["broken at the end"][0]["states"].items():
        assert each.count("COMPLETE") == 1, name
        assert set(each) <= {"COMPLETE", "FAIL"}, name


def test_two_processes_share_a_study_and_do_every_cell_once(told: dict[str, list[Any]]):
    one, two = told["shared"]
    assert (one["status"], two["status"]) == (0, 0)
    assert one["cells"] + two["cells"] == CELLS
    assert min(one["cells"], two["cells"]) > 0
    assert one["rows"] == two["rows"] == told["whole"][0]["rows"]
    made = told["shared at the end"][0]["states"]
    assert all(each.count("COMPLETE") == 1 for each in made.values())
    assert len(made) == CELLS
