"""DCT-AdamW: AdamW on the columns of a fixed basis that the gradient lies along, chosen at every step."""

from __future__ import annotations

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
from rankworks.optim.dct_adamw import ProjectedDCT
from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes
from tiny import tiny_llama

DEFAULTS: dict[str, Any] = {
    "rank": 2,
    "refresh": 1,
    "feedback": "none",
    "rotate": True,
    "norm": 1,
    "vectors": "dct2",
    "route": "auto",
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
}
SHAPES = [(7, 4), (4, 7)]
RELEASED = pytest.mark.parametrize("setting", [{}, {"feedback": "own"}, {"rotate": False}, {"refresh": 3}, {"norm": 2}])


def one(weight: Tensor, **settings: Any) -> tuple[nn.Parameter, ProjectedDCT]:
    parameter = nn.Parameter(weight.clone())
    optimizer = ProjectedDCT([{"params": [parameter], "projected": True}], lr=0.1, **{**DEFAULTS, **settings})
    return parameter, optimizer


class Dense:
    """The definition with matrices: W (m, n) with m >= n; rotations are products with Rm."""

    def __init__(self, weight: Tensor, **settings: Any):
        self.W, self.set = weight.clone(), {**DEFAULTS, **settings}
        self.Q = basis_matrix(weight.shape[1], weight.dtype, weight.device, self.set["vectors"]).t()
        self.E, self.t = torch.zeros_like(weight), 0

    def step(self, G: Tensor, lr: float = 0.1) -> None:
        """One step of the algorithm."""
        s, b1, b2 = self.set, *self.set["betas"]
        self.t += 1
        self.W = self.W * (1 - lr * s["weight_decay"])
        A = G + self.E
        if self.t == 1 or self.t % s["refresh"] == 0:
            norms = torch.linalg.vector_norm(A @ self.Q, s["norm"], dim=0)
            new = self.Q[:, norms.argsort(descending=True)[: s["rank"]].sort().values]
            if self.t == 1:
                self.m = self.v = G.new_zeros(len(G), s["rank"])
            elif s["rotate"]:
                Rm = (self.Qr.t() @ new).round()  # zeros and ones, see test_dct.py; the root of a rounded zero is large
                self.m, self.v = self.m @ Rm, (self.v @ Rm).abs()
            self.Qr = new
        a = A @ self.Qr
        if s["feedback"] != "none":
            self.E = A - a @ self.Qr.t()
        self.m, self.v = b1 * self.m + (1 - b1) * a, b2 * self.v + (1 - b2) * a * a
        root = (1 - b2**self.t) ** 0.5
        u = self.m / (s["eps"] * root + self.v.sqrt())
        self.W = self.W - lr * root / (1 - b1**self.t) * u @ self.Qr.t()


@RELEASED
@pytest.mark.parametrize("vectors", ["dct2", "dct3"])
def test_it_is_the_definition_step_by_step(setting: dict[str, Any], vectors: str) -> None:
    """Rotation as an index copy is the product with Rm, and what is kept of a subspace is its indices."""
    settings = {**setting, "vectors": vectors, "weight_decay": 0.1, "rank": 3}
    weight = draw(9, 6)
    parameter, optimizer = one(weight, **settings)
    dense = Dense(weight, **settings)
    seen = set()
    for i in range(8):
        G = draw(9, 6, seed=10 + i)
        step(parameter, optimizer, G)
        dense.step(G)
        seen.add(tuple(optimizer.state[parameter]["index"].tolist()))
        torch.testing.assert_close(parameter.detach(), dense.W, atol=1e-11, rtol=0)
    assert len(seen) > 1, "the vectors change, so that moving moments was seen"


