"""Checkpoints: whole or not there, and a resumed run equals the uninterrupted one bit for bit."""

from __future__ import annotations

import errno
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from training import adapted, make_loop

from rankworks.core.adapt import adapt
from rankworks.core.errors import DataError, TrainingError
from rankworks.train.checkpoint import Checkpoints, load_trained_tensors, trained_tensors
from rankworks.train.hooks import Hook
from rankworks.train.tensors import flatten, read_tree, unflatten, write_tree
from tiny import tiny_llama


def test_a_tree_survives(tmp_path: Path):
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3)}, 7: {}},
        "list": [1, 2.5, None, True, "a", (1, (2, 3))],
        "float": [0.1, float("inf"), 1e-300],
        "array": np.arange(5, dtype=np.uint32),
        "bf16": torch.randn(3).bfloat16(),
        "empty": torch.zeros(0),
        "tensor": {"tensor": 1},
    }
    write_tree(tmp_path, "part", tree)
    back = read_tree(tmp_path, "part")
    assert back["list"] == tree["list"]
    assert back["float"] == tree["float"]
    assert back["tensor"] == {"tensor": 1}
    assert set(back["state"]) == {0, 7}
    assert torch.equal(back["state"][0]["m"], tree["state"][0]["m"])
    assert back["array"].dtype == np.uint32
    assert (back["array"] == tree["array"]).all()
    assert back["bf16"].dtype == torch.bfloat16
    assert unflatten(flatten({"a": ()}, {}), {}) == {"a": ()}


def test_what_is_not_data_is_refused():
    with pytest.raises(TrainingError, match="a function at /a cannot be saved"):
        flatten({"a": lambda: None}, {})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("part.safetensors", None),
        ("part.safetensors", b"\x08"),
        ("part.json", b'{"dict": [["a", '),
        ("part.json", b"\xff\xfe\x00"),
        ("part.json", b'{"dict": [["a", {"tensor": "/other"}]]}'),
        ("part.json", b'{"neither": 1}'),
        ("part.json", b'{"dict": 3}'),
    ],
)
def test_a_broken_part_is_said_to_be_broken(tmp_path: Path, name: str, content: bytes | None):
    write_tree(tmp_path, "part", {"a": torch.zeros(3)})
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=r"part is not a readable part of a checkpoint .*use an earlier one"):
        read_tree(tmp_path, "part")


def test_a_fault_of_the_reader_is_none_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_tree(tmp_path, "part", {"a": torch.zeros(3)})
    monkeypatch.setattr("rankworks.train.tensors.unflatten", lambda *_: None.missing)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        read_tree(tmp_path, "part")


class StopError(Exception):
    """What ends a run in the middle."""


class Counter(Hook):
    """Has a state and uses randomness; ends the run after the step `stop`."""

    def __init__(self, stop: int = 0):
        self.total, self.stop = torch.zeros(3), stop

    def after_step(self, moment):
        self.total += torch.rand(3) + random.random() + np.random.rand()
        if moment.step == self.stop:
            raise StopError

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stopped", [3, 5, 6])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, optimizer: str, stopped: int):
    options = {"momentum": 0.9} if optimizer == "sgd" else {}
    settings = {"name": optimizer, "options": options, "save_every": 2, "accumulate": 2, "batch_size": 4}

    def start(folder: Path, seed: int, stop: int = 0):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        hook = Counter(stop)
        return make_loop(adapted(attention_dropout=0.2), folder, hooks=[hook], **settings), hook

    whole, hook = start(tmp_path / "whole", 0)
    history = whole.run()
    with pytest.raises(StopError):
        start(tmp_path / "cut", 0, stopped)[0].run()
    second, other = start(tmp_path / "cut", 99)
    assert second.restore()
    assert second.step == (stopped - 1) // 2 * 2
    assert second.run().losses == history.losses
    assert torch.equal(hook.total, other.total)
    resumed = trained_tensors(second.model)
    for name, tensor in trained_tensors(whole.model).items():
        assert torch.equal(resumed[name], tensor), name
    lines = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6]


def test_stored_buffers_of_a_delta_are_in_a_checkpoint_and_frozen_banks_are_not():
    shira = trained_tensors(adapt(tiny_llama(), "shira", rank=2))
    assert any(not t.requires_grad for t in shira.values())
    vera = adapt(tiny_llama(), "vera", rank=2)
    assert sum(t.numel() for t in trained_tensors(vera).values()) == sum(
        p.numel() for p in vera.parameters() if p.requires_grad
    )


def test_another_adapter_is_refused():
    state = {name: t.detach().clone() for name, t in trained_tensors(adapted()).items()}
    with pytest.raises(TrainingError, match="another adapter"):
        load_trained_tensors(adapt(tiny_llama(), "lora", rank=2), state)
    with pytest.raises(TrainingError, match="another adapter"):
        load_trained_tensors(adapt(tiny_llama(), "lora", rank=4, targets=["q_proj"]), state)


def parts(value: float = 1.0) -> dict:
    return {"weights": {"a": torch.full((100,), value)}, "run": {"step": value}}


def test_the_newest_stay_and_a_partial_or_damaged_one_is_passed_over(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest() is None
    for step in (1, 2, 3):
        checkpoints.save(step, parts(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert checkpoints.load(tmp_path / "step-00000003", ["run"])["run"]["step"] == 3
    (tmp_path / ".step-00000004.new-x").mkdir()  # what a killed process leaves
    assert checkpoints.newest() == tmp_path / "step-00000003"
    damaged = tmp_path / "step-00000003" / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"rots")
    assert checkpoints.newest() == tmp_path / "step-00000002"
    checkpoints.save(5, parts(5))
    assert not list(tmp_path.glob(".step-*"))
    (tmp_path / "latest").unlink()  # killed between the rename and the pointer
    assert checkpoints.newest() == tmp_path / "step-00000005"


@pytest.mark.parametrize("when", ["step-00000002.*weights.safetensors", "step-00000002.*sums.json", "latest"])
def test_a_full_disk_is_a_clear_error_and_the_older_checkpoint_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, parts())
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if re.search(when, str(self)):
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TrainingError, match=r"checkpoint of step 2 was not saved.*disk is full"):
        checkpoints.save(2, parts(2))
    monkeypatch.undo()
    newest = checkpoints.newest()
    assert newest is not None
    assert checkpoints.load(newest, ["run"])["run"]["step"] in ((1,) if when != "latest" else (1, 2))


def test_another_seed_or_hook_is_refused(tmp_path: Path):
    make_loop(folder=tmp_path, save_every=2).run()
    with pytest.raises(DataError, match="seed 0, this run has 24 and 7"):
        make_loop(folder=tmp_path, save_every=2, seed=7).restore()
    with pytest.raises(TrainingError, match=r"hooks \[\], this run has \['Counter'\]"):
        make_loop(folder=tmp_path, save_every=2, hooks=[Counter()]).restore()
    assert not make_loop(folder=tmp_path / "none").restore()


def test_a_checkpoint_holds_no_pickle(tmp_path: Path):
    make_loop(folder=tmp_path, save_every=2).run()
    names = {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert names == {".safetensors", ".json", ""}
