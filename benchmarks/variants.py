"""What `train_step.py` compares: the frozen model, rankworks and peft, each as a step on given tokens or examples.

All share the base's parameters. Factors start away from zero, as after some steps, so that nothing is free because
it multiplies by zero. A step is forward and backward; gradients are dropped after it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import sharing_copy
from torch import Tensor, nn

RANK, ALPHA, DROPOUT = 16, 32, 0.05
MODEL = "smollm2-135m"

FULL = {
    "floor": lambda m: floor(m),
    "lora": lambda m: ours(m, "lora"),
    "lora-dropout": lambda m: ours(m, "lora", dropout=DROPOUT),
    "dora": lambda m: ours(m, "dora"),
    "peft-lora": lambda m: peft(m),
    "peft-lora-dropout": lambda m: peft(m, lora_dropout=DROPOUT),
    "peft-dora": lambda m: peft(m, use_dora=True),
}
"""Full logits: transformers' own loss on every token."""

TASK = {
    "floor-task": lambda m: floor(m),
    "peft-task": lambda m: peft(m),
    "ours-task": lambda m: ours(m, "lora"),
    "ours-task-compiled": lambda m: ours(m, "lora"),
}
"""The real task: examples of the data set, padded to the longest for `floor` and `peft`, packed for `ours`."""


def floor(model: nn.Module) -> nn.Module:
    """The frozen model, with gradients down to the embeddings' output: what every method has to pay."""
    model.requires_grad_(False)
    model.enable_input_require_grads()  # type: ignore[operator]
    return model


def ours(model: nn.Module, delta: str, **settings: Any) -> nn.Module:
    """Rankworks on all seven projections."""
    import rankworks as rw

    return _moved(rw.adapt(model, delta, rank=RANK, alpha=ALPHA, targets="all-linear", **settings))


def peft(model: nn.Module, **settings: Any) -> nn.Module:
    """Peft on all seven projections."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
        return _moved(get_peft_model(model, config))  # type: ignore[arg-type]


def _moved(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 2:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(model: nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def load() -> tuple[nn.Module, Any]:
    """Return the sample model in float32 and its tokenizer."""
    import rankworks as rw

    return rw.load_model(MODEL, dtype="float32")


def full_step(name: str, base: nn.Module, tokens: Callable[[int], Tensor]) -> tuple[Callable[[int], object], int]:
    """Return the step of a full-logit variant on `tokens(round)` (batch, length), and its number of trained numbers."""
    model = FULL[name](sharing_copy(base)).train()

    def step(round_: int) -> None:
        ids = tokens(round_)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return step, trained(model)


FOR_GOOD = contextlib.ExitStack()
"""What stays entered as long as the process runs."""


def task_step(
    name: str, base: nn.Module, examples: Callable[[int], list[Any]], pad: int
) -> tuple[Callable[[int], object], int]:
    """Return the step of a variant on the examples of a round: ours packed, with logits where a label stands."""
    from rankworks.train.batching.batches import Collator
    from rankworks.train.batching.documents import by_document
    from rankworks.train.compiled import compiled
    from rankworks.train.losses.objective import Objective

    model = TASK[name](sharing_copy(base)).train()
    own = name.startswith("ours")
    attention = by_document(model) if own else contextlib.nullcontext(False)
    apart = FOR_GOOD.enter_context(attention)
    collator = Collator(pad, packing=own, by_document=apart)
    if name.endswith("compiled"):
        FOR_GOOD.enter_context(compiled(model))
    objective = Objective(model) if own else None

    def step(round_: int) -> None:
        batch = collator.batch(examples(round_))
        if objective is not None:
            (objective.loss(batch) / batch.learned).backward()
        else:
            mask = padding_mask([len(e.input_ids) for e in examples(round_)], batch.labels.shape[1])
            ids = batch.inputs["input_ids"]
            model(input_ids=ids, attention_mask=mask, labels=batch.labels, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return step, trained(model)


def padding_mask(lengths: list[int], width: int) -> Tensor:
    """Return (rows, width) with ones where a token stands."""
    return (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()


def data(tokenizer: Any, model: nn.Module, batch: int, length: int) -> tuple[Callable, Callable, int]:
    """Return `tokens(round)` (batch, length) of joined articles, `examples(round)` of the task, and the padding id."""
    from rankworks.train.prepare import Prepared
    from rankworks.train.sources import load_task

    task = load_task({"name": "bbc-news", "max_length": length})
    prepared = Prepared(task, model, tokenizer, progress=False)
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.tensor(tokenizer("\n\n".join(task.train[i]["text"] for i in order[:400]))["input_ids"])
    stream = ids[: len(ids) // (batch * length) * batch * length].view(-1, batch, length)
    examples = prepared.examples([task.train[i] for i in order[: 64 * batch]], "train")

    def of_round(round_: int) -> list[Any]:
        start = round_ * batch % len(examples)
        return examples[start : start + batch]

    return lambda round_: stream[round_ % len(stream)], of_round, prepared.pad


def useful(examples: list[Any]) -> int:
    """Return the tokens that are not padding."""
    return sum(len(e.input_ids) for e in examples)
