"""APOLLO: the raw gradient with Adam's rate per channel, found in a random subspace that only a seed remembers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import check_falls, check_resumes
from steps import draw, step
from torch import Tensor, nn

from rankworks.core.errors import ConfigError
from rankworks.core.optim.limiter import growth_factor
from rankworks.core.optim.projector import gaussian_basis
from rankworks.core.registry import build
from rankworks.optim.apollo import ScaledSGD
from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes

DEFAULTS: dict[str, Any] = {
    "rank": 2,
    "refresh": 200,
    "scale": 1.0,
    "side": "std",
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "scaling": "channel",
    "limit": 1.01,
    "seed": 0,
    "keep_projection": False,
    "weight_decay": 0.0,
}


def one(weight: Tensor, lr: float = 0.1, name: str = "w", **settings: Any) -> tuple[nn.Parameter, ScaledSGD]:
    parameter = nn.Parameter(weight.clone())
    group = {"params": [parameter], "names": [name], "projected": True}
    return parameter, ScaledSGD([group], lr=lr, **{**DEFAULTS, **settings})


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_its_steps_are_the_definition(shape: tuple[int, int], scaling: str) -> None:
    """Written out with every matrix formed, over a refresh and with gradients that grow."""
    parameter, optimizer = one(draw(*shape), refresh=3, scaling=scaling, scale=4.0)
    m = v = norm = 0.0
    for t in range(1, 8):
        G = draw(*shape, seed=t) * (3.0 if t == 5 else 1.0)
        wide = shape[0] < shape[1]
        basis = gaussian_basis(G, 2, "std", 0, "w", (t - 1) // 3)
        P, Q = basis
        R = G @ Q if Q is not None else P.t() @ G  # type: ignore[union-attr]
        m, v = 0.9 * m + 0.1 * R, 0.999 * v + 0.001 * R * R
        N = m / (v.sqrt() + 1e-6)
        axis = 0 if wide else 1
        phi = N.norm(dim=axis, keepdim=True) / (R.norm(dim=axis, keepdim=True) + 1e-8)
        U = G * (N.norm() / (R.norm() + 1e-8) if scaling == "tensor" else phi)
        if t > 1:
            U = U / max(U.norm() / (norm + 1e-8), 1.01) * 1.01
        norm = U.norm()
        wanted = -0.1 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * 2.0 * U
        torch.testing.assert_close(step(parameter, optimizer, G), wanted, atol=1e-7, rtol=0)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_projection_keeps_squared_norms_on_average(rank: int) -> None:
    """E ||P^T g||^2 = ||g||^2 for every column, within 4 deviations of the mean of 400 projections."""
    G = draw(8, 12)
    found = torch.stack([gaussian_basis(G, rank, "std", 0, "w", k).into(G).square().sum(0) for k in range(400)])
    exact = G.square().sum(0)
    deviation = exact * (2 / rank / 400) ** 0.5  # of a mean of chi-squares with `rank` degrees
    assert ((found.mean(0) - exact).abs() < 4 * deviation).all()


def test_projections_depend_on_seed_name_and_number_alone() -> None:
    G = draw(8, 12)
    P = gaussian_basis(G, 3, "std", 0, "w", 0).P
    torch.manual_seed(5)
    assert torch.equal(P, gaussian_basis(G, 3, "std", 0, "w", 0).P)  # type: ignore[arg-type]
    for other in ((1, "w", 0), (0, "v", 0), (0, "w", 1)):
        assert not torch.equal(P, gaussian_basis(G, 3, "std", *other).P)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_with_a_direction_that_is_the_gradient_it_is_sgd(side: str, scaling: str) -> None:
    """N = R / eps for betas of 0 and a huge eps: phi = 1 / eps."""
    G = draw(6, 4)
    settings = {"side": side, "scaling": scaling, "betas": (0.0, 0.0), "eps": 1e12}
    parameter, optimizer = one(torch.zeros(6, 4, dtype=torch.float64), lr=1e12, **settings)
    torch.testing.assert_close(step(parameter, optimizer, G), -G, atol=1e-6, rtol=0)


def test_the_step_grows_by_one_per_cent_at_most() -> None:
    parameter, optimizer = one(draw(6, 4))
    norms = []
    for i in range(30):
        step(parameter, optimizer, draw(6, 4, seed=i) * 1.3**i)
        norms.append(float(optimizer.state[parameter]["norm"]))
    assert max(b / a for a, b in itertools.pairwise(norms)) <= 1.01 + 1e-6


def test_the_limiter() -> None:
    """Growth is cut to the limit, against the length after limiting; what shrinks passes; a zero sets no limit."""
    state: dict[str, Any] = {}
    lengths = [1.0, 2.0, 2.0, 0.5, 0.0, 3.0, 3.02]
    factors = [float(growth_factor(state, torch.tensor(x, dtype=torch.float64), 1.01)) for x in lengths]
    assert factors == pytest.approx([1, 1.01 / 2, 1.01**2 / 2, 1, 1, 1, 1])
    assert float(state["norm"]) == pytest.approx(3.02)


def test_multiplying_before_the_limiter_is_multiplying_after_it() -> None:
    """So the released code's choice between the two is none: the same factors for lengths and lengths times 128."""
    lengths = torch.tensor([1.0, 5.0, 0.1, 0.3], dtype=torch.float64)
    runs = []
    for scale in (1.0, 128**0.5):
        state: dict[str, Any] = {}
        runs.append([float(growth_factor(state, scale * x, 1.01)) for x in lengths])
    assert runs[0] == pytest.approx(runs[1], rel=1e-12)


