"""LoRA-GA: the first step moves the weight by the best rank-2r approximation of the gradient, however it is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from facts import (
    KINDS,
    One,
    best_of_rank,
    change_of,
    close,
    delta_of,
    layer_and_input,
    linear,
    negligible,
    rank_of,
    shake,
)
from learning import losses
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError, TargetError
from rankworks.core.state import state_of
from tiny import tiny_llama, token_batch

DIRECTIONS = ["ArB2r", "A2rBr", "ArBr", "random"]
G = torch.randn(10, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def started(
    layer: nn.Module | None = None, gradient: Tensor = G, rank: int = 3, delta: str = "lora", **given: Any
) -> Any:
    """A layer (10, 12) started from this gradient, by its exact SVD."""
    settings = {k: given.pop(k) for k in list(given) if k in ("direction", "scale", "gamma", "norm_clip", "iterations")}
    init = {"init": "lora-ga", "iterations": 0, **settings}
    evidence = {"layer": {"gradient": gradient}}
    model = One(linear(12, 10) if layer is None else layer).eval()
    return rw.adapt(model, delta, targets="layer", rank=rank, init=init, evidence=evidence, **given)


def step_of(model: One) -> Tensor:
    """G A^T A + B B^T G: what a step moves the weight by, over -eta s^2."""
    delta = delta_of(model)
    return G @ delta.A.T @ delta.A + delta.B @ delta.B.T @ G


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_first_step_is_the_best_approximation_of_rank_2r(direction: str) -> None:
    model = started(direction=direction)
    close(step_of(model), 10**0.5 / 16 * best_of_rank(G, 6))  # c^2 = sqrt(out) / gamma


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_step_of_sgd_moves_the_weight_so(direction: str) -> None:
    """To first order in eta: what is left is quadratic."""
    errors = []
    for eta in (1e-3, 1e-4):
        model = started(direction=direction, alpha=6.0)  # s = 2
        delta = delta_of(model)
        A, B = delta.A.detach().clone(), delta.B.detach().clone()
        s = delta.scale
        with torch.no_grad():
            delta.A -= eta * s * B.T @ G
            delta.B -= eta * s * G @ A.T
        wanted = -eta * s**2 * 10**0.5 / 16 * best_of_rank(G, 6)
        errors.append(float((change_of(model) - wanted).norm() / wanted.norm()))
    assert errors[0] < 1e-2
    assert errors[1] == pytest.approx(errors[0] / 10, rel=1e-2)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_product_is_orthogonal_to_the_gradient(direction: str) -> None:
    delta = delta_of(started(direction=direction))
    negligible((G * (delta.B @ delta.A)).sum())


def test_the_directions_are_where_they_are_said_to_be() -> None:
    u, _, vh = torch.linalg.svd(G)
    c = 10**0.25 / 4
    for direction, for_a, for_b in (
        ("ArB2r", [0, 1, 2], [3, 4, 5]),
        ("A2rBr", [3, 4, 5], [0, 1, 2]),
        ("ArBr", [1, 3, 5], [0, 2, 4]),
    ):
        delta = delta_of(started(direction=direction))
        close((delta.A @ vh[for_a].T).abs(), c * torch.eye(3))
        close((delta.B.T @ u[:, for_b]).abs(), c * torch.eye(3))


def test_the_random_split_is_disjoint_and_depends_on_the_seed() -> None:
    _, _, vh = torch.linalg.svd(G)
    u = torch.linalg.svd(G).U
    found = []
    for seed in range(6):
        delta = delta_of(started(direction="random", seed=seed))
        for_a = (delta.A @ vh.T).abs().argmax(1).tolist()
        for_b = (delta.B.T @ u).abs().argmax(1).tolist()
        assert sorted(for_a + for_b) == list(range(6))
        found.append(tuple(sorted(for_a)))
    assert len(set(found)) > 1


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_the_scales(scaling: str) -> None:
    layer = linear(12, 10)
    lengths: dict[str, float] = {}
    for scale in ("stable", "unit", "gd", "weightS"):
        model = started(layer, scale=scale, alpha=6, scaling=scaling)
        delta = delta_of(model)
        lengths[scale] = delta.A.norm(dim=1).mean().item()
        close(delta.A @ delta.A.T, lengths[scale] ** 2 * torch.eye(3))
        close(delta.B.T @ delta.B, lengths[scale] ** 2 * torch.eye(3))
        rw.detach(model)
    s = 6 / (3 if scaling == "standard" else 3**0.5)
    sigma = torch.linalg.svdvals(layer.weight.detach())[:3]
    assert lengths == pytest.approx(
        {"stable": 10**0.25 / 4, "unit": 1.0, "gd": 1 / s, "weightS": float((sigma / s).sqrt().mean())}
    )


def test_gamma_sets_the_stable_scale() -> None:
    assert float(delta_of(started(gamma=64)).A[0].norm().detach()) == pytest.approx(10**0.25 / 8)


def test_clipping_makes_the_largest_entry_that_of_the_weight_and_leaves_smaller_products() -> None:
    layer = linear(12, 10)
    largest = layer.weight.detach().abs().max()
    model = started(layer, scale="unit", alpha=60, norm_clip=True)
    delta = delta_of(model)
    close((delta.scale * delta.B @ delta.A).abs().max(), largest)
    close(delta.A.norm(dim=1), delta.B.norm(dim=0))
    small = [delta_of(started(scale="unit", alpha=1e-3, norm_clip=clip)) for clip in (False, True)]
    close(small[0].A, small[1].A)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_start_leaves_the_output_bit_identical(kind: str, direction: str) -> None:
    layer, x = layer_and_input(kind)
    plain = layer(x)
    size = {"conv2d": (6, 24), "embedding": (6, 12)}.get(kind, (6, 8))
    model = started(layer, torch.randn(size), rank=2, direction=direction)
    assert torch.equal(model(x), plain)
    assert not change_of(model).any()


def test_the_randomised_form_is_the_exact_one_where_it_holds_everything_and_near_it_elsewhere() -> None:
    few = G[:, :6] @ torch.randn(6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact, fast = (delta_of(started(gradient=few, iterations=i)) for i in (0, 4))
    close(exact.A, fast.A, 1e-8)
    close(exact.B, fast.B, 1e-8)
    model = started(rank=2, iterations=4)
    close(step_of(model), 10**0.5 / 16 * best_of_rank(G, 4), 1e-2)


def test_two_r_must_fit() -> None:
    with pytest.raises(TargetError, match="lower the rank to 5"):
        started(rank=6)
    started(rank=5)


def test_without_the_gradient_it_is_refused() -> None:
    with pytest.raises(TargetError, match="gradient of each weight, measured on data"):
        rw.adapt(One(linear(12, 10)), "lora", targets="layer", rank=2, init="lora-ga")


def test_a_delta_without_a_pair_is_refused() -> None:
    with pytest.raises(TargetError, match="fills 2 factors"):
        started(delta="lora-xs")
    with pytest.raises(ConfigError, match="norm_clip"):
        rw.adapt(One(linear(12, 10)), "lora", targets="layer", init={"init": "lora-ga", "norm_clp": True})


def test_the_change_is_a_plain_lora_of_rank_2r_and_merges(tmp_path: Path) -> None:
    model, x = started(), torch.randn(4, 12)
    untouched = model.layer.weight.clone()
    delta = shake(model)
    B, A = delta.factors()
    assert A.shape == (6, 12)
    assert rank_of(change_of(model)) == 6
    close(B @ A, change_of(model))
    y = model(x)
    rw.save(model, tmp_path / "adapter")
    rw.merge(model)
    close(model(x), y)
    rw.unmerge(model)
    assert torch.equal(model.layer.weight, untouched)
    rw.detach(model)
    assert torch.equal(rw.load(model, tmp_path / "adapter")(x), y)


def test_around_it_dora_starts_as_the_base_too() -> None:
    model, x = started(delta="dora"), torch.randn(4, 12)
    with rw.disabled(model):
        plain = model(x)
    close(model(x), plain)
    inner = delta_of(model).pair
    close(G @ inner.A.T @ inner.A + inner.B @ inner.B.T @ G, 10**0.5 / 16 * best_of_rank(G, 6))


def test_it_learns_from_a_measured_gradient_and_its_start_is_of_that_gradient() -> None:
    model, batch = tiny_llama(), token_batch(batch=4)
    spec = rw.AdaptSpec.from_flat({"delta": "lora", "rank": 2, "scaling": "rslora", "init": "lora-ga"})
    evidence = rw.calibrate(model, [{"input_ids": batch, "labels": batch}], spec, progress=False)
    rw.adapt(model, spec, evidence=evidence)
    for name, site in state_of(model).adapter("default").deltas.items():
        delta: Any = site
        gradient = evidence[name]["gradient"]
        cosine = (gradient * (gradient @ delta.A.T @ delta.A + delta.B @ delta.B.T @ gradient)).sum()
        assert cosine > 0
    seen = losses(model.train())
    assert seen[-1] < 0.7 * seen[0]
