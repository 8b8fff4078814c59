"""CorDA: the weight is split along its inputs' second moment C; the largest or smallest components are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from facts import (
    One,
    adapted,
    backward,
    best_of_rank,
    change_of,
    close,
    conv1d_hf,
    delta_of,
    linear,
    negligible,
    rank_of,
    shake,
    singular,
    weight_of,
)
from learning import losses
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError, TargetError
from rankworks.core.spec import AdaptSpec
from rankworks.inits.corda import damped
from rankworks.train.batching.batches import Example
from rankworks.train.config import OptimConfig, TrainConfig
from rankworks.train.loop import Loop
from tiny import tiny_llama, token_batch

KNOWLEDGE = {"init": "corda", "mode": "knowledge"}


def moment(size: int, tokens: int | None = None) -> Tensor:
    """The second moment of inputs of unequal size."""
    x = torch.randn(tokens or 4 * size, size) * torch.linspace(3, 0.3, size)
    return x.t() @ x / len(x)


def corda(layer: nn.Module | None = None, C: Tensor | None = None, init: Any = "corda", **settings: Any) -> One:
    layer = linear(9, 8) if layer is None else layer
    evidence = {"layer": {"input_second_moment": moment(9) if C is None else C}}
    return adapted(layer, **{"rank": 3, "init": init, "evidence": evidence, **settings})


def start(model: nn.Module) -> Tensor:
    """s B A at the start."""
    delta = delta_of(model)
    return delta.scale * (delta.B @ delta.A).detach()


@pytest.mark.parametrize("alpha", [0.5, 3.0, 24.0])
def test_s_b_a_c_is_the_best_approximation_of_w_c_for_any_alpha(alpha: float) -> None:
    C = moment(9)
    model = corda(C=C, alpha=alpha)
    whole = damped(C, 0.01)[0]
    close(start(model) @ whole, best_of_rank(weight_of(model) @ whole, 3))


def test_the_damped_matrix_is_c_plus_a_hundredth_of_its_mean_diagonal() -> None:
    C = moment(9)
    whole, inverse = damped(C, 0.01)
    close(whole, C + 0.01 * C.diagonal().mean() * torch.eye(9))
    close(whole @ inverse, torch.eye(9))


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_all_components_together_are_the_weight(mode: str) -> None:
    model = corda(init={"init": "corda", "mode": mode}, rank=8)
    close(start(model), weight_of(model))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_two_modes_split_the_weight(rank: int) -> None:
    layer, C = linear(9, 8), moment(9)
    large = corda(layer, C, rank=rank)
    most = start(large)
    rw.detach(large)
    small = corda(layer, C, KNOWLEDGE, rank=8 - rank)
    close(most + start(small), weight_of(small))


def test_knowledge_takes_the_smallest_components() -> None:
    C = moment(9)
    model, whole = corda(C=C, init=KNOWLEDGE), damped(C, 0.01)[0]
    close(singular(start(model) @ whole)[:3], singular(weight_of(model) @ whole)[-3:])
    left = (weight_of(model) - start(model)) @ whole
    close(left, best_of_rank(weight_of(model) @ whole, 5))


def test_no_other_split_of_this_rank_leaves_less_of_the_output_behind() -> None:
    """The error in W C, against PiSSA's, which does not know the data."""
    C, layer = moment(9), linear(9, 8)
    model = corda(layer, C)
    whole = damped(C, 0.01)[0]
    mine = ((weight_of(model) - start(model)) @ whole).norm()
    rw.detach(model)
    other = adapted(layer, "lora", rank=3, init="pissa")
    assert ((weight_of(other) - start(other)) @ whole).norm() > mine


def test_the_factors_are_balanced() -> None:
    C = moment(9)
    model, whole = corda(C=C, alpha=6), damped(C, 0.01)[0]
    delta, s = delta_of(model), singular(weight_of(model) @ whole)[:3]
    close(delta.B.t() @ delta.B, torch.diag(s) / 2)
    close((delta.A @ whole) @ (delta.A @ whole).t(), torch.diag(s) / 2)


def test_a_multiple_of_c_gives_the_same_start() -> None:
    layer, C = linear(9, 8), moment(9)
    one = corda(layer, C)
    first = start(one)
    rw.detach(one)
    close(start(corda(layer, 100 * C)), first)


def test_with_the_identity_it_is_pissa() -> None:
    layer = linear(9, 8)
    one = corda(layer, torch.eye(9))
    first = start(one)
    close(first, best_of_rank(weight_of(one), 3))


def test_a_c_of_few_tokens_is_damped_until_it_can_be_inverted() -> None:
    """Rank 2 of 9; damping 1e-14 of the mean is lost in rounding, 0.01 is not."""
    C = moment(9, tokens=2)
    whole, inverse = damped(C, 1e-30)
    added = (whole - C).diagonal()
    assert (whole @ inverse - torch.eye(9)).norm() < 0.05
    assert added.min() > 0
    rough = damped(C.float(), 1e-30)[0] - C.float()
    assert rough.diagonal().mean() > 1e6 * added.mean()  # float32 needs more
    model = corda(C=C)
    assert torch.isfinite(delta_of(model).A).all()


