"""PEFT's incremental PCA (EVA's) and its CorDA, on the same inputs."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.spec import AdaptSpec
from rankworks.linalg.incremental import IncrementalSVD, worth
from tiny import tiny_llama, token_batch


def test_the_incremental_svd_is_pefts_batch_by_batch() -> None:
    """Rows of full rank, where what is dropped between batches matters too; both compute in float64."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(4, 0.5, 20)
    ours, theirs = IncrementalSVD(6), IncrementalPCA(n_components=6)
    for rows in (30, 6, 50, 11):
        x = (torch.randn(rows, 20, generator=generator) * scale + 3).double()
        ours.update(x)
        theirs.partial_fit(x)
        torch.testing.assert_close(ours.components, theirs.components_)
        torch.testing.assert_close(ours.values, theirs.singular_values_)
        torch.testing.assert_close(ours.mean, theirs.mean_)
        for metric, wanted in (("ratio", theirs.explained_variance_ratio_), ("variance", theirs.explained_variance_)):
            torch.testing.assert_close(worth(metric, ours.values, ours.spread, ours.count), wanted)


@pytest.mark.parametrize(("mode", "method"), [("instruction", "ipm"), ("knowledge", "kpm")])
def test_cordas_start_is_pefts(mode: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of equal length, one a batch, as PEFT's counts samples; what is taken out of the base is compared."""
    if importlib.util.find_spec("attr") is None:  # PEFT takes `dataclass` from attrs, which it does not depend on
        monkeypatch.setitem(sys.modules, "attr", dataclasses)
    from peft.tuners.lora.corda import preprocess_corda

    torch.manual_seed(0)
    texts = [token_batch(batch=1, length=24, seed=s) for s in range(8)]
    model: Any = tiny_llama()
    spec = AdaptSpec.from_flat(
        {
            "delta": "lora",
            "rank": 4,
            "alpha": 8,
            "targets": ["q_proj", "down_proj"],
            "init": {"init": "corda", "mode": mode, "normalise": "sample"},
        }
    )
    evidence = rw.calibrate(model, [{"input_ids": t, "labels": t} for t in texts], spec)
    ours = {n: _product(d) for n, d in _deltas(rw.adapt(model, spec, evidence=evidence)).items()}

    peer: Any = tiny_llama()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
    )
    with torch.no_grad():
        preprocess_corda(peer, config, run_model=lambda: [peer(t) for t in texts])
    peer = get_peft_model(peer, config)
    assert len(ours) == 4
    for name, product in ours.items():
        layer = peer.base_model.model.get_submodule(name)
        wanted = (layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        assert float((product - wanted).norm() / wanted.norm()) < 2e-3  # float32, through an inverse


def _deltas(model: nn.Module) -> dict[str, Any]:
    return {row.site: rw.get_delta(model, row.site) for row in rw.summary(model).rows}


def _product(delta: Any) -> Tensor:
    return (delta.scale * delta.B @ delta.A).detach()
