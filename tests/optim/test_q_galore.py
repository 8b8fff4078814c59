"""Q-GaLore: integer weights rounded at random, projectors in 4 bits, and intervals that grow where a subspace stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import check_falls, check_resumes, whole_loop
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.codes.groups import dequantise_groups, group_bytes, quantise_groups
from rankworks.core.draw import seed_of
from rankworks.core.errors import ConfigError
from rankworks.core.optim.projection import leading_basis
from rankworks.core.registry import build
from rankworks.core.weights.holders import dense_weight
from rankworks.core.weights.integers import IntegerLayer, IntegerParameter, hold
from rankworks.optim.q_galore import QuantisedGaLore
from rankworks.plan.source import open_source
from rankworks.plan.states import optimizer_bytes, weight_bytes
from rankworks.train.checkpoint import trained_tensors
from tiny import tiny_gpt2, tiny_llama, token_batch

IDS = token_batch(vocab=320)
SMALL: dict[str, Any] = {"rank": 4, "refresh": 3}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one(weight: Tensor, lr: float = 0.01, integer: bool = True, **settings: Any) -> tuple[Any, Any]:
    """A weight of a linear layer, held as integers or not, and an optimizer over it."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    if integer:
        hold(layer, [layer.weight])
    spec: Any = build("optimizer", "q-galore", **{"rank": 4, "subspace": "svd", **settings})
    group = {"params": [layer.weight], "names": ["w"], "projected": True, "integer": integer}
    optimizer = spec.method.cls(spec).build([group], lr)
    assert isinstance(optimizer, QuantisedGaLore)
    return layer.weight, optimizer


def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, gradient: Tensor) -> Tensor:
    before = dense_weight(parameter).detach().clone()
    parameter.grad = gradient.clone()
    optimizer.step()
    return dense_weight(parameter).detach() - before


def interval(parameter: nn.Parameter, optimizer: Any) -> int:
    return int(optimizer.state[parameter]["interval"])


# ---- the step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 20), (20, 32)])
def test_a_step_is_the_definition(shape: tuple[int, int]) -> None:
    """Written out: the same INT4 projector in both directions, torch's eps, and the weight rounded at random anew."""
    W, G = draw(*shape), draw(*shape, seed=1)
    weight, optimizer = one(W)
    before = dense_weight(weight).detach().clone()
    step(weight, optimizer, G)
    tall = shape[0] >= shape[1]
    exact = leading_basis(G, 4, "std")
    P = dequantise_groups(quantise_groups(exact.Q if tall else exact.P, 4, 256))  # type: ignore[arg-type]
    R = G @ P if tall else P.t() @ G
    N = 0.1 * R / ((0.001 * R * R).sqrt() + 1e-8 * 0.001**0.5)
    moved = before - 0.01 * 0.25 * (0.001**0.5 / 0.1) * (N @ P.t() if tall else P @ N)
    noise = torch.Generator().manual_seed(seed_of(0, "w:rounding:1"))
    wanted = dequantise_groups(quantise_groups(moved, 8, 256, noise))
    off = (dense_weight(weight) - wanted).abs()
    assert (off > 1e-5).float().mean() < 0.01, "a number that lies on the edge of its draw may fall either way"
    assert isinstance(weight, IntegerParameter)


def test_the_integers_move_as_the_exact_weight_on_average() -> None:
    """Over many seeds, away from the ends of a group: no bias, for steps far smaller than one of the codes.

    The same weights rounded to the nearest keep their codes.
    """
    W, G = draw(16, 16).clamp(-2, 2), draw(16, 16, seed=1)
    W[0, 0], W[0, 1] = -2.5, 2.5
    lr = 0.002
    exact, other = one(W, lr, weight_bits=None, integer=False)
    with torch.no_grad():
        exact.copy_(dense_weight(one(W)[0]))
    wanted = step(exact, other, G)
    start = exact.detach() - wanted
    ends = []
    for seed in range(800):
        weight, optimizer = one(W, lr, seed=seed)
        step(weight, optimizer, G)
        ends.append(dense_weight(weight).detach())
    scale = float(weight.held.scales[0])
    assert wanted.abs().max() < 0.3 * scale
    inner = torch.ones(16, 16, dtype=torch.bool)
    inner[0, :2] = False  # the ends of the one group
    share = (exact.detach() / scale).double() % 1  # the probability to be rounded up; at least one case in 800 counted
    deviation = scale * (share * (1 - share) * 800).clamp_min(1).sqrt() / 800
    z = ((torch.stack(ends).double().mean(0) - exact.detach()) / deviation)[inner]
    assert z.square().mean().sqrt() < 1.3
    assert z.abs().max() < 5
    assert any(not torch.equal(end, start) for end in ends)
    weight, optimizer = one(W, lr, stochastic=False)
    codes = weight.held.codes.clone()
    step(weight, optimizer, G)
    stayed = (weight.held.codes == codes).float().mean()
    assert stayed > 0.95, "but for those near an edge, as the range moves with its ends"


