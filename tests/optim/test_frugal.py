"""FRUGAL: its rule on a share of every gradient, sign or nothing on the rest, another share every `refresh` steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from frugal_steps import DEFAULTS, draw, one, step
from loops import check_falls, check_resumes
from torch import nn

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.optim.blocks import Blocks
from rankworks.core.optim.split import stored
from rankworks.optim.frugal import SplitOptimizer
from rankworks.optim.galore import GaLoreSteps
from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes
from tiny import tiny_bert_classifier, tiny_llama, token_batch

KEPT = ("rows", "columns", "entries", "P", "Q", "left", "right")
CHOSEN = ["columns", "rows", "randk", "randperm"]
EXACT = {"atol": 1e-12, "rtol": 0.0}


# ---- the share ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["block", *CHOSEN])
@pytest.mark.parametrize("moments", ["reset", "keep", "realign"])
def test_with_a_density_of_one_it_is_adamw(projection: str, moments: str) -> None:
    """One that begins anew every `refresh` steps where the moments are reset."""
    weight = draw(6, 4)
    ours, optimizer = one(weight, 1.0, projection=projection, moments=moments, refresh=3, weight_decay=0.1)
    theirs = nn.Parameter(weight.clone())
    for i in range(8):
        if i == 0 or (moments == "reset" and i % 3 == 0):
            reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1)
        step(ours, optimizer, draw(6, 4, seed=i))
        step(theirs, reference, draw(6, 4, seed=i))
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("projection", ["block", *CHOSEN, "svd", "random", "dct"])
def test_with_a_density_of_zero_it_is_signsgd_without_a_state(projection: str) -> None:
    parameter, optimizer = one(draw(6, 4), 0.0, projection=projection)
    for i in range(3):
        G = draw(6, 4, seed=i)
        torch.testing.assert_close(step(parameter, optimizer, G), -0.1 * G.sign(), **EXACT)
    assert list(optimizer.state[parameter]) == ["step"]


def test_with_a_density_of_zero_the_other_weights_have_adamw() -> None:
    """The linear layers of a model step by signs, embeddings, head and norms as torch's AdamW has them."""
    models = [tiny_llama().double().requires_grad_(True) for _ in range(2)]
    ours = rw.make_optimizer(models[0], "frugal", lr=1e-2, density=0.0)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=1e-2, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in models[0].named_parameters()}
    ids = token_batch(vocab=320)
    for model, optimizer in zip(models, (ours, theirs), strict=True):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if "_proj" in name:
            torch.testing.assert_close(p.detach(), before[name] - 1e-2 * p.grad.sign(), **EXACT)
        else:
            torch.testing.assert_close(p, q, **EXACT)


@pytest.mark.parametrize("projection", CHOSEN)
@pytest.mark.parametrize("rest", ["sign_sgd", "sgd", "no"])
def test_both_rules_have_their_own_numbers(projection: str, rest: str) -> None:
    """What is kept moves as AdamW moves it alone; the rest by lr c c_rest exactly, or times the gradient."""
    weight = draw(6, 4)
    settings = {"projection": projection, "rest": rest, "scale": 0.5, "rest_scale": 0.25, "weight_decay": 0.1}
    parameter, optimizer = one(weight, **settings)
    whole = nn.Parameter(weight.clone())
    reference = torch.optim.AdamW([whole], lr=0.05, weight_decay=0.2)  # decay goes with the rate before scaling
    free = weight.clone()
    for i in range(4):
        G = draw(6, 4, seed=i)
        G[i, i % 4] = 0.0
        step(parameter, optimizer, G)
        step(whole, reference, G)
        free = 0.99 * free - 0.1 * 0.5 * 0.25 * {"sign_sgd": G.sign(), "sgd": G, "no": 0 * G}[rest]
    kept: Any = stored(optimizer.state[parameter], parameter)
    free[kept.back(torch.ones_like(kept.into(weight)), (6, 4)) == 1] = 0.0
    kept.put(free, kept.into(whole.detach()))
    torch.testing.assert_close(parameter.detach(), free, **EXACT)


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("projection", ["svd", "random", "dct"])
def test_the_rest_of_a_basis_is_orthogonal_to_it(projection: str, side: str) -> None:
    """The first step is lr sign(R) taken back, and lr times the rest, whose squared norm is what R leaves of G's."""
    G = draw(6, 4)
    parameter, optimizer = one(draw(6, 4, seed=1), projection=projection, side=side, rest="sgd", eps=1e-30)
    moved = step(parameter, optimizer, G)
    kept: Any = stored(optimizer.state[parameter], parameter)
    R = kept.into(G)
    rest = G - kept.back(R)
    torch.testing.assert_close(moved, -0.1 * (kept.back(R.sign()) + rest), **EXACT)
    torch.testing.assert_close(kept.into(rest), torch.zeros_like(R), **EXACT)
    torch.testing.assert_close(G.square().sum(), R.square().sum() + rest.square().sum(), **EXACT)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
