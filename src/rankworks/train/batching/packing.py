"""Put sequences of different lengths into few rows with little padding, none of them seeing another.

A row holds several sequences one after the other. Their position ids restart at zero, which tells transformers (5 and
newer) to make attention block-diagonal when no attention mask is given; `separates_documents` tries that on the very
model before it is relied upon. Since the loss is normalised over the labels of the whole batch, packing changes the
speed of a run and not its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from rankworks.train.losses.heads import evaluating, split_model
from rankworks.train.tried import remembered

ATTENTION_COST = 4000.0
"""Row length at which attention costs about as much as everything else (6 x hidden width for a 600-wide model)."""


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of indices into `lengths`, each row's sum at most `capacity`: first-fit decreasing, deterministic."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        place = next((i for i, free in enumerate(room) if free >= length), None)
        if place is None:
            rows.append([index])
            room.append(max(capacity, length) - length)
        else:
            rows[place].append(index)
            room[place] -= length
    return rows


def cheapest_rows(lengths: Sequence[int], attention_cost: float = ATTENTION_COST) -> list[list[int]]:
    """Return the packing with the least work: rows x width x (1 + width / attention_cost), over several capacities."""
    longest, total = max(lengths), sum(lengths)
    widths = {min(total, round(longest * factor)) for factor in (1, 1.15, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8)}
    best: tuple[float, list[list[int]]] | None = None
    for capacity in sorted(widths):
        rows = first_fit(lengths, capacity)
        width = max(sum(lengths[i] for i in row) for row in rows)
        cost = len(rows) * width * (1 + width / attention_cost)
        if best is None or cost < best[0]:
            best = (cost, rows)
    assert best is not None
    return best[1]


def separates_documents(model: nn.Module) -> bool:
    """Try on the model whether restarting position ids alone keep packed documents apart."""
    return packed_as_alone(model)


def packed_as_alone(
    model: nn.Module,
    extra: Callable[[Sequence[int], torch.device], dict[str, Any]] | None = None,
    tolerance: float = 1e-3,
) -> bool:
    """Try on the model whether documents packed in one row come out as they do alone.

    Three short documents, with padding behind, are computed both ways; their hidden states must agree to `tolerance` of
    the largest. `extra(lengths, device)` gives what a packed call gets besides the tokens and their positions.
    """
    question = f"packed {getattr(extra, '__qualname__', extra)} {tolerance}"
    return remembered(model, question, lambda: _packed_as_alone(model, extra, tolerance))


def _packed_as_alone(
    model: nn.Module, extra: Callable[[Sequence[int], torch.device], dict[str, Any]] | None, tolerance: float
) -> bool:
    split = split_model(model)
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    weight = embeddings.weight
    cuda = [weight.device] if weight.device.type == "cuda" else []
    lengths = [3, 5, 2]
    ids = (torch.arange(sum(lengths), device=weight.device) * 7 + 3) % weight.shape[0]
    positions = torch.cat([torch.arange(n, device=weight.device) for n in [*lengths, 1]])

    def run(tokens: torch.Tensor, places: torch.Tensor, **more: Any) -> torch.Tensor:
        inputs = {"input_ids": tokens[None], "position_ids": places[None], "use_cache": False, **more}
        return (split.hidden(**inputs) if split is not None else model(**inputs).logits)[0]  # (length, width)

    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=cuda):
        more = {} if extra is None else extra([*lengths, 1], weight.device)
        try:
            packed = run(torch.cat([ids, ids[:1]]), positions, **more)[:-1]
        except (TypeError, ValueError, RuntimeError, AttributeError):  # the model takes no such inputs
            return False
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        alone = torch.cat([run(ids[a:b], positions[a:b]) for a, b in pairwise(starts)])
    scale = alone.abs().max().clamp_min(1e-6)
    slack = tolerance if alone.dtype in (torch.float32, torch.float64) else 5e-2
    return bool(((packed - alone).abs().max() <= slack * scale).item())
