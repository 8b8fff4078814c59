"""EVA: A is the principal directions of the layer's centred inputs, and rank goes where they explain most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import One, backward, change_of, close, delta_of, linear, negligible, shake, weight_of
from learning import losses
from safetensors.torch import load_file
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError, TargetError
from rankworks.core.ranks.surgery import site_settings
from rankworks.core.spec import AdaptSpec
from rankworks.core.state import state_of
from rankworks.train.config import OptimConfig, TrainConfig
from rankworks.train.loop import Loop
from tiny import tiny_llama, tiny_moe, token_batch

EXACT: dict[str, Any] = {"init": "eva", "iterations": 0, "rho": 1.0}


def inputs(tokens: int = 60, size: int = 9, rank: int | None = None, mean: float = 3.0) -> Tensor:
    """Rows with directions of clearly different size around a mean."""
    rank = rank or size
    basis = torch.linalg.qr(torch.randn(size, rank)).Q
    return torch.randn(tokens, rank) * torch.linspace(3, 1, rank) @ basis.t() + mean * torch.randn(size)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def eva(x: Tensor, batches: int = 1, layer: nn.Linear | None = None, delta: str = "lora", **settings: Any) -> One:
    """A layer adapted from these inputs, cut into batches."""
    model = One(layer if layer is not None else linear(x.shape[1], 6)).eval()
    spec = AdaptSpec.from_flat({"delta": delta, "rank": 3, "init": EXACT, "targets": "layer", **settings})
    evidence = rw.calibrate(model, list(x.chunk(batches)), spec, loss=squares)
    return rw.adapt(model, spec, evidence=evidence)


def top(x: Tensor, k: int, centred: bool = True) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors, by torch's own SVD, the largest entries positive."""
    _, s, vh = torch.linalg.svd(x - x.mean(0) if centred else x, full_matrices=False)
    vh = vh[:k]
    return s[:k], vh * vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()


# ---- the factors ----


def test_the_start_leaves_the_output_bit_identical() -> None:
    x, layer = inputs(), linear(9, 6)
    plain = layer(x)
    model = eva(x, layer=layer)
    assert torch.equal(model(x), plain)
    assert not delta_of(model).B.any()


@pytest.mark.parametrize("batches", [1, 2, 3, 7])
def test_on_data_of_rank_k_the_rows_are_the_singular_vectors_whatever_the_split(batches: int) -> None:
    x = inputs(rank=3)
    close(delta_of(eva(x, batches)).A, top(x, 3)[1], 1e-9)


def test_the_rows_are_orthonormal() -> None:
    A = delta_of(eva(inputs(), 4)).A
    close(A @ A.t(), torch.eye(3))


def test_the_data_are_centred() -> None:
    x = inputs(mean=10.0)
    A = delta_of(eva(x)).A
    close(A, top(x, 3)[1])
    assert (A * top(x, 3, centred=False)[1]).sum(1).abs().min() < 0.5


def test_the_rows_take_the_most_of_the_inputs_that_three_rows_can() -> None:
    x = inputs()
    A, s = delta_of(eva(x)).A, top(x, 3)[0]
    taken = ((x - x.mean(0)) @ A.t()).square().sum()
    close(taken, s.square().sum())
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(9, 3)).Q.t()
        assert ((x - x.mean(0)) @ other.t()).square().sum() < taken


def test_whitening_divides_by_the_root_of_the_singular_values() -> None:
    x = inputs()
    A = delta_of(eva(x, init={**EXACT, "whiten": True})).A
    s, vh = top(x, 3)
    close(A, vh / s.sqrt().unsqueeze(1))


def test_the_randomised_svd_finds_the_same_on_data_of_rank_k() -> None:
    x = inputs(rank=3)
    close(delta_of(eva(x, 3, init={**EXACT, "iterations": 4})).A, top(x, 3)[1], 1e-9)