@pytest.mark.parametrize("side", ["std", "reverse_std", "full"])
def test_without_a_rest_and_a_reset_it_is_galore(shape: Any, side: str) -> None:
    """Its scale 1 and its eps so small that it does not matter where it is added; over a change of subspace."""
    weight, projected = draw(*shape), {"std": 6, "reverse_std": 8, "full": 6}[side]
    settings: dict[str, Any] = {"refresh": 3, "side": side, "subspace": "svd", "eps": 1e-30}
    ours, optimizer = one(weight, 2 / projected, projection="svd", moments="keep", rest="no", **settings)
    theirs = nn.Parameter(weight.clone())
    galore = {"rank": 2, "scale": 1.0, "rule": "adamw", "betas": (0.9, 0.999), "weight_decay": 0.0, "seed": 0}
    reference = GaLoreSteps([{"params": [theirs], "projected": True}], lr=0.1, **galore, **settings)
    for i in range(7):
        step(ours, optimizer, draw(*shape, seed=i))
        step(theirs, reference, draw(*shape, seed=i))
        torch.testing.assert_close(ours, theirs, **EXACT)


# ---- the change of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [*CHOSEN, "svd", "random", "dct"])
def test_after_refresh_steps_another_share_begins_anew(projection: str) -> None:
    """A step at a change is the first step of an optimizer that knows nothing of the past."""
    parameter, optimizer = one(draw(12, 8), projection=projection, refresh=3, eps=1e-30)
    shares = []
    for i in range(4):
        G = draw(12, 8, seed=i)
        moved = step(parameter, optimizer, G)
        shares.append(
            [
                t.clone()
                for n, t in optimizer.state[parameter].items()
                if n in ("rows", "columns", "entries", "P", "Q", "left", "right")
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(shares[0], shares[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(shares[2], shares[3], strict=True))
    kept: Any = stored(optimizer.state[parameter], parameter)
    R = kept.into(G)
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], 0.1 * R, **EXACT)
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"], 0.001 * R**2, **EXACT)
    back = kept.back(R.sign()) if projection in ("svd", "random", "dct") else kept.back(R.sign(), (12, 8))
    rest = G - (kept.back(R) if projection in ("svd", "random", "dct") else kept.back(R, (12, 8)))
    torch.testing.assert_close(moved, -0.1 * back - 0.1 * rest.sign(), **EXACT)


def whole_run(steps: int, **options: Any) -> tuple[Any, Any]:
    """A model and its optimizer after some steps, with what moments there were after each."""
    model = tiny_llama().requires_grad_(True)
    optimizer = rw.make_optimizer(model, "frugal", lr=1e-3, **options)
    held = []
    for i in range(steps):
        optimizer.zero_grad()
        ids = (token_batch(vocab=320) + i) % 320
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        names = {p: n for n, p in model.named_parameters()}
        held.append({names[p] for p, state in optimizer.state.items() if "exp_avg" in state and "_proj" in names[p]})
    return optimizer, held


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "mirror"])
def test_of_blocks_those_whose_turn_it_is_have_moments(order: str) -> None:
    """round(14 / 4) = 4 of the 14 linear layers, others after every `refresh` steps; the rest holds nothing."""
    optimizer, held = whole_run(5, refresh=2, order=order)
    assert [len(names) for names in held] == [4] * 5
    assert held[0] == held[1] != held[2] == held[3] != held[4]
    assert {n for g in optimizer.param_groups for n in g.get("active", ()) if "_proj" in n} == held[-1]


def test_blocks_whose_moments_are_kept_go_on_and_others_begin() -> None:
    """With keep a tensor that stays active has gone all the way since its turn began; bias corrections know it."""
    names = ["a", "b", "c"]
    weights = {n: draw(4, 3, seed=i) for i, n in enumerate(names)}
    parameters = {n: nn.Parameter(w.clone()) for n, w in weights.items()}
    group = {"params": list(parameters.values()), "names": names, "projected": True, "density": 0.67}
    settings = {**DEFAULTS, "projection": "block", "refresh": 2, "moments": "keep"}
    optimizer = SplitOptimizer([group], Blocks(names, 2, "ascending"), lr=0.1, **settings)  # ab, ca, bc, ab
    copies = {n: nn.Parameter(w.clone()) for n, w in weights.items()}
    adamws: dict[str, Any] = {}
    for i, active in enumerate(["ab", "ab", "ac", "ac", "bc", "bc", "ab", "ab"]):
        adamws = {n: adamws.get(n) or torch.optim.AdamW([copies[n]], lr=0.1, weight_decay=0.0) for n in active}
        for n in names:
            G = draw(4, 3, seed=10 * i + ord(n))
            parameters[n].grad = G
            if n in active:
                copies[n].grad = G
                adamws[n].step()
            else:
                copies[n].data -= 0.1 * G.sign()
        optimizer.step()
        for n in names:
            torch.testing.assert_close(parameters[n], copies[n], **EXACT)


