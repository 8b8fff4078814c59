"""Models whose changes act times weights, and toy problems, for the tests of selections that search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.hooks import Moment
from rankworks.core.registry import build
from rankworks.core.scaled import scaled
from rankworks.core.state import state_of
from rankworks.core.targets import find_sites
from rankworks.train.batching.batches import Batch, Collator, Example
from rankworks.train.searching.relax import Relaxed, ScoreSteps, WholeObjective
from tiny import tiny_gpt2, token_batch


def language_model(layers: int = 3) -> nn.Module:
    """A GPT-2 in float64: unlike Llama it computes nothing in float32 by itself."""
    return tiny_gpt2(vocab=32, hidden=8, layers=layers).double()


def batches(count: int = 1, seed: int = 0) -> list[Batch]:
    """Batches of tokens that are all learned."""
    made = []
    for i in range(count):
        rows = token_batch(vocab=32, batch=3, length=6, seed=seed + i).tolist()
        made.append(Collator().batch([Example(tuple(row), tuple(row)) for row in rows]))
    return made


@contextmanager
def relaxed(model: nn.Module, select: dict[str, Any], delta: str = "lora", **settings: Any) -> Iterator[Relaxed]:
    """Adapt every unit, move everything that is trained, and let the changes act times their weights."""
    spec: Any = build("selection", select)
    selection = spec.method.cls(spec)
    units = selection.units(find_sites(model, settings.get("targets", "all-linear")))
    rw.adapt(model, delta, **{"rank": 2, "select": {**select, "chosen": list(units)}, **settings})
    with torch.no_grad():
        for parameter in state_of(model).adapter("default").parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    with scaled(model) as changes:
        made = Relaxed(selection, units, changes)
        made.act()
        yield made


def differences(loss: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a function of the scores."""
    found = torch.zeros_like(at)
    for i in range(len(at)):
        moved = torch.zeros_like(at)
        moved[i] = step
        found[i] = (loss(at + moved) - loss(at - moved)) / (2 * step)
    return found


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss."""
    logits = model(**batch.inputs).logits[:, :-1]  # (rows, width - 1, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())


# ---- a toy problem -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two modules that read the same input and add to the output."""

    def __init__(self, width: int):
        super().__init__()
        self.left, self.right = (nn.Linear(width, width, bias=False) for _ in range(2))


class Parallel(nn.Module):
    """y = sum over layers of (left + right)(x_l): what each module can learn is its own affair."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 2 layers, width) -> (rows, width)."""
        return sum(  # type: ignore[return-value]
            block.left(x[:, 2 * i]) + block.right(x[:, 2 * i + 1])  # type: ignore[operator]
            for i, block in enumerate(self.layers)
        )


class Squares(WholeObjective):
    """The summed squared error."""

    def forward(self, inputs: dict[str, Tensor], labels: Tensor, documents: Any = None) -> Tensor:
        return (self.model(inputs["x"]) - labels).square().sum()


def toy_scores(select: dict[str, Any], useful: list[str], layers: int = 3, steps: int = 30) -> dict[str, float]:
    """Search on data whose targets need a change of the modules `useful` and of no other; return the scores."""
    width, model = 4, Parallel(layers, 4)
    teacher = Parallel(layers, width)
    teacher.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name in useful:
            teacher.get_submodule(name).weight.add_(torch.randn(width, width))  # type: ignore[union-attr,operator]

    def batch(rows: int) -> Batch:
        x = torch.randn(rows, 2 * layers, width)
        with torch.no_grad():
            labels = teacher(x) + 0.3 * torch.randn(rows, width)
        return Batch({"x": x}, labels, rows, rows)

    data, held = batch(16), batch(64)
    with relaxed(model, select, rank=width, alpha=width) as search:
        with torch.no_grad():
            for change in search.changes.values():
                change.owner.B.zero_()  # type: ignore[union-attr,operator]
        objective = Squares(model)
        hook = ScoreSteps(search, objective, [None], [None], rate=0.05, batch_size=1, count=1)  # type: ignore[list-item]
        hook._take = lambda name, _, count: [held if name == "held_out" else data] * count  # type: ignore[method-assign]
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            (objective(data.inputs, data.labels) / data.learned).backward()
            optimizer.step()
            hook.after_step(Moment(model, optimizer, step, steps))
        return dict(zip(search.units, search.scores.tolist(), strict=True))