def test_keeping_the_projection_changes_nothing_but_the_state() -> None:
    runs = []
    for keep in (False, True):
        parameter, optimizer = one(draw(6, 4), refresh=2, keep_projection=keep)
        runs.append([step(parameter, optimizer, draw(6, 4, seed=i)) for i in range(5)])
        assert ("Q" in optimizer.state[parameter]) == keep
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_same_seed_is_the_same_run_and_another_is_another() -> None:
    moved = []
    for seed, name in ((0, "w"), (0, "w"), (1, "w"), (0, "v")):
        parameter, optimizer = one(draw(6, 4), seed=seed, name=name)
        moved.append(step(parameter, optimizer, draw(6, 4, seed=3)))
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])
    assert not torch.equal(moved[0], moved[3])


def test_decay_follows_the_step() -> None:
    moved = []
    for decay in (0.0, 0.5):
        parameter, optimizer = one(draw(6, 4), weight_decay=decay)
        step(parameter, optimizer, draw(6, 4, seed=1))
        moved.append(parameter.detach())
    torch.testing.assert_close(moved[1], moved[0] * (1 - 0.1 * 0.5), atol=1e-12, rtol=0)


def test_mini_is_rank_1_with_one_factor_and_128() -> None:
    spec: Any = build("optimizer", "apollo-mini")
    assert (spec.rank, spec.scaling, spec.scale) == (1, "tensor", 128.0)
    weight = nn.Parameter(torch.empty(4096, 11008, dtype=torch.bfloat16, device="meta"))
    method: Any = spec.method.cls(spec)
    assert method.state_bytes(weight, {"projected": True}) == 2 * 22_016 + 4, "two moments and a float32 norm"
    assert "seed" in method.build([{"params": [weight], "names": ["w"]}], 1.0).param_groups[0]


@pytest.mark.parametrize(
    ("shape", "rank", "moments"),
    [("llama-60m", 128, 12_648_448), ("llama-130m", 256, 56_623_104), ("llama-350m", 256, 151_191_552)],
)
def test_the_state_of_the_papers_models(shape: str, rank: int, moments: int) -> None:
    """GaLore's without the projectors: 2 r L numbers and a norm per linear layer, two of every other number."""
    model = open_source(shape, "bfloat16").model.requires_grad_(True)
    named = dict(model.named_parameters())
    rest = sum(p.numel() for name, p in named.items() if "proj" not in name)
    linear = sum("proj" in name for name in named)
    told = optimizer_bytes({"optimizer": "apollo", "rank": rank}, model)
    assert told == 2 * (moments + 2 * rest) + 4 * linear


@pytest.mark.parametrize("key", ["apollo", "apollo-mini"])
def test_the_loss_falls(key: str) -> None:
    check_falls(key, {"refresh": 3, **({"rank": 8} if key == "apollo" else {})})


@pytest.mark.parametrize("keep", [False, True])
def test_it_resumes_bit_for_bit(tmp_path: Path, keep: bool) -> None:
    check_resumes(tmp_path, "apollo", {"rank": 4, "refresh": 3, "keep_projection": keep})


def test_bad_settings_are_refused() -> None:
    both_sides = {"side": "full", "scaling": "channel"}
    for settings, told in ((both_sides, "'tensor'"), ({"limit": 0.9}, "limit"), ({"rank": 0}, "rank")):
        with pytest.raises(ConfigError, match=told):
            build("optimizer", "apollo", **settings)