def test_the_first_gradient_goes_through_the_directions() -> None:
    x = inputs()
    model = eva(x, alpha=6)
    _, G = backward(model, x)
    close(delta_of(model).B.grad, 2 * G @ delta_of(model).A.t())
    negligible(delta_of(model).A.grad)


def test_of_three_factors_a_is_the_directions_and_b_what_the_base_makes_of_them() -> None:
    x, layer = inputs(), linear(9, 6)
    plain = layer(x)
    model = eva(x, layer=layer, delta="lora-xs")
    delta, W = delta_of(model), weight_of(model)
    close(delta.A, top(x, 3)[1])
    close(delta.B, W @ delta.A.t())
    close(delta.B @ delta.A @ (delta.A.t() @ delta.A), W @ delta.A.t() @ delta.A)  # W within the directions
    assert not delta.R.any()
    assert torch.equal(model(x), plain)
    _, G = backward(model, x)
    close(delta.R.grad, delta.scale * delta.B.t() @ G @ delta.A.t())
    assert delta.R.grad.norm() > 0
    shake(model)
    close(change_of(model), delta.scale * delta.B @ delta.R @ delta.A)


def test_around_it_dora_starts_at_the_base() -> None:
    x, layer = inputs(), linear(9, 6)
    plain = layer(x)
    model = eva(x, layer=layer, delta="dora")
    close(delta_of(model).inner.A, top(x, 3)[1])
    close(model(x), plain)


# ---- the ranks ----


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    return [{"input_ids": (ids := token_batch(batch=4, seed=s)), "labels": ids} for s in range(count)]


def llama(**settings: Any) -> tuple[nn.Module, AdaptSpec, Any]:
    """A tiny Llama in float64 with an adapter, its spec and what was measured."""
    model = tiny_llama().double()
    spec = AdaptSpec.from_flat({"delta": "lora", "rank": 4, "alpha": 6, "init": "eva", **settings})
    evidence = rw.calibrate(model, batches(), spec)
    return rw.adapt(model, spec, evidence=evidence), spec, evidence


def deltas_of(model: nn.Module) -> dict[str, Any]:
    return dict(state_of(model).adapter("default").deltas)


def test_the_ranks_sum_to_the_budget_and_go_to_the_largest_ratios() -> None:
    model, _, evidence = llama()
    deltas = deltas_of(model)
    ranks = {name: d.rank for name, d in deltas.items()}
    assert sum(ranks.values()) == 4 * len(deltas)
    assert len(set(ranks.values())) > 1
    ratios = {n: e["input_svd.values"].square() / e["input_svd.spread"] for n, e in evidence.items()}
    least = min(float(ratios[n][r - 1]) for n, r in ranks.items() if r)
    assert all(float(ratios[n][r]) <= least for n, r in ranks.items() if r < 8)
    assert max(ranks.values()) <= 8


def test_ratios_lie_between_zero_and_one() -> None:
    for found in llama()[2].values():
        ratios = found["input_svd.values"].square() / found["input_svd.spread"]
        assert (ratios >= 0).all()
        assert ratios.sum() <= 1 + 1e-12
        assert (ratios.diff() <= 0).all()


def test_rho_one_keeps_every_rank() -> None:
    settings = {"init": {"init": "eva", "rho": 1.0}, "overrides": {"down_proj": {"rank": 2}}}
    ranks = {n: d.rank for n, d in deltas_of(llama(**settings)[0]).items()}
    assert all(rank == (2 if n.endswith("down_proj") else 4) for n, rank in ranks.items())


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_the_scale_of_a_site_stays_when_its_rank_changes(scaling: str) -> None:
    model, _, _ = llama(scaling=scaling)
    wanted = 6 / 4 if scaling == "standard" else 6 / 2
    deltas = deltas_of(model).values()
    assert all(d.scale == pytest.approx(wanted, rel=1e-15) for d in deltas if d.rank)
    if scaling == "standard":
        assert all(d.alpha == pytest.approx(6 * d.rank / 4) for d in deltas if d.rank)


