"""The record of a comparison: Optuna studies in a storage that outlives processes and is shared by machines.

Every run is a cell with a name within its study: "trial 3" and "wider 0" in the study of an arm, "lora: seed 2" in the
study of reruns. A cell is worked on by making a trial that is running and carries the cell's name, in one transaction;
storages number trials one after another, so of two processes that take the same cell the lower number has it, and the
other one gives way. A cell is finished when one of its trials is, the lowest such number counts: nothing is lost,
nothing counts twice, whoever is killed at whatever moment.

A running trial whose process is gone is given up: on this machine that is seen at once, of another one when its beat
has stood still for `GRACE` seconds, by the clock of the one who watches.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import optuna
import psutil
from filelock import FileLock
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from rankworks.core.errors import ConfigError
from rankworks.core.version import __version__

FORMAT = 1
"""Version of what is written into a study."""

BEAT = 10.0
"""Seconds between signs of life of a running cell."""

GRACE = 90.0
"""Seconds without one after which a cell of another machine is given up."""

PAUSES = (0.2, 0.5, 1.0, 2.0)
"""Seconds before a server is tried again whose tables another process is making."""

UNOPENED = (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, OSError, RuntimeError, ValueError)
"""What a storage that cannot be opened raises: SQLAlchemy, which wraps every driver's errors; Optuna, with RuntimeError
for another version's tables; ImportError for a missing driver; OSError for the folder or lock of a file; ValueError for
a port that is no number."""

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
OWN, CELL, WORKER, BEATS, RECORD, TOKEN = "rankworks", "cell", "worker", "beat", "record", "token"


@dataclass(frozen=True)
class Cell:
    """One finished cell: its name, the number of its trial, what was drawn for it, and what came of it."""

    name: str
    number: int
    params: dict[str, Any]
    record: dict[str, Any]


class Claim:
    """A cell that this process works on, with signs of life while in its context."""

    def __init__(self, study: optuna.Study, trial: optuna.Trial, name: str):
        self.study, self.trial, self.name = study, trial, name
        self._done = threading.Event()
        self._open = True

    def __enter__(self) -> Claim:
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._done.set()
        self._thread.join()
        if self._open:  # stopped or broken: the cell is free again
            _give_up(self.study, self.trial.number)

    def _beat(self) -> None:
        count = 0
        while not self._done.wait(BEAT):
            count += 1
            try:
                self.trial.set_user_attr(BEATS, count)
            except optuna.exceptions.OptunaError:  # given up by another process, or the storage is away for a moment
                continue

    def finish(self, record: Mapping[str, Any], value: float | None, pruned: bool = False) -> bool:
        """Write down what came of the cell; False where another process had given this one up, and it counts not."""
        self._open = False
        try:
            self.trial.set_user_attr(RECORD, dict(record))
            if pruned:
                self.study.tell(self.trial, state=TrialState.PRUNED)
            else:
                self.study.tell(self.trial, float("inf") if value is None else value)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            return False
        return True


class Ledger:
    """The studies of one comparison in one storage."""

    def __init__(self, url: str, name: str):
        self.url, self.name = url, name
        self.storage = _open(url)
        self._seen: dict[tuple[str, int], tuple[int, float]] = {}
        self.worker = {"host": _host(), "pid": os.getpid(), "born": psutil.Process().create_time()}

    def study(self, title: str, identity: Mapping[str, Any]) -> optuna.Study:
        """Open a study, or make it. Raises `ConfigError` for one of another version or other settings."""
        with self._lock():
            study = optuna.create_study(
                storage=self.storage,
                study_name=f"{self.name}/{title}",
                load_if_exists=True,
                direction="minimize",
                sampler=optuna.samplers.RandomSampler(seed=0),
            )
            known = study.user_attrs.get(OWN)
            mine = {"format": FORMAT, "version": __version__, "identity": dict(identity)}
            if known is None:
                study.set_user_attr(OWN, mine)  # Optuna keeps what another process wrote there in between
                known = study.user_attrs[OWN]
        self._check(title, known, mine)
        return study

    def forget(self) -> None:
        """Delete all studies of this comparison."""
        for summary in optuna.get_all_study_summaries(self.storage, include_best_trial=False):
            if summary.study_name.startswith(f"{self.name}/"):
                optuna.delete_study(study_name=summary.study_name, storage=self.storage)

    def finished(self, study: optuna.Study) -> dict[str, Cell]:
        """Return the finished cells by name."""
        cells: dict[str, Cell] = {}
        for trial in study.get_trials(deepcopy=False, states=FINISHED):
            name = trial.user_attrs.get(CELL)
            if name is not None and name not in cells and RECORD in trial.user_attrs:
                cells[name] = Cell(name, trial.number, dict(trial.params), trial.user_attrs[RECORD])
        return cells

    def busy(self, study: optuna.Study) -> set[str]:
        """Return the cells that some process works on now; those of processes that are gone are given up."""
        names = set()
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._lives(study, trial):
                names.add(trial.user_attrs.get(CELL))
            else:
                _give_up(study, trial.number)
        return names - {None}

    def claim(self, study: optuna.Study, name: str, fixed: Mapping[str, Any] | None = None) -> Claim | None:
        """Take a cell; None where another process has it or has finished it. fixed: parameters that are given."""
        token = uuid.uuid4().hex
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                user_attrs={CELL: name, TOKEN: token, WORKER: self.worker, BEATS: 0},
                system_attrs={"fixed_params": dict(fixed)} if fixed else {},
            )
        )
        rivals = [t for t in study.get_trials(deepcopy=False) if t.user_attrs.get(CELL) == name]
        mine = next(t for t in rivals if t.user_attrs[TOKEN] == token)
        ahead = [t for t in rivals if t.number < mine.number and t.state == TrialState.RUNNING]
        taken = any(self._lives(study, trial) for trial in ahead) or any(t.state in FINISHED for t in rivals)
        if taken:
            _give_up(study, mine.number)
            return None
        for trial in ahead:
            _give_up(study, trial.number)
        return Claim(study, optuna.Trial(study, mine._trial_id), name)

    def _lives(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Say whether the process that works on a running trial is there."""
        worker = trial.user_attrs.get(WORKER)
        if worker is None:  # not ours
            return True
        if worker["host"] == self.worker["host"]:
            try:
                return abs(psutil.Process(worker["pid"]).create_time() - worker["born"]) < 1
            except psutil.NoSuchProcess:
                return False
        beat, now, key = trial.user_attrs.get(BEATS, 0), time.monotonic(), (study.study_name, trial.number)
        last, since = self._seen.get(key, (None, now))
        if beat != last:
            self._seen[key] = (beat, now)
            return True
        return now - since < GRACE

    def _check(self, title: str, known: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
        """Raise where a study was written by another version or for other settings."""
        where = f"the study {self.name!r} in {shown(self.url)}"
        remedy = "give another output (or storage, or study), or --restart to delete it and begin anew"
        for key in ("format", "version"):
            if known.get(key) != mine[key]:
                raise ConfigError(
                    f"{where} was written by rankworks {known.get('version')} (study format {known.get('format')}), "
                    f"this is {__version__} ({FORMAT}): numbers of two versions are not mixed. Go on with that "
                    f"version, {remedy}."
                )
        differing = differences(known["identity"], mine["identity"])
        if differing:
            raise ConfigError(
                f"{where} holds {title} with other settings ({', '.join(differing[:6])}): use those settings to go on "
                f"with it, {remedy}."
            )

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Let one process of this machine at a time make a study: SQLite's tables are made with the first."""
        file = sqlite_file(self.url)
        with FileLock(f"{file}.lock") if file is not None else contextlib.nullcontext():
            yield


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """Return `key: earlier -> now` for every setting that differs, keys dotted."""
    found = []
    for key in sorted({*earlier, *now}):
        a, b, where = earlier.get(key), now.get(key), f"{path}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{where}.")
        elif a != b:
            found.append(f"{where}: {a} -> {b}")
    return found


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite storage, None of any other."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def shown(url: str) -> str:
    """Return a storage URL without its password."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{parts.netloc.rpartition('@')[2]}"))


def _open(url: str) -> RDBStorage:
    """Open a storage. Raises `ConfigError` where it cannot be reached or is of another version of Optuna."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = sqlite_file(url)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if file is not None:
        options = {"connect_args": {"timeout": 120}}  # seconds that a writer waits for another one
    try:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{file}.lock"):
                return RDBStorage(url, engine_kwargs=options)
        for pause in PAUSES:
            try:
                return RDBStorage(url, engine_kwargs=options)
            except SQLAlchemyError as error:
                if not _made_already(error):
                    raise
            time.sleep(pause)
        return RDBStorage(url, engine_kwargs=options)
    except UNOPENED as error:
        text = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the storage {shown(url)} cannot be opened ({type(error).__name__}: {text}): give an Optuna storage URL "
            "such as sqlite:///runs/compare/study.db, or install its driver (rankworks[postgres] has PostgreSQL's, for "
            "postgresql+psycopg://user@host/db). One that another version of Optuna wrote is brought up to date with "
            "`optuna storage upgrade --storage URL`."
        ) from error


def _made_already(error: SQLAlchemyError) -> bool:
    """Say whether a storage could not be opened because another process was making its tables at the same moment."""
    return isinstance(error, IntegrityError) or "already exists" in str(error)


def _give_up(study: optuna.Study, number: int) -> None:
    """Mark a running trial as failed, which frees its cell; nothing where it has just been finished."""
    with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
        study.tell(number, state=TrialState.FAIL)


def _host() -> str:
    """Return a name of the place where process numbers mean the same: the machine, and the container within it."""
    try:
        space = str(os.stat("/proc/self/ns/pid").st_ino)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        space = boot = ""
    return f"{socket.gethostname()}/{boot}/{space}"
