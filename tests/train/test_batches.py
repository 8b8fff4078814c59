"""Order, shares and shapes of batches."""

from __future__ import annotations

import pytest

from rankworks.core.errors import ConfigError, DataError
from rankworks.train.batching.batches import Collator, Example, Sampler
from rankworks.train.losses.loss import IGNORE


def example(length: int, learned: int = 2, start: int = 3) -> Example:
    ids = tuple(range(start, start + length))
    return Example(ids, (*[IGNORE] * (length - learned), *ids[length - learned :]))


def test_every_pass_takes_every_example_once_in_another_order():
    sampler = Sampler(7, seed=3)
    first, second = sampler.take(7), sampler.take(7)
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert sampler.epoch == 2


def test_a_batch_may_cross_a_pass_and_the_position_is_the_whole_state():
    whole = Sampler(5, seed=1).take(20)
    sampler = Sampler(5, seed=1)
    parts = sampler.take(3) + sampler.take(4)
    state = sampler.state_dict()
    resumed = Sampler(5, seed=1)
    resumed.load_state_dict(state)
    assert parts + resumed.take(13) == whole
    assert Sampler(5, seed=2).take(20) != whole


def test_another_data_set_or_seed_is_refused():
    state = Sampler(5, seed=1).state_dict()
    with pytest.raises(DataError, match="5 examples and seed 1"):
        Sampler(6, seed=1).load_state_dict(state)
    with pytest.raises(DataError, match="at least one record"):
        Sampler(0)


def test_the_parts_of_a_global_batch_are_the_batch():
    examples = [example(n, start=100 * i) for i, n in enumerate([4, 9, 3, 8, 5, 7, 6, 10])]
    collator = Collator()
    for accumulate, world in ((1, 1), (2, 1), (1, 2), (2, 2), (8, 1)):
        shares = [collator.micro_batches(examples, accumulate, rank, world) for rank in range(world)]
        assert all(len(share) == accumulate for share in shares)
        batches = [batch for share in shares for batch in share]
        assert sum(b.learned for b in batches) == sum(e.learned for e in examples) == 16
        assert sum(b.tokens for b in batches) == 52
        firsts = sorted(row[0] for b in batches for row in b.inputs["input_ids"].tolist())
        assert firsts == sorted(e.input_ids[0] for e in examples)


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match="3 examples cannot be cut into 2 x 1"):
        Collator().micro_batches([example(4)] * 3, 2)


def test_padding_and_width():
    batch = Collator(pad=0, multiple=8).batch([example(3), example(5)])
    assert batch.inputs["input_ids"].shape == (2, 8)
    assert batch.inputs["input_ids"][0].tolist() == [3, 4, 5, 0, 0, 0, 0, 0]
    assert batch.labels[0].tolist() == [IGNORE, 4, 5, *[IGNORE] * 5]
    assert batch.inputs["position_ids"][1].tolist() == list(range(8))


def test_packed_positions_restart_for_every_document_and_for_the_padding():
    row = Example((5, 6, 7, 8, 9), (5, 6, 7, 8, 9), segments=(2, 3))
    batch = Collator(packing=True, multiple=8).batch([row])
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 4, 5]]
    assert batch.labels.tolist() == [[IGNORE, 6, IGNORE, 8, 9, IGNORE, IGNORE, IGNORE]]
    two = Collator(packing=True, multiple=8).batch([example(3), example(2)])
    if two.inputs["input_ids"].shape[0] == 1:
        assert two.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert row.learned == batch.learned == 3


def test_classifier_batches_have_a_mask_and_one_label_a_row():
    batch = Collator(pad=0).batch([Example((5, 6, 7), label=2), Example((8,), label=0)])
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [2, 0]
    assert batch.learned == 2