def test_alpha_stays_where_scaling_is_not_adjusted() -> None:
    model, _, _ = llama(init={"init": "eva", "adjust_scaling": False})
    assert all(d.alpha == 6 for d in deltas_of(model).values())


def test_layers_that_read_the_same_have_nested_directions() -> None:
    model, _, _ = llama()
    deltas = deltas_of(model)
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for layer in (0, 1):
            group = [deltas[f"model.layers.{layer}.{n}"].A for n in names]
            short = min(len(A) for A in group)
            assert all(torch.equal(A[:short], group[0][:short]) for A in group)


@pytest.mark.parametrize("metric", ["variance", "sum", "max"])
def test_other_metrics_share_out_the_same_budget(metric: str) -> None:
    init = {"init": "eva", "metric": metric}
    deltas = deltas_of(llama(init=init)[0]).values()
    assert sum(d.rank for d in deltas) == 4 * len(deltas)


def test_dora_and_lora_xs_get_ranks_too() -> None:
    for delta in ("dora", "lora-xs"):
        model, _, _ = llama(delta=delta)
        ranks = [d.inner.rank if delta == "dora" else d.rank for d in deltas_of(model).values()]
        assert sum(ranks) == 4 * len(ranks)
        assert len(set(ranks)) > 1


# ---- rank 0 ----


