"""Hooks in a run: `HookCallback` carries them into the HF Trainer and TRL's trainers, and their state is kept.

The protocol itself, and when each moment comes, is `core.hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rankworks.core.errors import ConfigError, TrainingError
from rankworks.core.hooks import Hook, Moment, method_hooks, optimizer_hooks
from rankworks.train.tensors import read_tree, write_tree


class HookCallback(TrainerCallback):
    """A transformers callback that carries hooks: `Trainer(..., callbacks=[HookCallback()])`.

    The hooks that the adapted model's methods and an optimizer of `rw.make_optimizer` ask for come by themselves,
    before those given. Their state is written
    beside each checkpoint of the Trainer and read again when it resumes.
    """

    FILE = "rankworks_hooks"

    def __init__(self, hooks: Sequence[Hook] = ()):
        self.given, self.hooks = list(hooks), list(hooks)
        self._model: Any = None
        self._optimizer: Any = None

    def _call(self, name: str, state: Any, step: int, keywords: dict[str, Any]) -> None:
        moment = self._moment(state, step, keywords)
        for hook in self.hooks:
            getattr(hook, name)(moment)

    def _moment(self, state: Any, step: int, keywords: dict[str, Any]) -> Moment:
        self._model = keywords.get("model", self._model)
        self._optimizer = keywords.get("optimizer") or self._optimizer
        optimizer = getattr(self._optimizer, "optimizer", self._optimizer)  # accelerate wraps the torch optimizer
        done, passes = (state.global_step, state.epoch) if state.epoch else (state.max_steps, state.num_train_epochs)
        return Moment(self._model, optimizer, step, state.max_steps, done / passes if passes else None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Restore the hooks of a resumed run and start them."""
        optimizer = keywords.get("optimizer")
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.hooks = [*method_hooks(keywords["model"]), *optimizer_hooks(optimizer), *self.given]
        if any(hook.teaches for hook in self.hooks):
            raise ConfigError(
                "a Trainer's loss knows the labels alone, and here the model learns from a teacher too: train with "
                "rankworks' own loop, or set ranks.full_pass=false."
            )
        if state.global_step > 0:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            restore_hooks(self.hooks, read_tree(folder, self.FILE)["hooks"], str(folder))
        self._call("on_start", state, state.global_step, keywords)

    def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """The first micro-batch of a step is about to run; penalties are of the weights, which stay until its end."""
        moment = self._moment(state, state.global_step + 1, keywords)
        add_penalties(self.hooks, moment)
        self._call("before_forward", state, state.global_step + 1, keywords)

    def on_substep_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """A micro-batch that is not the last of its step is done, so another one follows."""
        self._call("before_forward", state, state.global_step + 1, keywords)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Gradients are complete."""
        self._call("after_backward", state, state.global_step + 1, keywords)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """The optimizer acted."""
        self._call("after_step", state, state.global_step + 1, keywords)

    def on_train_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """The run is over."""
        self._call("on_end", state, state.global_step, keywords)

    def on_save(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Write the hooks' state into the Trainer's checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_tree(folder, self.FILE, {"hooks": hook_states(self.hooks)})


def the_teacher(hooks: Sequence[Hook], checkpointing: bool) -> Callable[[], AbstractContextManager[None]] | None:
    """Return the context of the hook that teaches, if there is one; raises `ConfigError` for what does not go with it.

    checkpointing: activations are computed again in the backward pass, where the context is no longer open.
    """
    found = [hook.teacher for hook in hooks if hook.teaches]
    if found and checkpointing:
        raise ConfigError(
            "with gradient checkpointing layers run again in the backward pass, where a teacher is the model it "
            "teaches: set train.gradient_checkpointing=false, or ranks.full_pass=false."
        )
    if len(found) > 1:
        raise ConfigError("two adapters each want to teach the model: set ranks.full_pass=false for one of them.")
    return found[0] if found else None


def add_penalties(hooks: Sequence[Hook], moment: Moment) -> None:
    """Add the gradients of the hooks' penalties to those that are there."""
    for hook in hooks:
        term = hook.penalty(moment)
        if term is not None and term.requires_grad:
            term.backward()


def hook_states(hooks: Sequence[Hook]) -> list[dict[str, Any]]:
    """Return the state of every hook with its class's name."""
    return [{"hook": type(hook).__name__, "state": hook.state_dict()} for hook in hooks]


def restore_hooks(hooks: Sequence[Hook], states: list[dict[str, Any]], where: str) -> None:
    """Give every hook its state back; raises `TrainingError` when the hooks are not those that were saved."""
    saved, given = [s["hook"] for s in states], [type(hook).__name__ for hook in hooks]
    if saved != given:
        raise TrainingError(
            f"{where} was written by a run with the hooks {saved}, this run has {given}: use the same hooks."
        )
    for hook, state in zip(hooks, states, strict=True):
        hook.load_state_dict(state["state"])