def test_without_quantisation_it_is_galore_in_8_bits() -> None:
    """And with a threshold no cosine reaches, the interval is fixed."""
    runs = []
    for key, settings in (
        ("q-galore", {"weight_bits": None, "projector_bits": None, "threshold": 1.5}),
        ("galore", {"rule": "adamw8bit"}),
    ):
        model = tiny_llama(hidden=96).requires_grad_(True)
        optimizer = rw.make_optimizer(
            model, key, lr=1e-2, rank=48, refresh=2, subspace="randomised", weight_decay=0.1, **settings
        )
        for i in range(5):
            optimizer.zero_grad()
            ids = (IDS + i) % 320
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        assert any(v.dtype == torch.uint8 for state in optimizer.state.values() for v in state.values())
        runs.append(dict(model.named_parameters()))
    for name, parameter in runs[0].items():
        assert torch.equal(parameter, runs[1][name]), name


def test_one_quantised_projector_for_both_directions() -> None:
    """It is no longer quite orthonormal, and the step lies in the span of what it has become."""
    G = draw(64, 48, seed=1)
    weight, optimizer = one(torch.zeros(64, 48), weight_bits=None, integer=False, rank=8)
    moved = step(weight, optimizer, G)
    state = optimizer.state[weight]
    assert state["Q"].dtype == torch.uint8
    assert state["Q"].numel() == 48 * 8 // 2
    held = quantise_groups(leading_basis(G, 8, "std").Q, 4, 256)  # type: ignore[arg-type]
    assert torch.equal(state["Q"], held.codes)
    Q = dequantise_groups(held)
    error = torch.linalg.matrix_norm(Q.t() @ Q - torch.eye(8), 2)
    assert 1e-4 < error < 0.5
    inside = Q @ torch.linalg.pinv(Q)
    torch.testing.assert_close(moved @ inside, moved, atol=1e-6, rtol=0)


def test_decay_follows_the_step_and_a_rate_of_zero_moves_no_code() -> None:
    W, G = draw(16, 16), draw(16, 16, seed=1)
    plain, optimizer = one(W, weight_bits=None, integer=False)
    decayed, other = one(W, weight_bits=None, integer=False, weight_decay=0.5)
    other.param_groups[0]["weight_decay"] = 0.5
    step(plain, optimizer, G)
    step(decayed, other, G)
    torch.testing.assert_close(decayed.detach(), plain.detach() * (1 - 0.01 * 0.5))
    weight, optimizer = one(W, lr=0.0)
    codes = weight.held.codes.clone()
    step(weight, optimizer, G)
    assert torch.equal(weight.held.codes, codes)


# ---- the interval --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subspace", ["svd", "randomised", "warm"])
def test_a_constant_subspace_doubles_the_interval_at_the_sixth_refresh_and_at_every_later_one(subspace: str) -> None:
    """The first has no predecessor; the queue stays full. 64 intervals take a sixth of the decompositions."""
    weight, optimizer = one(draw(12, 8), refresh=1, subspace=subspace)
    G, found = draw(12, 8, seed=1), {}
    for t in range(1, 65):
        before = None if t == 1 else interval(weight, optimizer)
        step(weight, optimizer, G)
        if before is None or (t - 1) % before == 0:
            found[t] = interval(weight, optimizer)
    assert found == {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 2, 7: 4, 9: 8, 17: 16, 33: 32}
    assert len(found) / 64 < 0.362


def test_a_subspace_that_turns_keeps_its_interval() -> None:
    weight, optimizer = one(draw(12, 8), refresh=1)
    for t in range(12):
        G = torch.zeros(12, 8)
        G[0, t % 8], G[1, (t + 1) % 8] = 3.0, 1.0  # the first right singular vector is another axis each time
        step(weight, optimizer, G + 1e-3 * draw(12, 8, seed=t))
    assert interval(weight, optimizer) == 1
    assert optimizer.state[weight]["cosines"].max() < 0.1