def test_realigned_moments_of_columns_stay_with_their_columns() -> None:
    """Six of eight columns: what stays chosen goes on as if nothing had changed, what is new has moments from zero."""
    parameter, optimizer = one(draw(4, 8), 0.75, refresh=1, moments="realign", rest="no")
    m = torch.zeros(4, 8, dtype=torch.float64)
    for i in range(5):
        G = draw(4, 8, seed=i)
        step(parameter, optimizer, G)
        kept: Any = stored(optimizer.state[parameter], parameter)
        m = kept.back(kept.into(0.9 * m + 0.1 * G), (4, 8))
        torch.testing.assert_close(kept.back(optimizer.state[parameter]["exp_avg"], (4, 8)), m, **EXACT)


# ---- which weights --------------------------------------------------------------------------------------------------


def parts(model: Any, **options: Any) -> dict[str, str]:
    """What happens to every trained parameter, by name: "split", "free" or "whole"."""
    optimizer = rw.make_optimizer(model, "frugal", **options)
    kinds = {}
    for group in optimizer.param_groups:
        kind = "whole" if not group["projected"] else "split" if group["density"] else "free"
        kinds |= dict.fromkeys(group["names"], kind)
    return kinds


@pytest.mark.parametrize(
    ("flag", "ending"), [("norms", "norm.weight"), ("embeddings", "embed_tokens.weight"), ("logits", "lm_head.weight")]
)
def test_norms_embeddings_and_the_head_are_projected_when_asked(flag: str, ending: str) -> None:
    usual, asked = parts(tiny_llama()), parts(tiny_llama(), **{flag: True})
    assert all((kind == "split") == ("_proj" in name) and kind != "free" for name, kind in usual.items())
    changed = {name for name in usual if usual[name] != asked[name]}
    assert changed == {name for name in usual if name.endswith(ending)}
    assert changed


@pytest.mark.parametrize("projection", ["columns", "rows", "randk"])
def test_of_a_vector_entries_are_kept(projection: str) -> None:
    """A quarter of every gain has moments, the rest moves by the rate."""
    model = tiny_llama().requires_grad_(True)
    optimizer = rw.make_optimizer(model, "frugal", lr=1e-2, projection=projection, norms=True, eps=1e-30)
    gain = model.model.norm.weight
    for i in range(2):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1.0 + 9.0 * i)
        optimizer.step()
    assert optimizer.state[gain]["exp_avg"].shape == optimizer.state[gain]["entries"].shape == (8,)
    kept = torch.zeros(32).index_fill(0, optimizer.state[gain]["entries"].long(), 1.0).bool()
    torch.testing.assert_close(gain.detach()[~kept], torch.full((24,), 1.0 - 2e-2), atol=1e-6, rtol=0)
    assert bool(((gain.detach()[kept] - (1.0 - 2e-2)).abs() > 1e-3).all())


def test_a_tied_head_is_a_head() -> None:
    tied = "model.embed_tokens.weight"
    assert parts(tiny_llama(tie=True), embeddings=True)[tied] == "whole"
    assert parts(tiny_llama(tie=True), logits=True)[tied] == "split"


def test_fine_tuning_leaves_other_linear_layers_without_moments() -> None:
    """Queries and values are split, all other linear layers permanently free; what is not linear has AdamW."""
    model = tiny_bert_classifier()
    kinds = parts(model, targets=["query", "value"], free="all-linear", projection="columns", rank=8, rest_scale=0.1)
    for name, kind in kinds.items():
        layer = "encoder.layer" in name and name.endswith("weight") and "LayerNorm" not in name
        qv = "query.weight" in name or "value.weight" in name
        pooler = "pooler.dense.weight" in name  # a linear layer that is no head
        assert kind == ("split" if qv else "free" if layer or pooler else "whole"), name
    optimizer = rw.make_optimizer(
        model, "frugal", targets=["query", "value"], free="all-linear", projection="columns", rank=8
    )
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    shapes = [
        tuple(s["exp_avg"].shape)
        for g in optimizer.param_groups
        if g["density"]
        for p in g["params"]
        for s in [optimizer.state[p]]
    ]
    assert shapes == [(32, 8)] * 4, "rank 8 keeps 8 columns of every square weight"


