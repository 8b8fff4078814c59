"""The training loop: examples in, trained parameters out; every step the same for any number of processes.

    for every step:  take the global batch, cut it into micro-batches and shares of the processes
                     loss of a share = sum of its cross-entropies / labels of the WHOLE global batch
                     backward; gradients summed over processes; clip; hooks; optimizer

Because every share is divided by the same number, `accumulate=4` equals one batch four times as large, and two
processes equal one. A loss or gradient that is not finite stops the run before the optimizer acts on it.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import nn

from rankworks.core.errors import ConfigError, DivergedError, TrainingError
from rankworks.core.hooks import Hook, Moment, method_hooks, optimizer_hooks
from rankworks.core.ranks.surgery import adopt_settings, rebind, site_settings
from rankworks.train.apart import average_gradients, leave_out
from rankworks.train.batching.batches import Batch, Collator, Example, Sampler
from rankworks.train.batching.documents import by_document
from rankworks.train.batching.packing import separates_documents
from rankworks.train.checkpoint import (
    Checkpoints,
    load_trained_tensors,
    random_states,
    restore_random_states,
    trained_tensors,
)
from rankworks.train.compiled import compiled
from rankworks.train.config import OptimConfig, TrainConfig
from rankworks.train.evaluating import Evaluating
from rankworks.train.hooks import add_penalties, hook_states, restore_hooks, the_teacher
from rankworks.train.layerwise import Layerwise, Mode
from rankworks.train.losses.objective import Objective
from rankworks.train.memory import PeakMemory
from rankworks.train.metrics import Metrics
from rankworks.train.optim import learning_rate_factor, make_optimizer, set_learning_rate
from rankworks.train.processes import processes
from rankworks.train.progress import Bar, megabytes

PARTS = ("weights", "optimizer", "run")


@dataclass
class History:
    """What a run measured of itself; part of every checkpoint."""

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    valid: list[dict[str, float]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Tokens that were not padding, per second of training."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Loop:
    """One training run of `model` on tokenised examples. `run()` trains; `history` tells how it went.

    folder: where checkpoints and metrics.jsonl go (none are written without it); evaluate: called every `eval_every`
    steps, its result goes to the metrics; title: of the bar. The parameters that require a gradient are trained.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        train: TrainConfig,
        optim: OptimConfig,
        *,
        hooks: Sequence[Hook] = (),
        folder: Path | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        pad: int = 0,
        progress: bool = True,
        title: str = "training",
    ):
        self.title = title
        self.train, self.optim, self.evaluate = train, optim, evaluate
        self.model, self.examples, self.history = model, examples, History()
        processes()
        self.accelerator = Accelerator()
        self.accelerator.native_amp = False  # ours is train.precision, whatever another trainer asked for
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if train.batch_size % self.world:
            raise ConfigError(
                f"train.batch_size {train.batch_size} counts the examples of all processes together and cannot be "
                f"shared by {self.world} of them: make it a multiple of {self.world}."
            )
        if self.world > 1:
            model.to(self.accelerator.device)
        self.sampler = Sampler(len(examples), train.seed)
        self.steps = train.total_steps(len(examples))
        self.collator = Collator(pad, packs(model, examples, train))
        own = method_hooks(model)  # first: one may thaw what an earlier run left frozen, which is then trained
        self.optimizer = make_optimizer(model, optim.name, optim.rate, **optim.settings())
        self.hooks = [*own, *optimizer_hooks(self.optimizer), *hooks]
        self.layerwise = Layerwise(self.optimizer, optim.name, self.hooks, self.world) if optim.layerwise else None
        self.teacher = the_teacher(self.hooks, train.gradient_checkpointing)
        if train.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        if any(hook.freezes for hook in self.hooks):  # or gradients would be waited for that do not come
            unused: Any = DistributedDataParallelKwargs(find_unused_parameters=True)
            self.accelerator.ddp_handler = unused
        objective = Objective(model, train.loss_chunk_mib * 2**20, train.precision)
        self.apart = leave_out(objective)
        self.objective: Any = self.accelerator.prepare_model(objective, device_placement=False)
        self.device = next(model.parameters()).device
        self.evaluating = Evaluating(self, objective) if getattr(self.optimizer, "closure", False) else None
        self.main = self.accelerator.is_main_process
        self.checkpoints = Checkpoints(folder / "checkpoints", train.keep) if folder is not None else None
        self.metrics = Metrics(folder if self.main else None, train.tensorboard)
        self.progress = progress and self.main
        self.step = 0

    def run(self) -> History:
        """Train from where it stands to the last step."""
        self.memory = PeakMemory(self.device)
        self.model.train()
        self._call("on_start")
        bar = Bar(self.title, self.steps, self.step, self.progress)
        faster = compiled(self.model) if self.train.compile else contextlib.nullcontext()
        with self._attention(), faster, self.metrics, bar:
            while self.step < self.steps:
                notes = self._guarded_step()
                bar.advance(1, notes)
                if self.train.save_every and self.step % self.train.save_every == 0 and self.step < self.steps:
                    self.save()
        self._call("on_end")
        self.model.eval()
        return self.history

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        """Within the block packed documents lie in one row, where the model can attend document by document."""
        if not self.collator.packing:
            yield
            return
        with by_document(self.model) as works:
            self.collator = replace(self.collator, by_document=works)
            yield

    # ---- one step -------------------------------------------------------------------------------------------------

    def _guarded_step(self) -> dict[str, str]:
        try:
            return self._step()
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"the device ran out of memory at step {self.step}: halve train.batch_size and double train.accumulate "
                "(the result is the same), shorten data.max_length, or set train.gradient_checkpointing=true."
            ) from error

    def _step(self) -> dict[str, str]:
        """Take one optimizer step; return what the progress bar shows."""
        started = time.perf_counter()
        self.step += 1
        examples = [self.examples[i] for i in self.sampler.take(self.train.batch_size * self.train.accumulate)]
        learned = sum(example.learned for example in examples)
        if not learned:
            raise TrainingError(
                f"no token of the batch of step {self.step} has a label: look at data.max_length and the data."
            )
        factor = learning_rate_factor(self.optim.schedule, self.step - 1, self.steps, self.optim.warmup)
        rate = set_learning_rate(self.optimizer, factor)
        self.optimizer.zero_grad(set_to_none=True)
        batches = self.collator.micro_batches(examples, self.train.accumulate, self.rank, self.world)
        act = self._act if self.layerwise is None else self._act_layerwise
        act = act if self.evaluating is None else self._act_evaluating
        loss, norm = act(batches, learned)
        tokens, seconds = sum(len(e.input_ids) for e in examples), time.perf_counter() - started
        self._remember(loss, tokens, seconds)
        return self._log(loss, rate, norm, tokens / seconds)

    def _act(self, batches: list[Batch], learned: int) -> tuple[float, float]:
        """Gather the whole gradient, then step; return the loss and the norm of the gradient."""
        loss = self._backward(batches, learned)
        add_penalties(self.hooks, self._moment())
        norm = self._clip()
        self._check_finite(loss, norm)
        self._call("after_backward")
        self.optimizer.step()
        self._call("after_step")
        return loss, norm

    def _act_layerwise(self, batches: list[Batch], learned: int) -> tuple[float, float]:
        """Step in the backward pass of the last micro-batch; see `train.layerwise`."""
        assert self.layerwise is not None
        if self.optim.clip is None:
            self.layerwise.factor = 1.0
            return self._backward(batches, learned, "step"), self.layerwise.norm
        if len(batches) > 1:
            return self._act(batches, learned)
        kept = random_states()
        loss = self._backward(batches, learned, "measure")
        norm = self.layerwise.norm
        self._check_finite(loss, norm)
        self.layerwise.factor = min(1.0, self.optim.clip / (norm + 1e-6))  # as torch clips
        restore_random_states(kept)
        self._backward(batches, learned, "step", again=True)
        return loss, norm

    def _act_evaluating(self, batches: list[Batch], learned: int) -> tuple[float, float]:
        """Let the optimizer evaluate the loss itself; no gradient is left, and so no norm of it."""
        assert self.evaluating is not None
        self._call("before_forward")
        loss = self.evaluating.step(batches, learned, self._moment())
        self._check_finite(loss, 0.0)
        self._call("after_step")
        return loss, 0.0

    def _backward(self, batches: list[Batch], learned: int, mode: Mode = "gather", again: bool = False) -> float:
        """Run forward and backward of all micro-batches; return the mean loss over the global batch.

        mode: what layer-wise updates do in the last micro-batch; again: this is the second time for these batches.
        """
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            if not again:
                self._call("before_forward")
            last = i == len(batches) - 1
            sums = last and mode == "gather"  # layer-wise updates sum over processes themselves
            engaged = self.layerwise.doing(mode) if last and self.layerwise is not None else contextlib.nullcontext()
            with engaged, contextlib.nullcontext() if sums else self.accelerator.no_sync(self.objective):
                batch = batch.to(self.device)
                summed = self.objective(batch.inputs, batch.labels, batch.documents, self.teacher)
                # Several processes average their gradients, so each share is multiplied by how many there are.
                (summed * (self.world / learned)).backward()
            total += summed.detach().float()
        if mode == "gather":
            average_gradients(self.apart, self.world)
        return float(self.accelerator.reduce(total, "sum")) / learned  # type: ignore[arg-type]

    def _clip(self) -> float:
        """Clip the gradients to the largest norm allowed; return their norm before."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.optim.clip is not None and math.isfinite(float(norm)):
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grads_with_norm_(parameters, self.optim.clip, norm)
        return float(norm)

    def _check_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"the loss became {loss}" if not math.isfinite(loss) else f"the norm of the gradient became {norm}"
        kept = self.checkpoints.newest() if self.checkpoints is not None else None
        raise DivergedError(
            f"training stopped at step {self.step}: {what}. Nothing of that step was applied. "
            + (f"The last good checkpoint is {kept}. " if kept else "")
            + f"Try a smaller optim.lr (it is {self.optim.lr:g}), a longer warmup, or train.precision=float32."
        )

    # ---- bookkeeping ----------------------------------------------------------------------------------------------

    def _moment(self) -> Moment:
        epoch = len(self.examples) / (self.train.batch_size * self.train.accumulate)
        return Moment(self.model, self.optimizer, self.step, self.steps, epoch)

    def _call(self, name: str) -> None:
        moment = self._moment()
        for hook in self.hooks:
            getattr(hook, name)(moment)

    def _remember(self, loss: float, tokens: int, seconds: float) -> None:
        history = self.history
        history.losses.append(loss)
        history.tokens += tokens
        history.seconds += seconds
        history.peak_memory_bytes = max(history.peak_memory_bytes, self.memory.peak)

    def _log(self, loss: float, rate: float, norm: float, speed: float) -> dict[str, str]:
        history = self.history
        if self.step % self.train.log_every == 0 or self.step == self.steps:
            self.metrics.write(
                {
                    "step": self.step,
                    "loss": loss,
                    "lr": rate,
                    "grad_norm": norm,
                    "tokens_per_second": round(speed, 1),
                    "peak_memory_bytes": history.peak_memory_bytes,
                    "elapsed": round(history.seconds, 3),
                }
            )
        if self.evaluate is not None and self.train.eval_every and self.step % self.train.eval_every == 0:
            measured = self.evaluate()
            history.valid.append({"step": self.step, **measured})
            self.metrics.write({"step": self.step, "valid": measured})
        memory = megabytes(history.peak_memory_bytes)
        return {"loss": f"{loss:.3f}", "tokens/s": f"{history.tokens_per_second:.0f}", "memory": memory}

    def save(self) -> None:
        """Write a checkpoint from which `restore` goes on bit for bit."""
        if self.checkpoints is None:
            return
        generators = gather_object([random_states()])
        if self.main:
            names = [name for group in self.optimizer.param_groups for name in group.get("names", ())]
            state = {
                "step": self.step,
                "sampler": self.sampler.state_dict(),
                "random": generators,
                "hooks": hook_states(self.hooks),
                "history": vars(self.history),
                "settings": site_settings(self.model),
                "names": names,
            }
            parts = {
                "weights": dict(trained_tensors(self.model, self.optimizer)),
                "optimizer": self.optimizer.state_dict(),
                "run": state,
            }
            self.checkpoints.save(self.step, parts)
        self.accelerator.wait_for_everyone()

    def restore(self) -> bool:
        """Go on from the newest whole checkpoint; return False where there is none."""
        path = self.checkpoints.newest() if self.checkpoints is not None else None
        if path is None or self.checkpoints is None:
            return False
        parts = self.checkpoints.load(path, PARTS)
        state = parts["run"]
        adopt_settings(self.model, state["settings"])
        rebind(self.optimizer, self.model)
        restore_hooks(self.hooks, state["hooks"], str(path))
        load_trained_tensors(self.model, parts["weights"], self.optimizer)
        names = [name for group in self.optimizer.param_groups for name in group.get("names", ())]
        if names != state["names"] or len(state["random"]) != self.world:
            raise TrainingError(
                f"{path} was written by a run with other trained parameters or another number of processes."
            )
        self.optimizer.load_state_dict(parts["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.step, self.history = state["step"], History(**state["history"])
        self.metrics.rewind(self.step)
        restore_random_states(state["random"][self.rank])
        return True


def packs(model: nn.Module, examples: Sequence[Example], train: TrainConfig) -> bool:
    """Decide whether rows hold several examples; raises `ConfigError` where that was asked for and would leak."""
    several = any(len(example.segments) > 1 for example in examples)
    classifies = bool(examples) and examples[0].label is not None
    if classifies or (train.packing is False and not several):
        return False
    apart = separates_documents(model)
    if not apart and (train.packing is True or several):
        raise ConfigError(
            f"{type(model).__name__} does not keep documents in one row apart (their position ids restart, its "
            "attention does not): set train.packing=false; plain text needs another model."
        )
    return apart and train.packing is not False


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass, without re-entrance: frozen inputs need no gradient for it."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the newer and the older
    enable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if enable is None:
        raise ConfigError(
            f"{type(model).__name__} has no gradient checkpointing: set train.gradient_checkpointing=false."
        )
    enable({"use_reentrant": False})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]
