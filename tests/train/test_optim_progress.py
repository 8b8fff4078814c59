"""Parameter groups, schedules, the progress bar and the memory meter."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from training import adapted

from rankworks.core.adapt import activate, adapt
from rankworks.core.errors import ConfigError, TrainingError, UnknownNameError
from rankworks.train.optim import learning_rate_factor, make_optimizer, set_learning_rate
from rankworks.train.progress import Bar, megabytes, tracked
from tiny import tiny_llama, tiny_mlp


def test_vectors_have_no_decay_and_groups_carry_names():
    model = tiny_mlp()
    optimizer = make_optimizer(model, "adamw", lr=0.1, weight_decay=0.5, betas=(0.8, 0.9))
    matrices, vectors = optimizer.param_groups
    assert matrices["weight_decay"] == 0.5
    assert vectors["weight_decay"] == 0
    assert all(p.ndim == 2 for p in matrices["params"])
    assert vectors["names"] == ["first.bias", "head.bias"]
    assert dict(model.named_parameters())[matrices["names"][1]] is matrices["params"][1]
    assert matrices["betas"] == (0.8, 0.9)


def test_only_the_acting_adapter_is_optimised():
    model = adapt(adapted(), "lora", rank=2, name="second")
    activate(model, ["second"])
    names = [name for group in make_optimizer(model).param_groups for name in group["names"]]
    assert names
    assert all(".second." in name for name in names)


def test_bad_optimizers():
    model = tiny_mlp()
    with pytest.raises(UnknownNameError, match="Did you mean 'adamw'"):
        make_optimizer(model, "adamwx")
    with pytest.raises(ConfigError, match=r"unknown key 'momentun'.*Did you mean 'momentum'"):
        make_optimizer(model, "sgd", momentun=0.9)
    with pytest.raises(TrainingError, match="nothing to train"):
        make_optimizer(tiny_llama().requires_grad_(False))


def test_schedules():
    assert [learning_rate_factor("constant", s, 4) for s in range(4)] == [1, 1, 1, 1]
    assert [learning_rate_factor("linear", s, 4) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    cosine = [learning_rate_factor("cosine", s, 10, 2) for s in range(10)]
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert all(a > b for a, b in pairwise(cosine[2:]))
    assert learning_rate_factor("linear", 0, 100, 0.03) == 0.25
    with pytest.raises(UnknownNameError):
        learning_rate_factor("cosin", 5, 10)


def test_every_group_keeps_its_own_rate():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 4.0}])
    set_learning_rate(optimizer, 0.5)
    assert set_learning_rate(optimizer, 0.25) == 0.25
    assert optimizer.param_groups[1]["lr"] == 1.0


def test_progress_is_a_line_without_a_terminal_and_nothing_when_off(capsys: pytest.CaptureFixture[str]):
    with Bar("training", 3) as bar:
        for _ in range(3):
            bar.advance(1, {"loss": "1.5"})
    assert list(tracked([1, 2], "x", 2, show=False)) == [1, 2]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["training 3/3  loss 1.5  0 s left"]


def test_peak_memory_sees_an_allocation():
    # in a process of its own: one that has freed memory may be given the same pages again, and its peak stays
    script = (
        "import torch\n"
        "from rankworks.train.memory import PeakMemory\n"
        "meter = PeakMemory(torch.device('cpu'))\n"
        "before = meter.peak\n"
        "block = torch.ones(30_000_000)\n"
        "meter.look()\n"
        "assert meter.peak >= before + 100_000_000, (before, meter.peak)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_memory_is_told_in_round_numbers():
    assert megabytes(3.14e9) == "3.1 GB"
    assert megabytes(5.12e8) == "512 MB"
