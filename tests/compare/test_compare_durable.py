"""The record of a comparison: a cell is one claim and one result, and a strange study is refused."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from comparing import small_compare
from optuna.trial import TrialState

from rankworks.compare import compare, study
from rankworks.compare.study import CELL, OWN, RECORD, WORKER, Ledger
from rankworks.core.errors import ConfigError


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path / 'study.db'}", "compare")


def test_a_cell_is_one_claim_at_a_time_and_one_result(ledger: Ledger):
    made = ledger.study("arm", {"a": 1})
    claim = ledger.claim(made, "trial 0", {"lr": 0.1})
    assert claim is not None
    with claim:
        assert claim.trial.suggest_float("lr", 0.01, 1.0, log=True) == 0.1
        assert ledger.claim(made, "trial 0") is None
        assert ledger.busy(made) == {"trial 0"}
        assert claim.finish({"value": 3}, 3.0)
    assert ledger.claim(made, "trial 0") is None
    cell = ledger.finished(made)["trial 0"]
    assert (cell.record, cell.params) == ({"value": 3}, {"lr": 0.1})
    assert ledger.busy(made) == set()


def test_a_cell_that_broke_is_free_again(ledger: Ledger):
    made = ledger.study("arm", {})
    claim = ledger.claim(made, "trial 0")
    assert claim is not None
    with pytest.raises(KeyboardInterrupt), claim:
        raise KeyboardInterrupt
    again = ledger.claim(made, "trial 0")
    assert again is not None
    with again:
        again.finish({}, None)
    assert list(ledger.finished(made)) == ["trial 0"]


def test_of_several_that_take_a_cell_the_first_has_it(ledger: Ledger):
    """What two processes see that both made their trial before either looked."""
    made = ledger.study("arm", {})
    other = Ledger(ledger.url, "compare")
    first = made.ask()
    for key, value in ((CELL, "trial 0"), ("token", "x"), (WORKER, other.worker)):
        first.set_user_attr(key, value)
    assert ledger.claim(made, "trial 0") is None
    made.tell(first, state=TrialState.FAIL)
    assert ledger.claim(made, "trial 0") is not None


def test_the_cell_of_a_process_that_is_gone_is_given_up(ledger: Ledger, monkeypatch: pytest.MonkeyPatch):
    made = ledger.study("arm", {})
    late = ledger.claim(made, "trial 0")
    assert late is not None
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    late.trial.set_user_attr(WORKER, {**ledger.worker, "pid": child.pid})
    again = ledger.claim(made, "trial 0")
    assert again is not None
    with again:
        again.finish({"who": "again"}, 1.0)
    assert not late.finish({"who": "late"}, 2.0)  # it was only slow: its result counts not
    assert ledger.finished(made)["trial 0"].record == {"who": "again"}
    # of another machine only the beat tells
    monkeypatch.setattr(study, "GRACE", 0.2)
    far = ledger.claim(made, "trial 1")
    assert far is not None
    far.trial.set_user_attr(WORKER, {"host": "elsewhere", "pid": 1, "born": 0.0})
    assert ledger.busy(made) == {"trial 1"}
    time.sleep(0.3)
    far.trial.set_user_attr(study.BEATS, 1)
    assert ledger.busy(made) == {"trial 1"}
    time.sleep(0.3)
    assert ledger.busy(made) == set()


def test_signs_of_life_are_given_while_a_cell_is_worked_on(ledger: Ledger, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study, "BEAT", 0.05)
    made = ledger.study("arm", {})
    claim = ledger.claim(made, "trial 0")
    assert claim is not None
    with claim:
        time.sleep(0.5)
        assert made.trials[-1].user_attrs[study.BEATS] >= 2
        claim.finish({}, 1.0)


def test_a_study_of_other_settings_or_another_version_is_refused(tmp_path: Path):
    config = small_compare(tmp_path, methods=["lora"], budget={"trials": 1, "steps": 1, "seeds": 1})
    first = compare(config, progress=False)
    with pytest.raises(ConfigError, match=r"other settings \(train\.batch_size: 4 -> 2\).*--restart"):
        compare(config, ["train.batch_size=2"], progress=False)
    with pytest.raises(ConfigError, match=r"arm lora with other settings \(adapt\.rank: 4 -> 2"):
        compare(config, ["adapt.rank=2"], progress=False)
    more = compare(
        config, ["methods=[lora, vera]", "budget.seeds=2", "output=" + str(tmp_path / "out")], progress=False
    )
    assert more.arm("lora").trials == first.arm("lora").trials  # another method and another seed are no other study
    assert len(more.arm("lora").reruns) == 2
    assert more.arm("lora").reruns[0] == first.arm("lora").reruns[0]
    made = optuna.load_study(study_name="compare/reruns", storage=f"sqlite:///{tmp_path / 'out' / 'study.db'}")
    made.set_user_attr(OWN, {**made.user_attrs[OWN], "version": "0.0.1"})
    with pytest.raises(ConfigError, match=r"written by rankworks 0\.0\.1.*--restart"):
        compare(config, progress=False)
    anew = compare(config, resume=False, progress=False)
    assert anew.arm("lora").reruns[0].outcomes == first.arm("lora").reruns[0].outcomes
    assert RECORD not in made.user_attrs


def test_a_storage_that_cannot_be_opened(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"postgresql://me:\*\*\*@nowhere/db cannot be opened"):
        Ledger("postgresql://me:secret@nowhere/db", "compare")
    (tmp_path / "study.db").write_text("this is no database, but it is long enough to be read as the head of one")
    (tmp_path / "file").write_text("no folder")
    for url in (
        f"sqlite:///{tmp_path / 'study.db'}",
        f"sqlite:///{tmp_path / 'file' / 'study.db'}",
        f"sqlite:///{tmp_path}",
        "postgresql://me@nowhere:port/db",
        "nosuch://x",
        "",
    ):
        with pytest.raises(ConfigError, match="cannot be opened"):
            Ledger(url, "compare")


def test_a_storage_of_another_version_of_optuna(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    Ledger(url, "compare")
    with sqlite3.connect(tmp_path / "study.db") as data:
        data.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    with pytest.raises(ConfigError, match="optuna storage upgrade"):
        Ledger(url, "compare")


def test_a_fault_of_the_opening_is_none_of_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rankworks.compare.study.RDBStorage", lambda *_, **__: None.missing)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        Ledger(f"sqlite:///{tmp_path / 'study.db'}", "compare")
