"""Every registered selection does what a selection must; every delta that changes weights can be weighed by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.registry import build, methods
from rankworks.core.scaled import scaled
from rankworks.core.spec import AdaptSpec
from rankworks.core.state import state_of
from rankworks.core.targets import find_sites, stacks_of
from rankworks.train.batching.batches import Example
from rankworks.train.config import OptimConfig, RunConfig, TrainConfig
from rankworks.train.loop import Loop
from rankworks.train.searching.search import chosen_spec, must_search, search
from tiny import tiny_llama, token_batch

SELECTIONS = [method.key for method in methods("selection")]
DELTAS = ("lora", "dora", "vera", "bone", "shira", "randlora")
SMALL: dict[str, dict[str, Any]] = {"layra": {"first": 1, "last": 0}, "flexora": {"top_k": 1}}


def model() -> nn.Module:
    return tiny_llama(layers=3)


def examples() -> list[Example]:
    rows = token_batch(batch=16, length=8).tolist()
    return [Example(tuple(row), tuple(row)) for row in rows]


def spec_for(key: str, delta: str = "lora", **settings: Any) -> AdaptSpec:
    """The adapter's spec, after the search where there is one; nothing is shared, since few deltas can be."""
    select = {"select": key, **SMALL.get(key, {}), **settings}
    if "share" in type(build("selection", key)).model_fields:
        select.setdefault("share", False)
    spec = AdaptSpec.from_flat({"delta": delta, "rank": 2, "select": select})
    if not must_search(spec):
        return spec
    config = RunConfig.model_validate({"train": {"steps": 3, "batch_size": 4}, "search": {"valid": 0.25}})
    return chosen_spec(spec, search(model(), examples(), spec, config, progress=False).chosen)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("key", SELECTIONS)
def test_what_is_not_selected_is_trained_nowhere_and_stored_nowhere(key: str, delta: str, tmp_path: Path):
    spec = spec_for(key, delta)
    adapted = rw.adapt(model(), spec)
    chosen = set(state_of(adapted).adapter("default").sites)
    assert chosen < {site.name for site in find_sites(model(), "all-linear")}
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if "adapters" not in name}
    loop = Loop(adapted, examples(), TrainConfig(steps=8, batch_size=8), OptimConfig(lr=1e-2, warmup=0), progress=False)
    losses = loop.run().losses
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.state_dict().items() if name in before)

    rw.save(adapted, tmp_path / "a")
    meta = json.loads((tmp_path / "a" / "adapter.json").read_text())
    assert set(meta["sites"]) == chosen
    assert meta["adapt"]["select"]["select"] == key
    with safe_open(tmp_path / "a" / "adapter.safetensors", "pt") as data:
        owners = {name for name in chosen if any(k.startswith(f"{name}.") for k in data.keys())}  # noqa: SIM118
        assert all(any(k.startswith(f"{name}.") for name in owners) for k in data.keys())  # noqa: SIM118
    assert owners == chosen

    again = rw.load(model(), tmp_path / "a")
    assert state_of(again).adapter("default").spec == spec
    assert set(state_of(again).adapter("default").sites) == chosen
    with torch.no_grad():
        assert torch.equal(again(token_batch()).logits, adapted(token_batch()).logits)


@pytest.mark.parametrize("key", SELECTIONS)
def test_a_selection_is_a_pure_function_of_the_sites(key: str):
    spec = spec_for(key).select
    assert spec is not None
    selection: Any = spec.method.cls(spec)  # type: ignore[call-arg]
    sites, stacks = find_sites(model(), "all-linear"), stacks_of(model())
    first = selection.choose(sites, stacks)
    assert first == selection.choose(sites, stacks)
    assert [s.name for s in sites if s.name in first] == first
    assert build("selection", spec.model_dump()) == spec
    told = selection.told([s for s in sites if s.name in first])
    assert all(any(name == unit or name.startswith(f"{unit}.") for unit in told) for name in first)


@pytest.mark.parametrize("key", SELECTIONS)
def test_merging_and_detaching_touch_the_selected_alone(key: str):
    adapted, base = rw.adapt(model(), spec_for(key)), model().state_dict()
    with torch.no_grad():
        for parameter in state_of(adapted).adapter("default").parameters():
            parameter.add_(0.1)
    chosen = set(state_of(adapted).adapter("default").sites)
    rw.merge(adapted)
    for name, tensor in adapted.state_dict().items():
        if name in base:
            assert torch.equal(tensor, base[name]) == (name.removesuffix(".weight") not in chosen), name
    rw.unmerge(adapted)
    rw.detach(adapted)
    assert all(torch.equal(tensor, base[name]) for name, tensor in adapted.state_dict().items())


# ---- every change can be weighed -----------------------------------------------------------------------------------

WEIGHED = [m.key for m in methods("delta") if not m.cls.weightless]  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", WEIGHED)
def test_a_factor_on_a_change_is_that_factor_on_its_matrix(key: str):
    small: Any = {"rank": 2} if "rank" in build("delta", key).method.cls.accepted({}) else {}  # type: ignore[attr-defined]
    adapted, ids = rw.adapt(model(), key, targets=["q_proj", "down_proj"], **small), token_batch()
    with torch.no_grad():
        for parameter in state_of(adapted).adapter("default").parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        with rw.disabled(adapted):
            base = adapted(ids).logits
        plain = adapted(ids).logits
        assert not torch.equal(plain, base)
        bare = model()
        for name, change in rw.delta_weights(adapted).items():
            bare.get_submodule(name).weight.add_(0.3 * change)  # type: ignore[union-attr,operator]
        with scaled(adapted) as changes:
            torch.testing.assert_close(adapted(ids).logits, plain, rtol=0, atol=1e-4)
            for change in changes.values():
                change.factor = torch.tensor(0.0)
            torch.testing.assert_close(adapted(ids).logits, base, rtol=0, atol=1e-4)
            for change in changes.values():
                change.factor = torch.tensor(0.3)
            torch.testing.assert_close(adapted(ids).logits, bare(ids).logits, rtol=0, atol=1e-4)
        assert torch.equal(adapted(ids).logits, plain)


def test_a_method_that_changes_no_weight_is_refused_with_the_remedy():
    weightless = [m.key for m in methods("delta") if m.cls.weightless]  # type: ignore[attr-defined]
    assert weightless
    for key in weightless:
        spec = AdaptSpec.from_flat({"delta": key, "select": "flexora", "targets": "re:."})
        with pytest.raises(ConfigError, match=rf"{key} changes no weight.*choose a delta that changes weights"):
            search(model(), examples(), spec, RunConfig(), progress=False)
