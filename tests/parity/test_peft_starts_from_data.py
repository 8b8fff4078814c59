"""PEFT's incremental PCA (EVA's) and its CorDA, on the same inputs."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
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


@pytest.mark.parametrize("signed", [False, True])
def test_evas_ranks_and_directions_are_pefts(signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole pass, cycled until all stands still.

    PEFT takes a direction whose sign has turned for one that moves, and goes on a while; told to do so, ours ends with
    its directions. Without, the ranks are the same and the directions as near as tau says.
    """
    if signed:
        monkeypatch.setattr(IncrementalSVD, "update", _signed(IncrementalSVD.update))
    texts = [token_batch(batch=8, length=24, seed=s) for s in range(3)]
    data = [{"input_ids": t, "labels": t, "attention_mask": torch.ones_like(t)} for t in texts]
    init = {"init": "eva", "tau": 0.9, "passes": 100}
    model = tiny_llama()
    spec = AdaptSpec.from_flat({"delta": "lora", "rank": 4, "alpha": 8, "init": init})
    ours = _deltas(rw.adapt(model, spec, evidence=rw.calibrate(model, data, spec)))

    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.9)
    )
    peer: Any = get_peft_model(tiny_llama(), config)
    initialize_lora_eva_weights(peer, data, show_progress_bar=False)
    for name, delta in ours.items():
        layer = peer.base_model.model.get_submodule(name)
        if not delta.rank:
            assert not hasattr(layer, "lora_A")
            continue
        assert (layer.r["default"], layer.lora_alpha["default"]) == (delta.rank, delta.alpha)
        cosines = (delta.A * layer.lora_A["default"].weight).sum(1).abs()
        assert cosines.min() > (0.9999 if signed else 0.9)


def _signed(update: Any) -> Any:
    def signed(self: IncrementalSVD, rows: Tensor) -> Tensor | None:
        before = self.components
        return None if update(self, rows) is None else (before * self.components).sum(1)  # type: ignore[operator]

    return signed


@pytest.mark.parametrize(("mode", "method"), [("instruction", "ipm"), ("knowledge", "kpm")])
def test_cordas_start_is_pefts(mode: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
        run: Any = lambda: [peer(t) for t in texts]  # noqa: E731
        preprocess_corda(peer, config, run_model=run)
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