def test_above_one_no_threshold_is_reached() -> None:
    weight, optimizer = one(draw(12, 8), refresh=2, threshold=1.01)
    for _ in range(30):
        step(weight, optimizer, draw(12, 8, seed=1))
    assert interval(weight, optimizer) == 2
    torch.testing.assert_close(optimizer.state[weight]["cosines"], torch.ones(5))


def test_the_sign_of_a_singular_vector_says_nothing() -> None:
    """A gradient turned about has the same subspace and maybe the opposite vector: |cos| is 1, the signed one -1."""
    for signed, wanted in ((False, 2), (True, 1)):
        weight, optimizer = one(draw(12, 8), refresh=1, window=1, signed=signed)
        step(weight, optimizer, draw(12, 8, seed=1))
        optimizer.state[weight]["past"].neg_()
        step(weight, optimizer, draw(12, 8, seed=1))
        cosine = float(optimizer.state[weight]["cosines"][0])
        assert cosine == pytest.approx(-1.0 if signed else 1.0, abs=1e-5)
        assert interval(weight, optimizer) == wanted


def test_growth_and_window_are_settings() -> None:
    weight, optimizer = one(draw(12, 8), refresh=2, window=1, growth=1.5)
    seen = []
    for _ in range(9):
        step(weight, optimizer, draw(12, 8, seed=1))
        seen.append(interval(weight, optimizer))
    assert seen == [2, 2, 3, 4, 6, 6, 9, 9, 9], "int(1.5 T) at the steps 3, 4, 5 and 7"


# ---- models --------------------------------------------------------------------------------------------------------


def test_what_is_held_as_integers_are_the_projected_linear_layers_until_the_end() -> None:
    model = tiny_llama().requires_grad_(True)
    names = [n for n, _ in model.named_parameters()]
    parameters = dict(model.named_parameters())
    optimizer = rw.make_optimizer(model, "q-galore", **SMALL)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, IntegerParameter) == ("_proj" in name), name
        assert parameter is parameters[name]
    assert [n for n, _ in model.named_parameters()] == names
    rw.make_optimizer(model, "adamw")  # another optimizer starts from the dense weights
    assert not any(isinstance(m, IntegerLayer) for m in model.modules())
    assert optimizer is not None


@pytest.mark.parametrize("settings", [{}, {"weight_bits": 4}, {"projector_bits": None, "stochastic": False}])
def test_the_loss_falls(settings: dict[str, Any]) -> None:
    check_falls("q-galore", {**SMALL, **settings})