def test_an_adapters_matrices_are_projected_where_its_sites_are() -> None:
    model = rw.adapt(tiny_llama(), "dora", rank=4, targets=["q_proj", "down_proj"])
    kinds = parts(model, targets=["q_proj"], projection="columns")
    for name, kind in kinds.items():
        assert kind == ("split" if "q_proj" in name and name[-2:] in (".A", ".B") else "whole"), name


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose block, columns, rows or randk"):
        rw.make_optimizer(tiny_llama(), "frugal", projection="svd", norms=True)
    with pytest.raises(ConfigError, match="even number"):
        rw.make_optimizer(tiny_llama(layers=1), "frugal", density=0.4, order="mirror")
    with pytest.raises(ConfigError, match="density"):
        rw.make_optimizer(tiny_llama(), "frugal", density=1.5)


# ---- what it keeps --------------------------------------------------------------------------------------------------

SHAPES = ["llama-60m", "llama-130m", "llama-350m", "llama-1b"]
COUNTS = {  # linear, all else: the exact parameters of each model
    "llama-60m": (25_296_896, 32_776_704),
    "llama-130m": (84_934_656, 49_171_200),
    "llama-350m": (302_383_104, 65_586_176),
    "llama-1b": (1_207_910_400, 131_172_352),
}
GIB = {
    "adamw": (0.43, 1.00, 2.74, 9.98),
    "density 0.25": (0.29, 0.52, 1.05, 3.23),
    "density 0": (0.24, 0.37, 0.49, 0.98),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_twelve_cells_of_its_memory_table(shape: str) -> None:
    """float32 moments in GiB: 8 bytes (all else + density linear), to the byte, and the table's cells to 0.005.

    Blocks hold that in the mean of their turns, columns always but for the rounding of 5461/4 and their lists.
    """
    linear, rest = COUNTS[shape]
    model = open_source(shape, "float32").model.requires_grad_(True)
    place = SHAPES.index(shape)
    plans: dict[str, tuple[float, Any]] = {
        "adamw": (1.0, "adamw"),
        "density 0.25": (0.25, {"optimizer": "frugal"}),
        "density 0": (0.0, {"optimizer": "frugal", "density": 0.0}),
    }
    for row, (density, optimizer) in plans.items():
        told = optimizer_bytes(optimizer, model)
        assert told == 8 * (rest + density * linear)
        assert told / 2**30 == pytest.approx(GIB[row][place], abs=0.005)
    columns = optimizer_bytes({"optimizer": "frugal", "projection": "columns"}, model)
    assert columns / 2**30 == pytest.approx(GIB["density 0.25"][place], abs=0.005)


@pytest.mark.parametrize("rule", ["lion", "sgdm", "signsgdm"])
def test_rules_with_one_moment_need_half(rule: str) -> None:
    model = open_source("llama-60m", "float32").model.requires_grad_(True)
    linear, rest = COUNTS["llama-60m"]
    assert optimizer_bytes({"optimizer": "frugal", "rule": rule}, model) == 4 * (rest + linear / 4)


def test_what_blocks_hold_is_the_mean_over_their_turns() -> None:
    """Over a whole round of turns: 14 tensors by 7 in two periods."""
    model = tiny_llama().requires_grad_(True)
    planned = optimizer_bytes({"optimizer": "frugal", "density": 0.5, "order": "ascending"}, model)
    optimizer = rw.make_optimizer(model, "frugal", density=0.5, order="ascending", refresh=1)
    held = []
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        states = [t for s in optimizer.state.values() for n, t in s.items() if n != "step"]
        held.append(sum(t.numel() * t.element_size() for t in states))
    assert sum(held) / 2 == planned


# ---- runs -----------------------------------------------------------------------------------------------------------

RUNS: list[dict[str, Any]] = [
    {"refresh": 3},
    {"refresh": 3, "order": "descending", "moments": "keep", "rule": "lion"},
    {"refresh": 3, "projection": "columns", "moments": "realign"},
    {"refresh": 3, "projection": "randk", "rule": "sgdm", "rest": "sgd", "scale": 10.0},
    {"refresh": 3, "projection": "svd", "side": "full", "moments": "realign"},
    {"refresh": 3, "projection": "dct", "moments": "realign"},
]


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_the_loss_falls_in_a_run(options: dict[str, Any]) -> None:
    check_falls("frugal", options, lr=3e-3)


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_a_run_goes_on_bit_for_bit_within_a_period_and_past_a_change(tmp_path: Path, options: dict[str, Any]) -> None:
    check_resumes(tmp_path, "frugal", options, stop=6)
