"""The records that are measured are a fair sample: every class in its share, whatever the order of the data."""

from __future__ import annotations

from collections import Counter

import pytest

from rankworks.train.config import EvaluateConfig
from rankworks.train.measuring.measure import Evaluator
from rankworks.train.prepare import Prepared
from rankworks.train.sources import Task
from rankworks.train.sources.template import Template
from tiny import byte_tokenizer, tiny_llama

CLASSES = ["red", "green", "blue", "white", "black"]


@pytest.mark.parametrize("limit", [10, 20, 25, 50])
def test_a_limit_that_is_a_multiple_of_the_classes_keeps_all_of_them(limit: int) -> None:
    records = [{"text": f"item {i}", "label": CLASSES[i % 5]} for i in range(100)]
    task = Task(
        "classification", records, records, "colours", classes=CLASSES, template=Template(classes=tuple(CLASSES))
    )
    prepared = Prepared(task, tiny_llama(), byte_tokenizer(), progress=False)
    evaluator = Evaluator(prepared, task.test, EvaluateConfig(limit=limit))
    assert Counter(record["label"] for record in evaluator.records) == dict.fromkeys(CLASSES, limit // 5)
    assert [record["text"] for record in evaluator.shown] == [record["text"] for record in evaluator.records[:3]]
