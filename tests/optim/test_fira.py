"""Fira: GaLore within the subspace, scaled gradients outside it, and steps that grow by one per cent at most."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import check_falls, check_resumes
from steps import draw, step
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.optim.dct import basis_rows, select
from rankworks.core.optim.projection import leading_basis
from rankworks.core.registry import build
from rankworks.optim.fira import FiraAdamW
from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes

COMMON: dict[str, Any] = {"rank": 2, "refresh": 200, "scale": 0.25, "side": "std", "betas": (0.9, 0.999), "eps": 1e-6}
OWN: dict[str, Any] = {
    "residual": "paper",
    "scaling": "channel",
    "limit": 1.01,
    "subspace": "svd",
    "seed": 0,
    "bits": None,
}


def one(weight: Tensor, lr: float = 0.1, **settings: Any) -> tuple[nn.Parameter, FiraAdamW]:
    parameter = nn.Parameter(weight.clone())
    group = {"params": [parameter], "projected": True}
    defaults = {**COMMON, **OWN, "weight_decay": 0.0, **settings}
    return parameter, FiraAdamW([group], lr=lr, **defaults)


def by_hand(G: Tensor, moments: dict[str, Any], *, residual: str, scale: float = 0.25, lr: float = 0.1) -> Tensor:
    """One step of the definition for the left case, written out with every matrix formed."""
    n = G.shape[1]
    if "P" not in moments:
        moments |= {"P": leading_basis(G, 2, "left").P, "m": torch.zeros(2, n), "v": torch.zeros(2, n), "t": 0}
    P = moments["P"]
    R = P.t() @ G
    moments["t"] += 1
    moments["m"] = 0.9 * moments["m"] + 0.1 * R
    moments["v"] = 0.999 * moments["v"] + 0.001 * R * R
    N = moments["m"] / (moments["v"].sqrt() + 1e-6)
    phi = N.norm(dim=0) / (R.norm(dim=0) + 1e-8)
    S = (G - (1.0 if residual == "paper" else scale) * P @ R) * phi
    if "norm" in moments:
        S = S / max(S.norm() / (moments["norm"] + 1e-8), 1.01) * 1.01
    moments["norm"] = S.norm()
    t = moments["t"]
    return -lr * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * (scale * P @ N + S)


@pytest.mark.parametrize("residual", ["paper", "reference"])
@pytest.mark.parametrize("turned", [False, True])
def test_its_steps_are_the_definition_on_either_side(residual: str, turned: bool) -> None:
    """Also the symmetry: the transpose of a weight and its gradients gives the transpose of its steps."""
    parameter, optimizer = one(draw(6, 4) if turned else draw(4, 6), residual=residual)
    moments: dict[str, Any] = {}
    for i in range(6):
        G = draw(4, 6, seed=10 + i) * (2.0 if i == 3 else 1.0)
        wanted = by_hand(G, moments, residual=residual)
        moved = step(parameter, optimizer, G.t() if turned else G)
        torch.testing.assert_close(moved.t() if turned else moved, wanted, atol=1e-8, rtol=0)


def test_at_full_rank_it_is_galore() -> None:
    parameter, optimizer = one(draw(6, 4), rank=4, subspace="warm")
    other, made = nn.Parameter(draw(6, 4)), build("optimizer", "galore", rank=4)
    galore = made.method.cls(made).build([{"params": [other], "projected": True}], lr=0.1)  # type: ignore[call-arg]
    for i in range(5):
        ours, theirs = (step(p, o, draw(6, 4, seed=i)) for p, o in ((parameter, optimizer), (other, galore)))
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_with_a_direction_that_is_the_gradient_the_step_is_the_gradient(side: str, scaling: str) -> None:
    """N = R makes every factor 1, so that at scale 1 the step is G, and alpha P R + (G - P R) at others.

    betas = 0 and a huge eps give N = R / eps.
    """
    G, eps = draw(6, 4), 1e12
    basis = leading_basis(G, 2, side)  # type: ignore[arg-type]
    inside = basis.back(basis.into(G))
    for scale in (1.0, 0.25):
        settings = {"side": side, "scaling": scaling, "scale": scale, "betas": (0.0, 0.0), "eps": eps}
        parameter, optimizer = one(torch.zeros(6, 4, dtype=torch.float64), lr=eps, **settings)
        wanted = -(scale * inside + G - inside)
        torch.testing.assert_close(step(parameter, optimizer, G), wanted, atol=1e-7, rtol=0)


def test_on_both_sides_one_factor_for_all() -> None:
    G = draw(6, 4)
    basis = leading_basis(G, 2, "full")
    settings = {"side": "full", "scaling": None, "betas": (0.0, 0.0), "eps": 1e12}
    parameter, optimizer = one(torch.zeros(6, 4, dtype=torch.float64), lr=1e12, **settings)
    inside = basis.back(basis.into(G))
    torch.testing.assert_close(step(parameter, optimizer, G), -(0.25 * inside + G - inside), atol=1e-7, rtol=0)
    with pytest.raises(ConfigError, match="'tensor'"):
        build("optimizer", "fira", side="full", scaling="channel")


def test_what_is_left_out_grows_by_one_per_cent_at_most() -> None:
    parameter, optimizer = one(draw(6, 4))
    norms = []
    for i in range(30):
        step(parameter, optimizer, draw(6, 4, seed=i) * 1.3**i)
        norms.append(float(optimizer.state[parameter]["norm"]))
    ratios = [b / a for a, b in itertools.pairwise(norms)]
    assert max(ratios) <= 1.01 + 1e-6
    assert ratios[-1] == pytest.approx(1.01)


def test_shrinking_steps_pass_untouched() -> None:
    runs = []
    for limit in (1.01, None):
        parameter, optimizer = one(draw(6, 4), limit=limit, betas=(0.0, 0.999))
        runs.append([step(parameter, optimizer, draw(6, 4) * 0.5**i) for i in range(5)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_step_of_length_zero_sets_no_limit() -> None:
    """As the first step of an adapter's A, whose gradient is zero while B is."""
    parameter, optimizer = one(draw(6, 4))
    step(parameter, optimizer, torch.zeros(6, 4, dtype=torch.float64))
    limited = step(parameter, optimizer, draw(6, 4))
    parameter, optimizer = one(draw(6, 4), limit=None)
    step(parameter, optimizer, torch.zeros(6, 4, dtype=torch.float64))
    assert torch.equal(limited, step(parameter, optimizer, draw(6, 4)))
    assert limited.abs().max() > 0.01