def with_a_quiet_layer(delta: str = "lora") -> nn.Module:
    """Three layers; the second reads noise in every direction alike and wins nothing beside the others."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.quiet, self.last = linear(8, 6), linear(30, 6), linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x[..., :8]) + self.quiet(x[..., 8:]) + self.last(2 * x[..., :8])

    model = Three().eval()
    x = torch.cat([inputs(60, 8, rank=2), torch.randn(60, 30)], dim=1)
    spec = AdaptSpec.from_flat({"delta": delta, "rank": 1, "init": {"init": "eva", "iterations": 0, "rho": 2.0}})
    return rw.adapt(model, spec, evidence=rw.calibrate(model, [x], spec, loss=squares))


def test_rank_zero_is_legal_in_everything(tmp_path: Path) -> None:
    model = with_a_quiet_layer()
    x = torch.randn(5, 38)
    assert {n: d.rank for n, d in deltas_of(model).items()} == {"first": 2, "quiet": 0, "last": 1}
    model(x).sum().backward()
    shake(model)
    y = model(x).detach()
    assert rw.trainable_parameters(model) == 3 * (8 + 6)
    assert "quiet" in str(rw.summary(model))
    assert not rw.delta_weights(model)["quiet"].any()
    rw.merge(model)
    close(model(x), y)
    rw.unmerge(model)
    rw.save(model, tmp_path / "adapter")
    rw.export(model, tmp_path / "peft", kind="peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["first", "last"]
    assert not any("quiet" in key for key in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    settings = site_settings(model)
    rw.detach(model)
    rw.load(model, tmp_path / "adapter")
    assert torch.equal(model(x), y)
    assert site_settings(model) == settings
    rw.detach(model)
    close(rw.load(model, tmp_path / "peft")(x), y)


@pytest.mark.parametrize("delta", ["dora", "lora-xs"])
def test_rank_zero_is_legal_in_other_deltas(delta: str, tmp_path: Path) -> None:
    model, x = with_a_quiet_layer(delta), torch.randn(5, 38)
    ranks = {n: (d.inner if delta == "dora" else d).rank for n, d in deltas_of(model).items()}
    assert ranks == {"first": 2, "quiet": 0, "last": 1}
    model(x).sum().backward()
    shake(model)
    y = model(x).detach()
    rw.merge(model)
    close(model(x), y)
    rw.unmerge(model)
    rw.save(model, tmp_path / "adapter")
    rw.export(model, tmp_path / "peft", kind="peft" if delta == "dora" else "lora")
    rw.detach(model)
    assert torch.equal(rw.load(model, tmp_path / "adapter")(x), y)
    rw.detach(model)
    close(rw.load(model, tmp_path / "peft")(x), y, 1e-6)


def test_rank_zero_is_still_refused_from_a_user() -> None:
    with pytest.raises((ConfigError, TargetError), match="rank"):
        eva(inputs(), rank=0)


# ---- refusals ----


def test_without_a_measurement_it_names_the_remedy() -> None:
    with pytest.raises(TargetError, match=r"input_svd .*rankworks\.calibrate\(model, data, spec\)"):
        rw.adapt(One(linear()), "lora", targets="layer", init="eva")


def test_kinds_without_inputs_of_their_own_are_refused() -> None:
    with pytest.raises(TargetError, match="starts from what a layer reads"):
        rw.adapt(tiny_llama(), "lora", targets="embed_tokens", init="eva")
    with pytest.raises(TargetError, match="starts from what a layer reads"):
        rw.adapt(tiny_moe(), "lora", targets="gate_up_proj", init="eva")
    with pytest.raises(TargetError, match="grouped convolution"):
        rw.adapt(One(nn.Conv1d(4, 4, 3, groups=2)), "lora", targets="layer", init="eva")


def test_deltas_without_factors_are_refused() -> None:
    with pytest.raises(TargetError, match="fills a factor pair"):
        eva(inputs(), delta="shira", rank=1)


def test_more_ranks_than_inputs_are_refused() -> None:
    with pytest.raises(TargetError, match="at most in = 4 directions"):
        eva(inputs(size=4), rank=5)


def test_evidence_for_a_smaller_rank_is_refused() -> None:
    model, x = One(linear(9, 6)), inputs()
    small, large = (AdaptSpec.from_flat({"delta": "lora", "rank": r, "init": EXACT}) for r in (2, 4))
    evidence = rw.calibrate(model, [x], small, loss=squares)
    with pytest.raises(ConfigError, match=r"2 directions .*4 are wanted: measure it with this adapter's own spec"):
        rw.adapt(model, large, evidence=evidence)


@pytest.mark.parametrize("setting", [{"rho": 0.5}, {"tau": 1.5}, {"tau": 0.0}, {"passes": 0}, {"metric": "mean"}])
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        AdaptSpec.from_flat({"delta": "lora", "init": {"init": "eva", **setting}})


# ---- training ----


@pytest.mark.parametrize("delta", ["lora", "dora", "lora-xs"])
def test_it_learns(delta: str) -> None:
    torch.set_default_dtype(torch.float32)
    model = tiny_llama()
    spec = AdaptSpec.from_flat({"delta": delta, "rank": 4, "init": "eva"})
    rw.adapt(model, spec, evidence=rw.calibrate(model, batches(), spec))
    seen = losses(model.train(), 12)
    assert seen[-1] < 0.9 * seen[0]


def test_a_loop_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """With ranks of every size, zero among them, as the measurement gave them."""
    torch.set_default_dtype(torch.float32)
    evidence: dict[str, Any] = {}

    def loop(steps: int, folder: Path | None) -> Loop:
        model = tiny_llama()
        spec = AdaptSpec.from_flat({"delta": "lora", "rank": 2, "init": "eva", "seed": 1})
        evidence.setdefault("found", rw.calibrate(model, batches(), spec))
        rw.adapt(model, spec, evidence=evidence["found"])
        train = TrainConfig(steps=steps, batch_size=8, save_every=2)
        return Loop(model, examples(), train, OptimConfig(lr=1e-2, schedule="constant"), folder=folder, progress=False)

    whole = loop(6, None)
    history = whole.run()
    assert history.losses[-1] < history.losses[0]
    loop(4, tmp_path).run()
    resumed = loop(6, tmp_path)
    resumed.run()
    one, two = (dict(item.model.named_parameters()) for item in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def examples() -> list[Any]:
    from rankworks.train.batching.batches import Example

    made = []
    for seed in range(16):
        ids = tuple(token_batch(batch=1, length=12, seed=seed % 4)[0].tolist())
        made.append(Example(ids, ids))
    return made