@RELEASED
def test_a_transposed_weight_takes_the_transposed_steps(setting: dict[str, Any]) -> None:
    """The left side is the right side of the transposed."""
    weight = draw(9, 6)
    (tall, right), (wide, left) = one(weight, rank=3, **setting), one(weight.t(), rank=3, **setting)
    for i in range(6):
        G = draw(9, 6, seed=30 + i)
        step(tall, right, G)
        step(wide, left, G.t())
        torch.testing.assert_close(wide.detach(), tall.detach().t(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_fed_back_is_what_was_left_out(shape: tuple[int, int]) -> None:
    """E + back(R) = A = G + E_before, and nothing of E lies in the subspace."""
    parameter, optimizer = one(draw(*shape), feedback="own")
    E = torch.zeros(*shape, dtype=torch.float64)
    for i in range(4):
        G = draw(*shape, seed=i)
        step(parameter, optimizer, G)
        state = optimizer.state[parameter]
        part = basis_matrix(4, torch.float64, parameter.device)[state["index"]].t()
        A = G + E
        inside = A @ part @ part.t() if shape[0] >= shape[1] else part @ part.t() @ A
        E = state["feedback"].clone()
        torch.testing.assert_close(E + inside, A, atol=1e-13, rtol=0)
        left = E @ part if shape[0] >= shape[1] else part.t() @ E
        torch.testing.assert_close(left, torch.zeros_like(left), atol=1e-13, rtol=0)


@pytest.mark.parametrize(("kept", "bits"), [("8bit", 8), ("4bit", 4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_feedback_in_few_bits_is_near_the_exact_one(shape: tuple[int, int], kept: str, bits: int) -> None:
    """After one step, from the same gradient: at most half a step of its row apart."""
    G = draw(*shape)
    exact, optimizer = one(draw(*shape), feedback="own")
    coded, other = one(draw(*shape), feedback=kept)
    step(exact, optimizer, G)
    step(coded, other, G)
    assert torch.equal(exact, coded), "the first step has nothing to feed back"
    from rankworks.core.codes.rows import Rows, dequantise_rows

    E, state = optimizer.state[exact]["feedback"], other.state[coded]
    back = dequantise_rows(Rows(state["feedback"], state["feedback_edges"]), shape[1], bits)  # type: ignore[arg-type]
    steps = (E.amax(1) - E.amin(1)) / (2**bits - 1)
    assert ((back - E).abs() <= steps[:, None] / 2 + 1e-6).all()
    moved, exactly = step(coded, other, G), step(exact, optimizer, G)
    assert not torch.equal(moved, exactly)
    torch.testing.assert_close(moved, exactly, atol=0.1, rtol=0)


def test_with_feedback_no_part_of_a_gradient_is_lost_for_good() -> None:
    """A direction that is never among the largest comes through in the end, and does not without feedback."""
    Q = basis_matrix(4, torch.float64, torch.device("cpu")).t()
    G = torch.outer(torch.ones(6, dtype=torch.float64), Q[:, 0] + 0.2 * Q[:, 3])
    for kept, reached in (("none", False), ("own", True)):
        parameter, optimizer = one(torch.zeros(6, 4, dtype=torch.float64), rank=1, feedback=kept)
        for _ in range(8):
            step(parameter, optimizer, G)
        assert bool((parameter @ Q[:, 3]).abs().max() > 1e-3) == reached


def test_full_rank_without_adam_is_the_identity() -> None:
    """Moments of the whole basis: with b1 = 0 and a huge eps the step is along the gradient itself."""
    G = draw(7, 4)
    parameter, optimizer = one(torch.zeros(7, 4, dtype=torch.float64), rank=9, betas=(0.0, 0.999), eps=1e12)
    moved = step(parameter, optimizer, G)
    torch.testing.assert_close(-moved * 1e13, G, atol=1e-10, rtol=0)
    assert optimizer.state[parameter]["index"].tolist() == [0, 1, 2, 3]


def test_the_first_step_is_the_sign_of_the_projection_taken_back() -> None:
    G = draw(7, 4)
    parameter, optimizer = one(draw(7, 4), eps=1e-30)
    moved = step(parameter, optimizer, G)
    part = basis_matrix(4, torch.float64, G.device)[optimizer.state[parameter]["index"]].t()
    torch.testing.assert_close(moved, -0.1 * (G @ part).sign() @ part.t(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kept", "extra"), [("none", 0), ("own", 28 * 4), ("8bit", 28), ("4bit", 0)], ids=["none", "own", "8bit", "4bit"]
)
def test_the_state_is_moments_and_indices(shape: Any, kept: str, extra: int) -> None:
    """2 r L numbers and r int32; the feedback in the weight's type, or in codes with two float32 a row."""
    parameter, optimizer = one(draw(*shape).float(), feedback=kept)
    step(parameter, optimizer, draw(*shape).float())
    step(parameter, optimizer, draw(*shape).float())
    state = optimizer.state[parameter]
    assert state["index"].dtype == torch.int32
    held = sum(t.numel() * t.element_size() for name, t in state.items() if name != "step")
    if kept in ("8bit", "4bit"):
        extra += 8 * shape[0]
    if kept == "4bit":
        extra += shape[0] * -(-shape[1] // 2)
    assert held == 2 * 2 * 7 * 4 + 2 * 4 + extra


def test_what_is_projected() -> None:
    optimizer = rw.make_optimizer(tiny_llama(), "dct-adamw", rank=4, largest=60)  # 64 x 32 feed-forward layers
    for group in optimizer.param_groups:
        for name in group["names"]:
            assert group["projected"] == ("self_attn" in name and "_proj" in name), name


def test_outside_the_subspace_it_is_torchs_adamw() -> None:
    weight = draw(6)
    plain, own = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    reference = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.2)
    optimizer = ProjectedDCT([{"params": [own]}], lr=0.1, **{**DEFAULTS, "weight_decay": 0.2})
    for i in range(4):
        step(plain, reference, draw(6, seed=i))
        step(own, optimizer, draw(6, seed=i))
    torch.testing.assert_close(own, plain, atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"refresh": 0}, {"norm": 3}, {"feedback": "2bit"}, {"vectors": "dct4"}, {"route": "slow"}]
)
def test_bad_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        rw.make_optimizer(tiny_llama(), "dct-adamw", **wrong)


@pytest.mark.parametrize(
    ("shape", "rank", "moments", "indices"),
    [
        ("llama-60m", 128, 12_648_448, 8 * 7 * 128),
        ("llama-130m", 256, 56_623_104, 12 * 7 * 256),
        ("llama-350m", 256, 151_191_552, 24 * 7 * 256),
        ("llama-1b", 512, 603_955_200, 24 * 7 * 512),
        ("llama-7b", 1024, 3_238_002_688, 32 * 7 * 1024),
    ],
)
def test_the_state_of_the_papers_models_in_16_bits(shape: str, rank: int, moments: int, indices: int) -> None:
    """GaLore's moments, r int32 in the place of its bases, and AdamW for the rest."""
    model = open_source(shape, "bfloat16").model.requires_grad_(True)
    linear = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    rest = sum(p.numel() for p in model.parameters()) - linear
    told = 2 * moments + 4 * indices + 4 * rest
    assert optimizer_bytes({"optimizer": "dct-adamw", "rank": rank}, model) == told
    own = optimizer_bytes({"optimizer": "dct-adamw", "rank": rank, "feedback": "own"}, model)
    assert own == told + 2 * linear
    rows = sum(p.shape[0] for n, p in model.named_parameters() if "_proj" in n)
    assert optimizer_bytes({"optimizer": "dct-adamw", "rank": rank, "feedback": "8bit"}, model) == (
        told + linear + 8 * rows
    )


def test_a_run_lowers_the_loss() -> None:
    check_falls("dct-adamw", {"rank": 4})


@pytest.mark.parametrize("kept", ["own", "4bit"])
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, kept: str) -> None:
    """Between two choices of vectors (refresh 3), with what is fed back."""
    check_resumes(tmp_path, "dct-adamw", {"rank": 4, "feedback": kept, "refresh": 3}, stop=6)
