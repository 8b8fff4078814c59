"""Every registered method against every check: a new method is tested by being registered."""

from __future__ import annotations

import pytest

import rankworks as rw
from rankworks.conformance import checks, run_check
from rankworks.core.registry import get

AXES = {c_axis for c in checks() for c_axis in c.axes}
PAIRS = [
    pytest.param(method.axis, method.key, one, id=f"{method.axis}:{method.key}-{one.name}")
    for method in rw.methods()
    if method.axis in AXES
    for one in checks(method.axis)
]


@pytest.mark.parametrize(("axis", "key", "one"), PAIRS)
def test_a_method_keeps_its_promises(axis, key, one):
    row = run_check(one, get(axis, key))
    assert row.verdict != "fail", row.detail
    assert row.detail, "a verdict says on which cases, or why it does not apply"


def test_there_are_checks_for_every_axis():
    assert len(checks("delta")) >= 40
    assert len(checks("init")) >= 30
    assert len(checks("rank")) >= 30
    assert len(checks("optimizer")) >= 12
    assert len({c.name for c in checks()}) == len(checks())
    assert all(c.says for c in checks())