def test_what_is_left_out_is_orthogonal_to_the_subspace_and_of_full_rank() -> None:
    """In the paper's form; the released one leaves 1 - scale of what is inside in it."""
    G = draw(4, 6)
    P = leading_basis(G, 2, "left").P
    assert P is not None
    for residual in ("paper", "reference"):
        parameter, optimizer = one(torch.zeros(4, 6, dtype=torch.float64), residual=residual, eps=1e-30, scale=0.5)
        moved = step(parameter, optimizer, G)
        inside = -0.1 * 0.5 * P @ (P.t() @ G).sign()
        overlap = float((P.t() @ (moved - inside)).abs().max())
        assert overlap < 1e-12 if residual == "paper" else overlap > 1e-3
        assert int(torch.linalg.matrix_rank(moved)) == 4


def test_a_worked_step() -> None:
    """Row 0 moves by lr scale; row 1, whose residual is 1, has no component in the subspace and so does not move."""
    G = torch.tensor([[3.0, 0], [0, 1], [0, 0]], dtype=torch.float64)
    parameter, optimizer = one(torch.zeros(3, 2, dtype=torch.float64), rank=1, eps=1e-30)
    wanted = torch.tensor([[-0.025, 0], [0, 0], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(step(parameter, optimizer, G), wanted, atol=1e-12, rtol=0)
    released, optimizer = one(torch.zeros(3, 2, dtype=torch.float64), rank=1, eps=1e-30, residual="reference")
    wanted[0, 0] -= 0.1 * 1 / 3 * 0.75 * 3  # phi lr_t = lr / 3, times what the released code leaves in the residual
    torch.testing.assert_close(step(released, optimizer, G), wanted, atol=1e-9, rtol=0)


def test_decay_follows_the_step() -> None:
    moved = []
    for decay in (0.0, 0.5):
        parameter, optimizer = one(draw(6, 4), weight_decay=decay)
        step(parameter, optimizer, draw(6, 4, seed=1))
        moved.append(parameter.detach())
    torch.testing.assert_close(moved[1], moved[0] * (1 - 0.1 * 0.5), atol=1e-12, rtol=0)


def test_a_refresh_keeps_the_moments() -> None:
    parameter, optimizer = one(draw(6, 4), refresh=2)
    bases = []
    for i in range(3):
        step(parameter, optimizer, draw(6, 4, seed=i))
        bases.append(optimizer.state[parameter]["Q"].clone())
    assert torch.equal(bases[0], bases[1])
    assert not torch.equal(bases[1], bases[2])
    R = [draw(6, 4, seed=i) @ bases[i] for i in range(3)]
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], 0.081 * R[0] + 0.09 * R[1] + 0.1 * R[2])


