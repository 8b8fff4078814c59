"""Trion: the part of the momentum along the best columns of a fixed basis, made orthogonal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import check_falls, check_resumes
from steps import draw, step
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.optim.dct import basis_matrix
from rankworks.linalg.newton_schulz import newton_schulz
from rankworks.optim.trion import OrthogonalDCT, step_size
from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes
from tiny import tiny_llama

DEFAULTS: dict[str, Any] = {
    "rank": 3,
    "momentum": 0.95,
    "size": "none",
    "iterations": 5,
    "precision": "full",
    "norm": 1,
    "vectors": "dct2",
    "route": "auto",
    "betas": (0.9, 0.95),
    "eps": 1e-10,
    "weight_decay": 0.0,
}
SHAPES = [(9, 6), (6, 9), (6, 6)]


def one(weight: Tensor, **settings: Any) -> tuple[nn.Parameter, OrthogonalDCT]:
    parameter = nn.Parameter(weight.clone())
    optimizer = OrthogonalDCT([{"params": [parameter], "projected": True}], lr=0.1, **{**DEFAULTS, **settings})
    return parameter, optimizer


def iterated(b: Tensor) -> Tensor:
    """The iteration through the singular values: o = U p(p(...(S / ||b||))) V^T."""
    u, s, vh = torch.linalg.svd(b, full_matrices=False)
    s = s / (torch.linalg.vector_norm(b) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ vh


@pytest.mark.parametrize("vectors", ["dct2", "dct3"])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("size", ["none", "kj", "kimi", "dion"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_definition_step_by_step(shape: Any, size: Any, norm: int, vectors: Any) -> None:
    """M <- mu M_in + M_out: only what lies in the subspace decays."""
    W = draw(*shape)
    parameter, optimizer = one(W, size=size, norm=norm, vectors=vectors, weight_decay=0.2)
    right = shape[0] >= shape[1]
    Q = basis_matrix(min(shape), torch.float64, W.device, vectors).t()
    M = torch.zeros_like(W)
    chosen = set()
    for i in range(4):
        G = draw(*shape, seed=50 + i)
        step(parameter, optimizer, G)
        M = M + G
        norms = torch.linalg.vector_norm(M @ Q if right else Q.t() @ M, norm, dim=0 if right else 1)
        index = norms.argsort(descending=True)[:3].sort().values
        chosen.add(tuple(index.tolist()))
        part = Q[:, index]
        b = M @ part if right else part.t() @ M
        inside = b @ part.t() if right else part @ b
        M = 0.95 * inside + (M - inside)
        o = iterated(b)
        m, n = shape
        k = {"none": 1.0, "kj": max(1, m / n) ** 0.5, "kimi": 0.2 * max(m, n) ** 0.5, "dion": (m / n) ** 0.5}[size]
        assert k == pytest.approx(step_size(m, n, size), rel=1e-15)
        W = (1 - 0.1 * 0.2) * W - 0.1 * k * (o @ part.t() if right else part @ o)
        torch.testing.assert_close(parameter.detach(), W, atol=1e-11, rtol=0)
        torch.testing.assert_close(optimizer.state[parameter]["momentum"], M, atol=1e-12, rtol=0)
    assert len(chosen) > 1


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4), (1, 6)])
def test_newton_schulz_acts_on_singular_values_alone(shape: Any) -> None:
    X = draw(*shape)
    torch.testing.assert_close(newton_schulz(X), iterated(X), atol=1e-12, rtol=0)


def test_newton_schulz_brings_singular_values_near_one() -> None:
    """All that began between 0.01 and 1 of the norm end between 0.68 and 1.14."""
    u, v = torch.linalg.qr(draw(40, 12))[0], torch.linalg.qr(draw(12, 12, seed=1))[0]
    s = torch.logspace(-2, 0, 12, dtype=torch.float64)
    X = u * (s / torch.linalg.vector_norm(s) * 1.0) @ v.t()
    ends = torch.linalg.svdvals(newton_schulz(X))
    assert 0.68 <= float(ends.min()) <= float(ends.max()) <= 1.21


def test_newton_schulz_of_zeros_is_zero_and_types_stay() -> None:
    assert not newton_schulz(torch.zeros(3, 5)).any()
    X = draw(8, 4).bfloat16()
    o = newton_schulz(X)
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o.double(), newton_schulz(X.double()), atol=0.1, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_it_is_muon_without_a_projection(shape: Any) -> None:
    """The basis is orthonormal: the iteration of G Q, taken back, is that of G; and the whole momentum decays."""
    G = draw(*shape)
    parameter, optimizer = one(draw(*shape), rank=99)
    torch.testing.assert_close(step(parameter, optimizer, G), -0.1 * iterated(G), atol=1e-12, rtol=0)
    torch.testing.assert_close(optimizer.state[parameter]["momentum"], 0.95 * G, atol=1e-12, rtol=0)


def test_a_step_has_the_rank_and_nearly_equal_singular_values() -> None:
    parameter, optimizer = one(draw(12, 8))
    values = torch.linalg.svdvals(step(parameter, optimizer, draw(12, 8, seed=2))) / 0.1
    assert (values[3:] < 1e-12).all()
    assert 0.6 <= float(values[2]) <= float(values[0]) <= 1.21


def test_bfloat16_steps_are_near_full_ones() -> None:
    (full, a), (half, b) = one(draw(9, 6)), one(draw(9, 6), precision="bfloat16")
    G = draw(9, 6, seed=3)
    torch.testing.assert_close(step(half, b, G), step(full, a, G), atol=0.01, rtol=0)


def test_the_rest_is_adamw_at_its_own_rate() -> None:
    model = tiny_llama()
    optimizer = rw.make_optimizer(model, "trion", lr=0.02, rank=4)
    for group in optimizer.param_groups:
        for name in group["names"]:
            assert group["projected"] == ("_proj" in name)
        assert group["lr"] == pytest.approx(0.02 if group["projected"] else 3e-4)
    weight = draw(6)
    plain, own = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    reference = torch.optim.AdamW([plain], lr=0.1, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    other = OrthogonalDCT([{"params": [own]}], lr=0.1, **DEFAULTS)
    for i in range(4):
        step(plain, reference, draw(6, seed=i))
        step(own, other, draw(6, seed=i))
    torch.testing.assert_close(own, plain, atol=1e-14, rtol=0)


def test_the_state_is_the_momentum() -> None:
    parameter, optimizer = one(draw(9, 6))
    step(parameter, optimizer, draw(9, 6))
    assert {name: tuple(t.shape) for name, t in optimizer.state[parameter].items()} == {"momentum": (9, 6)}


@pytest.mark.parametrize(
    ("shape", "linear", "total"), [("llama-60m", 25_296_896, 58_073_600), ("llama-350m", 302_383_104, 367_969_280)]
)
def test_the_state_of_the_papers_models_in_16_bits(shape: str, linear: int, total: int) -> None:
    """One number of a projected weight, two of any other; the indices are not kept."""
    model = open_source(shape, "bfloat16").model.requires_grad_(True)
    assert optimizer_bytes("trion", model) == 2 * linear + 4 * (total - linear)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"momentum": 1.0}, {"size": "muon"}, {"iterations": 0}])
def test_bad_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        rw.make_optimizer(tiny_llama(), "trion", **wrong)


def test_a_run_lowers_the_loss() -> None:
    check_falls("trion", {"rank": 4, "other_rate": 1.0})


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    check_resumes(tmp_path, "trion", {"rank": 4})


def test_the_factor_by_shape() -> None:
    assert [step_size(8, 2, rule) for rule in ("none", "kj", "dion")] == [1, 2, 2]  # type: ignore[arg-type]
    assert [step_size(2, 8, rule) for rule in ("kj", "dion")] == [1, 0.5]  # type: ignore[arg-type]
    assert step_size(4, 25, "kimi") == pytest.approx(0.2 * math.sqrt(25))