def test_gpt2s_transposed_layers_are_trained_too() -> None:
    model = tiny_gpt2().requires_grad_(True)
    optimizer = rw.make_optimizer(model, "q-galore", lr=1e-2, **SMALL)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert sum(isinstance(p, IntegerParameter) for p in model.parameters()) == 8


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_layerwise_steps_are_those_of_the_ordinary_order(clip: float | None, accumulate: int) -> None:
    """In float64, where what is rounded at random does not hang on the order of sums."""
    ends = []
    for layerwise in (False, True):
        settings = {"steps": 4, "clip": clip, "accumulate": accumulate, "batch_size": 8 // accumulate}
        loop = whole_loop("q-galore", {**SMALL, "dense_at_end": False}, layerwise=layerwise, lr=1e-2, **settings)
        loop.run()
        ends.append({n: t.detach().clone() for n, t in trained_tensors(loop.model).items()})
    for key, tensor in ends[0].items():
        if key.endswith("codes"):
            assert (tensor.int() - ends[1][key].int()).abs().float().mean() < 0.02, key
        else:
            torch.testing.assert_close(tensor.float(), ends[1][key].float(), atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("layerwise", [False, True])
def test_it_resumes_bit_for_bit(tmp_path: Path, layerwise: bool) -> None:
    """Between refreshes, after intervals have grown: codes, projectors, cosines and draws go on as they would have."""
    options = {"rank": 4, "refresh": 1, "window": 1, "dense_at_end": False}
    check_resumes(tmp_path, "q-galore", options, layerwise=layerwise)


def test_after_a_run_the_model_is_dense_and_saves_like_any_other(tmp_path: Path) -> None:
    loop = whole_loop("q-galore", SMALL, steps=3, lr=1e-2)
    seen = {}
    loop.hooks[0].on_end = lambda moment: seen.update(codes=moment.model.state_dict())  # type: ignore[method-assign]
    loop.run()
    held = {n: dense_weight(p).detach().clone() for n, p in loop.model.named_parameters()}
    assert any(name.endswith("codes") for name in seen["codes"])
    loop = whole_loop("q-galore", SMALL, steps=3, lr=1e-2)
    loop.run()
    for name, parameter in loop.model.named_parameters():
        assert torch.equal(parameter, held[name]), name
    model: Any = loop.model
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_run_in_bfloat16_keeps_steps_that_bfloat16_would_lose() -> None:
    """The sum of weight and step is taken in float32: with bfloat16 between, most codes would stay."""
    W, G = draw(64, 64).bfloat16(), draw(64, 64, seed=1).bfloat16()
    layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    layer.weight.data.copy_(W)
    weight: Any = layer.weight
    hold(layer, [weight])
    spec: Any = build("optimizer", "q-galore", rank=32, scale=1.0)
    group = {"params": [layer.weight], "names": ["w"], "projected": True, "integer": True}
    optimizer = spec.method.cls(spec).build([group], 1e-3)
    before = weight.held.codes.clone()
    exact = dequantise_groups(weight.held)
    layer.weight.grad = G
    optimizer.step()
    after = dequantise_groups(weight.held)
    along = -float(((after - exact) * G.float().sign()).mean())
    assert along == pytest.approx(1e-3 * 0.6, rel=0.5), "half of G's directions, at the rate of 1e-3"
    assert (weight.held.codes != before).float().mean() > 0.01


# ---- memory --------------------------------------------------------------------------------------------------------

TABLE = [
    ("llama-60m", 128, 0.18, 0.24, 60e6),
    ("llama-130m", 256, 0.39, 0.52, 130e6),
    ("llama-350m", 256, 0.88, 1.22, 350e6),
    ("llama-1b", 512, 3.08, 4.38, 1331.2e6),
]


def counted(name: str, rank: int) -> tuple[int, int]:
    """Bytes of weights and state, and by codes alone: no scales of groups, blocks or projectors, nothing that paces."""
    model = open_source(name, "bfloat16").model.requires_grad_(True)
    settings = {"optimizer": "q-galore", "rank": rank}
    total, bare = weight_bytes(settings, model) + optimizer_bytes(settings, model), 0
    for key, p in model.named_parameters():
        n = p.numel()
        if "proj" in key:
            short, long = sorted(p.shape)
            bare += n + short * rank // 2 + 2 * long * rank
        else:
            bare += 2 * n + 2 * n
    return total, bare


@pytest.mark.parametrize(("name", "rank", "told"), [("llama-7b", 1024, 11.23e9), ("llama-1b", 512, 2.425e9)])
def test_weights_and_state_of_the_papers_models(name: str, rank: int, told: float) -> None:
    """By codes alone what the rule gives, and 7B within 16 GB with everything; scales are less than 3 per cent."""
    total, bare = counted(name, rank)
    assert bare == pytest.approx(told, rel=1e-3)
    assert bare < total < 1.03 * bare
    assert total < 16e9


def test_the_exact_count_of_7b() -> None:
    assert counted("llama-7b", 1024)[1] == 6_476_005_376 + 2 * 262_410_240 * 2 + 939_524_096 // 2 + 3_238_002_688


@pytest.mark.parametrize(("name", "rank", "printed", "galore", "nominal"), TABLE)
def test_the_printed_estimates_credit_the_integer_weights_alone(
    name: str, rank: int, printed: float, galore: float, nominal: float
) -> None:
    """GaLore's printed total minus half of the weights' memory; our count, moments and projectors in, is below it."""
    unit = 1.024e9
    assert galore - nominal / unit == pytest.approx(printed, abs=0.012)
    assert counted(name, rank)[0] / unit < printed


def test_the_bytes_are_those_that_are_held() -> None:
    model = tiny_llama().requires_grad_(True)
    settings = {"optimizer": "q-galore", **SMALL}
    told = weight_bytes(settings, model)
    rw.make_optimizer(model, settings)
    held = sum(t.numel() * t.element_size() for t in trained_tensors(model).values())
    assert told == held
    assert held == sum(
        group_bytes(p.numel(), 8, 256) if "proj" in n else 4 * p.numel() for n, p in model.named_parameters()
    )


def test_bad_settings_are_refused() -> None:
    for settings, told in (({"weight_bits": 3}, "weight_bits"), ({"growth": 0.5}, "growth"), ({"window": 0}, "window")):
        with pytest.raises(ConfigError, match=told):
            build("optimizer", "q-galore", **settings)
