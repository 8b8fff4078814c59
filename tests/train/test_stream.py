"""Learning from a stream: every token is scored once, before anything is learned from it, within the window."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import rankworks as rw
from rankworks.core.errors import ConfigError, DivergedError
from rankworks.core.state import state_of
from rankworks.core.store import adapter_state
from tiny import tiny_gpt2, tiny_llama

TOKENS = torch.randint(1, 300, (90,), generator=torch.Generator().manual_seed(0)).tolist()


def locas(build: Any = tiny_llama, rank: int = 4) -> Any:
    return rw.adapt(build(), "locas", rank=rank)


@torch.no_grad()
def by_hand(model: Any, chunk: int, window: int) -> list[float]:
    """The summed loss of every chunk after the earlier tokens that fit into the window with it."""
    sums = []
    for start in range(0, len(TOKENS), chunk):
        end = min(start + chunk, len(TOKENS))
        first = max(0, start - (window - chunk))
        ids = torch.tensor([TOKENS[first:end]])
        logp = model(ids).logits[0].float().log_softmax(-1)
        scored = range(max(1, start - first), end - first)
        sums.append(-float(sum(logp[t - 1, ids[0, t]] for t in scored)))
    return sums


def test_without_learning_it_scores_every_token_once_after_what_fits_before_it() -> None:
    model = locas()
    before = {k: t.clone() for k, t in adapter_state(model).items()}
    stream = rw.Stream(model, chunk=16, window=40, learn=False)
    chunks = stream.read(TOKENS)
    assert [c.start for c in chunks] == [0, 16, 32, 48, 64, 80]
    assert [c.tokens for c in chunks] == [15, 16, 16, 16, 16, 10]  # the very first token follows nothing
    for found, wanted in zip(chunks, by_hand(model, 16, 40), strict=True):
        assert found.loss * found.tokens == pytest.approx(wanted, rel=1e-5)
    assert stream.perplexity == pytest.approx(math.exp(sum(by_hand(model, 16, 40)) / 89), rel=1e-5)
    assert all(torch.equal(t, before[k]) for k, t in adapter_state(model).items())


def test_a_chunk_is_scored_before_it_is_learned_from() -> None:
    """So the first chunk's loss is the base's own, and the second's that of one step by hand."""
    model, reference = rw.adapt(tiny_llama(), "lora", rank=4), rw.adapt(tiny_llama(), "lora", rank=4)
    stream = rw.Stream(model, chunk=16, window=40, lr=1e-2)
    first, second = stream.read(TOKENS[:32])
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    ids = torch.tensor([TOKENS[:32]])
    loss = F.cross_entropy(reference(ids[:, :16]).logits[0, :-1], ids[0, 1:16])
    assert first.loss == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        wanted = F.cross_entropy(reference(ids).logits[0, 15:-1], ids[0, 16:])
    assert second.loss == pytest.approx(wanted.item(), rel=1e-5)
    assert not model.training


def test_pieces_of_the_stream_are_the_stream() -> None:
    whole, pieces = locas(), locas()
    rw.Stream(whole, chunk=16, window=40).read(TOKENS)
    stream = rw.Stream(pieces, chunk=16, window=40)
    for start in (0, 32, 64):
        stream.read(TOKENS[start : start + 32])
    for key, tensor in adapter_state(whole).items():
        assert torch.equal(tensor, adapter_state(pieces)[key])


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_memory_starts_from_the_first_chunk_and_learns_what_comes_again(build: Any) -> None:
    """The same passage over and over: read with a memory it becomes likelier, and without learning it does not."""
    passage = TOKENS[:32]
    model = locas(build, rank=16)
    start = {k: t.clone() for k, t in adapter_state(model).items()}
    stream = rw.Stream(model, chunk=32, window=48, lr=2e-2)
    stream.read(passage * 12)
    fixed = rw.Stream(locas(build, rank=16), chunk=32, window=48, learn=False)
    fixed.read(passage * 12)
    assert stream.chunks[0].loss == pytest.approx(fixed.chunks[0].loss, rel=1e-5)
    assert stream.chunks[-1].loss < fixed.chunks[-1].loss - 0.2
    assert stream.perplexity < fixed.perplexity
    assert any(not torch.equal(t, start[k]) for k, t in adapter_state(model).items())


def test_the_base_is_never_touched() -> None:
    model = locas()
    base = {k: p.clone() for k, p in model.named_parameters() if not p.requires_grad}
    rw.Stream(model, chunk=16, window=40).read(TOKENS)
    now = dict(model.named_parameters())
    assert all(torch.equal(p, now[k]) for k, p in base.items())
    assert all(p.grad is None for p in state_of(model).adapter("default").parameters())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="window"):
        rw.Stream(locas(), chunk=64, window=64)
    with pytest.raises(ConfigError, match="no adapter"):
        rw.Stream(tiny_llama())


def test_a_loss_that_is_not_finite_stops_it_before_it_learns() -> None:
    model = locas()
    with torch.no_grad():
        for parameter in state_of(model).adapter("default").parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(DivergedError, match=r"lower lr"):
        rw.Stream(model, chunk=16, window=40).read(TOKENS)
