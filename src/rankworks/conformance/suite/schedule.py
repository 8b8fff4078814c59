"""Checks of rank schedules, over a whole short run with their hooks: they learn, resume, and leave what they say."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

from rankworks.conformance.case import Case, adapter_of, bits_equal, distance, loss_of, random_state
from rankworks.conformance.errors import ConformanceError, NotApplicable
from rankworks.conformance.run import check
from rankworks.core.hooks import Hook, Moment, method_hooks
from rankworks.core.merge import merge, unmerge
from rankworks.core.ranks.surgery import adopt_settings, rebind, site_settings
from rankworks.core.registry import Method
from rankworks.core.store import adapter_state, load, load_adapter_state, save
from rankworks.train.hooks import add_penalties
from rankworks.train.optim import make_optimizer

STEPS = 24


class Run:
    """A run of `STEPS` steps with all that a method does in training, which can be left and taken up again."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32):
        self.case, self.model, self.done = case, case.adapted(dtype, seed=6), 0
        self.dtype = dtype
        self.optimizer = make_optimizer(self.model, "adamw", lr=1e-2, weight_decay=0.1)
        self.hooks: list[Hook] = method_hooks(self.model)

    def moment(self) -> Moment:
        """Where it stands."""
        return Moment(self.model, self.optimizer, self.done, STEPS)

    def call(self, name: str) -> None:
        """Call every hook at one moment."""
        for hook in self.hooks:
            getattr(hook, name)(self.moment())

    def go(self, until: int = STEPS) -> nn.Module:
        """Take the steps up to `until`; the hooks are told of the start, and of the end where it is reached."""
        self.model.train()
        self.call("on_start")
        while self.done < until:
            self.done += 1
            self.optimizer.zero_grad()
            self.call("before_forward")
            x = self.case.inputs(dtype=self.dtype, seed=self.done % 3)
            loss_of(self.model, x, seed=self.done % 3).backward()
            add_penalties(self.hooks, self.moment())
            self.call("after_backward")
            self.optimizer.step()
            self.call("after_step")
        if until == STEPS:
            self.call("on_end")
        self.model.eval()
        return self.model

    def resume(self, other: Run) -> Run:
        """Take up a run where another stands, from what a checkpoint holds."""
        state = copy.deepcopy([hook.state_dict() for hook in other.hooks])
        tensors = {k: t.clone() for k, t in adapter_state(other.model).items()}
        self.done = other.done
        adopt_settings(self.model, copy.deepcopy(site_settings(other.model)))
        rebind(self.optimizer, self.model)
        for hook, kept in zip(self.hooks, state, strict=True):
            hook.load_state_dict(kept)
        load_adapter_state(self.model, tensors)
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
        return self


def finished(case: Case, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a model after a whole run."""
    return Run(case, dtype).go()


@check("variants", "rank")
def schedule_learns(method: Method, case: Case) -> None:
    """A whole run lowers the loss on its batches."""
    run = Run(case)
    first = loss_of(run.model, case.inputs(seed=0), seed=0).item()
    last = loss_of(run.go(), case.inputs(seed=0), seed=0).item()
    if not last < first:
        raise ConformanceError(f"a loss below {first:.5f} after {STEPS} steps", f"{last:.5f}", "the hook's moments")


@check("variants", "rank")
def schedule_repeats(method: Method, case: Case) -> None:
    """Two runs from one seed end with the same numbers, whatever the global random state."""
    ends = []
    for seed in (31, 32):
        with random_state(seed):
            ends.append({k: t.clone() for k, t in adapter_state(Run(case).go()).items()})
    _same(ends[0], ends[1], "two runs", "something random besides the adapter's draw")


@check("variants", "rank")
def schedule_resumes_exactly(method: Method, case: Case) -> None:
    """Left at any third of the run and taken up on a fresh model, it ends as the uninterrupted run, bit for bit."""
    wanted = adapter_state(Run(case).go())
    for left in (STEPS // 3, 2 * STEPS // 3):
        first = Run(case)
        first.go(left)
        _same(wanted, adapter_state(Run(case).resume(first).go()), f"a resume after step {left}", "state_dict()")


@check("variants", "rank", merges=True)
def merged_equals_the_scheduled(method: Method, case: Case) -> None:
    """After a run, the merged model's output is the adapted one's, and unmerging gives it back."""
    model, x = finished(case), case.inputs(dtype=torch.float64)
    wanted = model(x)
    merge(model)
    apart = distance(model(x), wanted)
    if apart > 1e-10:
        raise ConformanceError("the adapted model's output", f"{apart:.2g} away", "dense() and forward() disagree")
    unmerge(model)
    if not torch.equal(model(x), wanted):
        raise ConformanceError("the adapted model's output after unmerging", "another", "dense()")


@check("variants", "rank")
def scheduled_file_reads_back(method: Method, case: Case) -> None:
    """What a run leaves, whatever ranks it chose, is saved and loaded bit for bit, settings too."""
    model, x = finished(case, torch.float32), case.inputs()
    with tempfile.TemporaryDirectory() as folder:
        again = load(case.model(), save(model, Path(folder) / "adapter"))
    _same(adapter_state(model), adapter_state(again), "save and load", "current_spec(), make_room()")
    if site_settings(model) != site_settings(again):
        raise ConformanceError("the settings that were saved", "others", "current_spec()")
    if not torch.equal(model(x), again(x)):
        raise ConformanceError("the saved model's output", "another", "state that the file lacks")


@check("variants", "rank")
def factors_are_the_change(method: Method, case: Case) -> None:
    """After a run the factors that plain LoRA is exported from multiply to the dense change."""
    adapter = adapter_of(finished(case))
    seen = 0
    for name, delta in adapter.deltas.items():
        factors, weight = delta.factors(), adapter.sites[name].weight
        if factors is None:
            continue
        seen += 1
        apart = distance(factors.B @ factors.A, delta.dense(weight))
        if apart > 1e-10:
            raise ConformanceError(f"the dense change at {name}", f"{apart:.2g} away", "factors()")
    if not seen:
        raise NotApplicable("its change has no factors")


def _same(wanted: dict, got: dict, what: str, where: str) -> None:
    wrong = next((k for k in wanted if k not in got or not bits_equal(wanted[k], got[k])), None)
    if wrong is None and wanted.keys() == got.keys():
        return
    apart = "other keys" if wrong is None or wrong not in got else f"{wrong} differs"
    raise ConformanceError(f"the same numbers from {what}", apart, where)
