"""A tiny adapted model trained by the HF Trainer with one of our optimizers, from its start or from a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from training import adapted, weights  # type: ignore[import-not-found]

import rankworks as rw
from rankworks.core.hooks import Hook
from rankworks.train.hooks import HookCallback


def trained(
    folder: Path,
    name: str,
    options: dict[str, Any],
    *,
    hooks: Sequence[Hook] = (),
    resume: str | None = None,
    **arguments: Any,
) -> tuple[nn.Module, list[float]]:
    """Return the model after some steps on the same rows, and the losses on the way; checkpoints stand in `folder`."""
    rows = torch.randint(3, 250, (24, 16), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to=[],
        save_strategy="steps",
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **arguments,
    )
    model = adapted()
    optimizer = rw.make_optimizer(model, name, **options)
    callbacks = [HookCallback(list(hooks))] if hooks else [HookCallback()]
    trainer = Trainer(model, settings, train_dataset=data, callbacks=callbacks, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / resume))
    return model, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def check_learned_and_resumed(model: nn.Module, losses: list[float], again: nn.Module) -> None:
    """The loss fell, and a run from a checkpoint ended with the same weights."""
    assert sum(losses[-3:]) < sum(losses[:3])
    for key, tensor in weights(model).items():
        torch.testing.assert_close(weights(again)[key], tensor, atol=1e-6, rtol=0)