def test_inputs_of_nothing_but_zeros_are_refused() -> None:
    for bad in (torch.zeros(9, 9), torch.full((9, 9), torch.nan)):
        with pytest.raises(ConfigError, match="exclude"):
            corda(C=bad)


@pytest.mark.parametrize("init", ["corda", KNOWLEDGE, {"init": "corda", "iterations": 2}])
def test_the_start_leaves_the_output_bit_identical(init: Any) -> None:
    layer, x = linear(9, 8), torch.randn(5, 9)
    plain = layer(x)
    model = corda(layer, init=init)
    assert torch.equal(model(x), plain)
    assert torch.equal(change_of(model), torch.zeros(8, 9))


def test_a_layer_stored_turned_is_read_as_out_by_in() -> None:
    C = moment(8)
    model, whole = corda(conv1d_hf(), C), damped(C, 0.01)[0]
    close(start(model) @ whole, best_of_rank(weight_of(model) @ whole, 3))


def test_the_randomised_components_converge_to_the_exact_ones() -> None:
    x = torch.randn(40, 9) * torch.tensor([2.0] * 3 + [1.0] * 6)
    layer, C = linear(9, 8), x.t() @ x / 40
    exact = corda(layer, C)
    wanted = start(exact)
    rw.detach(exact)
    errors = []
    for iterations in (1, 8, 64):
        model = corda(layer, C, {"init": "corda", "iterations": iterations})
        errors.append(float((start(model) - wanted).norm()))
        rw.detach(model)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


def test_both_factors_have_a_gradient_at_the_first_step() -> None:
    model = corda(alpha=6)
    delta = delta_of(model)
    _, G = backward(model, torch.randn(4, 9))
    close(delta.A.grad, 2 * delta.B.t() @ G)
    close(delta.B.grad, 2 * G @ delta.A.t())


def test_a_trained_adapter_is_a_plain_lora_of_rank_two_r_against_the_base(tmp_path: Path) -> None:
    layer, x = linear(9, 8), torch.randn(4, 9)
    model = corda(layer)
    before = start(model)
    delta = shake(model)
    close(change_of(model), delta.scale * delta.B @ delta.A - before)
    assert rank_of(change_of(model)) == 6
    y = model(x).detach()
    rw.merge(model)
    close(model(x), y)
    rw.unmerge(model)
    rw.save(model, tmp_path / "ours")
    rw.export(model, tmp_path / "peft", kind="peft")
    rw.detach(model)
    assert torch.equal(rw.load(model, tmp_path / "ours")(x), y)
    rw.detach(model)
    close(rw.load(model, tmp_path / "peft")(x), y, 1e-6)


def test_an_untrained_adapter_exports_a_change_of_zero() -> None:
    B, A = delta_of(corda()).factors()
    negligible(B @ A, 0)


def test_dora_goes_around_it() -> None:
    layer, x = linear(9, 8), torch.randn(4, 9)
    plain = layer(x)
    model = corda(layer, delta="dora")
    assert delta_of(model).inner.A0 is not None
    close(model(x), plain)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": 9}, "at most min"),
        ({"init": {**KNOWLEDGE, "iterations": 2}}, "set iterations to 0"),
        ({"delta": "lora-xs"}, "fills 2 factors"),
        ({"delta": "shira", "rank": 1}, "fills a factor pair"),
        ({"evidence": {}}, r"input_second_moment .*rankworks\.calibrate"),
    ],
)
def test_what_it_cannot_start_is_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(TargetError, match=match):
        corda(**settings)


@pytest.mark.parametrize("setting", [{"mode": "both"}, {"damping": 0.0}, {"normalise": "batch"}])
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        AdaptSpec.from_flat({"delta": "lora", "init": {"init": "corda", **setting}})


def measured(init: Any) -> nn.Module:
    torch.set_default_dtype(torch.float32)
    model = tiny_llama()
    data = [{"input_ids": (ids := token_batch(batch=4, seed=s)), "labels": ids} for s in range(2)]
    spec = AdaptSpec.from_flat({"delta": "lora", "rank": 2, "init": init, "seed": 1})
    return rw.adapt(model, spec, evidence=rw.calibrate(model, data, spec))


@pytest.mark.parametrize("init", ["corda", KNOWLEDGE, {"init": "corda", "normalise": "sample"}])
def test_it_learns(init: Any) -> None:
    seen = losses(measured(init).train(), 12)
    assert seen[-1] < 0.9 * seen[0]


def test_a_loop_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    rows = [tuple(token_batch(batch=1, length=12, seed=seed % 4)[0].tolist()) for seed in range(16)]

    def loop(steps: int, folder: Path | None) -> Loop:
        train = TrainConfig(steps=steps, batch_size=8, save_every=2)
        optim = OptimConfig(lr=1e-2, schedule="constant")
        return Loop(measured("corda"), [Example(r, r) for r in rows], train, optim, folder=folder, progress=False)

    whole = loop(6, None)
    history = whole.run()
    assert history.losses[-1] < history.losses[0]
    loop(4, tmp_path).run()
    resumed = loop(6, tmp_path)
    resumed.run()
    one, two = (dict(item.model.named_parameters()) for item in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
