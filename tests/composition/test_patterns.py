"""A rank or a scale of their own for some sites, in every method that has one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matrix import LINEAR, RANKED, case_of, settled, sites_of

import rankworks as rw
from rankworks.core.errors import TargetError
from rankworks.core.state import state_of

SCALED = [key for key in RANKED if "alpha" in LINEAR[key].cls.accepted({})]  # type: ignore[attr-defined]


WITH_ALPHA = {"flora-tucker": {"scale_mode": "alpha_over_r"}}
"""What makes a method use alpha, where its own scale does without by default."""


@pytest.mark.parametrize("key", RANKED)
def test_a_rank_of_its_own(key: str, tmp_path: Path) -> None:
    """One site has another rank: its count is that rank's, merging is exact, and the file brings it back."""
    case = case_of(key)
    sites = [name for name in sites_of(key) if name in sites_of(key, rank=4)]
    assert len(sites) >= 2
    changes = {"targets": sites, "overrides": {sites[0]: {"rank": 4}}}
    shared = LINEAR[key].cls.one_for_all  # type: ignore[attr-defined]
    model = case.model(torch.float64)
    spec = case.spec(**changes)
    if "rank" in shared:
        with pytest.raises(TargetError, match="one rank for all"):
            rw.adapt(model, spec)
        assert not any("adapters" in name for name, _ in model.named_modules())
        return
    rw.adapt(model, spec)
    settled(model, "default", 0)
    for name, delta in state_of(model).adapter("default").deltas.items():
        trained = sum(p.numel() for p in delta.parameters())
        assert trained == type(delta).count(delta.spec, delta.shape)
        innermost = getattr(delta, "inner", delta)
        assert innermost.rank == (4 if name == sites[0] else 2)
    x = case.inputs(dtype=torch.float64)
    output = model(x)
    fresh = case.model(torch.float64)
    rw.load(fresh, rw.save(model, tmp_path / "adapter"))
    assert torch.equal(fresh(x), output)
    rw.merge(model)
    torch.testing.assert_close(model(x), output, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("key", SCALED)
def test_a_scale_of_its_own(key: str) -> None:
    """alpha by pattern multiplies that site's change where the method scales by alpha/rank, and no other's."""
    case = case_of(key).with_settings("", **WITH_ALPHA.get(key, {}))
    sites = case.targets()
    changed = {}
    for factor in (1.0, 3.0):
        model = rw.adapt(case.model(torch.float64), case.spec(targets=sites, overrides={sites[0]: {"alpha": factor}}))
        settled(model, "default", 0)
        changed[factor] = rw.delta_weights(model)
    assert not torch.allclose(changed[1.0][sites[0]], changed[3.0][sites[0]])
    for name in sites[1:]:
        assert torch.equal(changed[1.0][name], changed[3.0][name])


def test_what_all_sites_share_is_refused_inside_dora_too() -> None:
    """S2-LoRA's pair belongs to all sites: no pattern may change its rank, however deep it stands."""
    case = case_of("dora").with_settings("", inner="s2-lora")
    sites = case.targets()
    model = case.model()
    with pytest.raises(TargetError, match="one rank for all"):
        rw.adapt(model, case.spec(targets=sites, overrides={sites[0]: {"rank": 4}}))
    assert not any("adapters" in name for name, _ in model.named_modules())
    rw.adapt(model, case.spec(targets=sites))