@pytest.mark.parametrize("bits", [None, 8])
def test_the_loss_falls(bits: int | None) -> None:
    check_falls("fira", {"rank": 4, "refresh": 3, "bits": bits})


@pytest.mark.parametrize("settings", [{}, {"subspace": "svd", "bits": 8}])
def test_it_resumes_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    check_resumes(tmp_path, "fira", {"rank": 4, "refresh": 3, **settings})


def test_8_bits_stay_near() -> None:
    weight, moved = draw(96, 64).float(), []
    for bits in (None, 8):
        parameter, optimizer = one(weight, rank=48, bits=bits)
        for i in range(4):
            step(parameter, optimizer, (draw(96, 64, seed=i % 2) + 0.3).float())
        moved.append(parameter.detach() - weight)
        assert (optimizer.state[parameter]["exp_avg"].dtype == torch.uint8) == (bits == 8)
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < 0.05


def test_bad_settings_are_refused() -> None:
    for settings, told in (({"limit": 0.5}, "limit"), ({"rank": 0}, "rank"), ({"bits": 4}, "bits")):
        with pytest.raises(ConfigError, match=told):
            build("optimizer", "fira", **settings)


def test_the_state_is_galores_and_a_number_per_weight() -> None:
    model = open_source("llama-60m", "bfloat16").model.requires_grad_(True)
    weights = 7 * 8
    assert optimizer_bytes({"optimizer": "fira"}, model) == 163_743_744 + 4 * weights
    optimizer = rw.make_optimizer(open_source("llama-60m", "bfloat16").model.requires_grad_(True), "fira")
    assert sum(len(g["params"]) for g in optimizer.param_groups if g["projected"]) == weights


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_among_cosines_a_subspace_is_indices(shape: tuple[int, int]) -> None:
    """DCT-Fira: Fira in the basis of the r vectors that the gradient lies along most, at every refresh."""
    parameter, optimizer = one(draw(*shape), subspace="dct", refresh=1, limit=None)
    state, seen = optimizer.state[parameter], set()
    for i in range(6):
        G = draw(*shape, seed=70 + i)
        moved = step(parameter, optimizer, G)
        name, right = ("Q", True) if shape[0] > shape[1] else ("P", False)
        assert torch.equal(state[name], select(G, 2, right, norm=2).index)
        seen.add(tuple(state[name].tolist()))
        part = basis_rows(state[name], 6, G).t()
        rest = G - (G @ part @ part.t() if right else part @ part.t() @ G)
        outside = moved - (moved @ part @ part.t() if right else part @ part.t() @ moved)
        ratio = (outside / rest).movedim(1 if right else 0, 0)  # one factor per channel
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), atol=1e-9, rtol=1e-9)
    assert len(seen) > 1
    assert state[name].dtype == torch.int32


def test_among_cosines_the_state_is_smaller_by_the_bases() -> None:
    model = open_source("llama-60m", "bfloat16").model.requires_grad_(True)
    told = [optimizer_bytes({"optimizer": "fira", "rank": 128, "subspace": how}, model) for how in ("svd", "dct")]
    assert told[0] - told[1] == 2 * 3_670_016 - 4 * 128 * 7 * 8


def test_among_cosines_the_loss_falls_and_a_run_resumes(tmp_path: Path) -> None:
    check_falls("fira", {"rank": 4, "subspace": "dct", "refresh": 1})
    check_resumes(tmp_path, "fira", {"rank": 4, "subspace": "dct", "refresh": 3})
