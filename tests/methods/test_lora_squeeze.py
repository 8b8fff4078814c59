"""LoRA-Squeeze: the best approximation of a smaller rank, without the dense product, after training and during it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from facts import (
    KINDS,
    adapted,
    best_of_rank,
    change_of,
    close,
    delta_of,
    layer_and_input,
    linear,
    quick,
    rank_of,
    shake,
    singular,
)
from hypothesis import given
from hypothesis import strategies as st
from runs import falls, same, tiny_run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rankworks as rw
from rankworks.core.errors import ConfigError, MergeError
from rankworks.core.ranks.squeeze import Squeezer, rank_for
from rankworks.core.ranks.surgery import keep_ranks
from rankworks.core.store import adapter_state
from rankworks.core.summary import trained
from rankworks.linalg import svd_of_product
from rankworks.linalg.squeeze import norm_of_product, randomised_svd_of_product, singular_values_of_product
from tiny import tiny_llama

OUT, IN, R = 9, 11, 6


def one(delta: str = "lora", rank: int = R, alpha: float = 3.0, **settings: Any) -> Any:
    """A linear layer (11 -> 9) with a trained adapter on it."""
    model = adapted(linear(IN, OUT), delta, rank=rank, alpha=alpha, **settings)
    shake(model)
    return model


@pytest.mark.parametrize("k", range(1, R + 1))
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_the_error_is_that_of_the_singular_values_left_out(k: int, scaling: str):
    model = one(scaling=scaling)
    D, scale = change_of(model), delta_of(model).scale
    (site,) = rw.squeeze(model, rank=k).sites
    close(change_of(model), best_of_rank(D, k), 1e-13)
    lost = singular(D)[k:].square().sum()
    torch.testing.assert_close((D - change_of(model)).square().sum(), lost, rtol=1e-12, atol=1e-24)
    assert site.error == pytest.approx(float((lost / D.square().sum()).sqrt()), abs=1e-12)
    delta = delta_of(model)
    assert (site.before, site.after, delta.rank, delta.spec.rank) == (R, k, k, k)
    assert delta.scale == pytest.approx(scale, rel=1e-15)
    close(delta.A @ delta.A.t(), delta.B.t() @ delta.B, 1e-12)  # balanced


def test_a_rank_that_holds_the_change_reproduces_it():
    model = one()
    D, delta = change_of(model), delta_of(model)
    with torch.no_grad():
        delta.B[:, 2:] = 0  # D of rank 2
    D = change_of(model)
    for k in (5, 3, 2):
        rw.squeeze(model, rank=k)
        close(change_of(model), D, 1e-13)


def test_the_result_does_not_depend_on_alpha():
    found = []
    for alpha in (0.5, 3.0, 40.0):
        torch.manual_seed(0)
        model = one(alpha=alpha)
        with torch.no_grad():
            delta_of(model).B.mul_(3.0 / alpha)
        rw.squeeze(model, rank=2)
        found.append(change_of(model))
    close(found[0], found[1])
    close(found[2], found[1])


@given(k1=st.integers(2, R), data=st.data())
@quick
def test_squeezing_twice_is_squeezing_once(k1: int, data: Any):
    k2 = data.draw(st.integers(1, k1))
    torch.manual_seed(k1)
    found = []
    for ranks in ((k1, k2), (k2,)):
        torch.manual_seed(1)
        model = one()
        for k in ranks:
            rw.squeeze(model, rank=k)
        found.append(change_of(model))
    close(found[0], found[1], 1e-12)


@pytest.mark.parametrize(("rank", "oversample"), [(2, 4), (2, 10), (5, 1)])
def test_randomised_is_exact_with_enough_test_vectors(rank: int, oversample: int):
    B, A = torch.randn(OUT, R), torch.randn(R, IN)
    exact, random = svd_of_product(B, A, rank), randomised_svd_of_product(B, A, rank, 2, oversample)
    for mine, wanted in zip(random, exact, strict=True):
        close(mine, wanted, 1e-10)
    model = one()
    D = change_of(model)
    (site,) = rw.squeeze(model, rank=rank, svd="randomised", oversample=oversample).sites
    close(change_of(model), best_of_rank(D, rank), 1e-10)
    wanted = float(singular(D)[rank:].norm() / D.norm())
    assert site.error == pytest.approx(wanted, abs=1e-7)


def test_randomised_is_near_with_few_and_repeats():
    B, A = torch.randn(60, 40) * torch.logspace(0, -3, 40), torch.randn(40, 70)
    u, s, _ = randomised_svd_of_product(B, A, 4, 2, 4)
    wanted = svd_of_product(B, A, 4)[1]
    torch.testing.assert_close(s, wanted, rtol=1e-4, atol=0)
    close(u.t() @ u, torch.eye(4))
    assert torch.equal(randomised_svd_of_product(B, A, 4, 2, 4)[0], u)


def test_values_and_norm_of_a_product():
    for shape in ((OUT, R, IN), (3, 5, 4), (4, 7, 3)):
        B, A = torch.randn(shape[0], shape[1]), torch.randn(shape[1], shape[2])
        found = singular_values_of_product(B, A)
        close(found, singular(B @ A)[: len(found)])
        assert norm_of_product(B, A) == pytest.approx(float((B @ A).norm()))


class Largest(TorchDispatchMode):
    """Notes the most numbers that any operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


@pytest.mark.parametrize("svd", ["exact", "randomised"])
@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("request_", [{"rank": 2}, {"energy": 0.5}])
def test_nothing_larger_than_the_factors_is_made(svd: Any, init: str, request_: dict):
    model = adapted(nn.Linear(300, 200), "lora", rank=4, init=init)
    shake(model)
    width = 8 if init == "pissa" else 4
    with Largest() as seen:
        rw.squeeze(model, svd=svd, **request_)
    assert 0 < seen.most <= (300 + 200) * width < 300 * 200 / 10


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_out_of_the_base_becomes_a_plain_pair(init: str, tmp_path: Path):
    model = one(rank=3, init=init)
    D = change_of(model)
    assert rank_of(D) == 6
    for k in (6, 4, 2):
        best = best_of_rank(D, k)
        rw.squeeze(model, rank=k)
        close(change_of(model), best, 1e-11)
    delta = delta_of(model)
    assert (delta.A0, delta.B0, delta.rank) == (None, None, 2)
    rw.save(model, tmp_path / "a")
    torch.manual_seed(0)
    fresh = adapted(linear(IN, OUT), "lora", rank=1, name="other")
    rw.detach(fresh)
    fresh.layer.load_state_dict({k: v for k, v in model.layer.state_dict().items() if "adapters" not in k})
    close(change_of(rw.load(fresh, tmp_path / "a")), change_of(model), 1e-15)


def test_the_inner_change_of_dora_and_gates_are_squeezed():
    model = one("dora")
    inner, m = delta_of(model).inner, delta_of(model).m.clone()
    D = inner.dense(model.layer.weight).detach()
    rw.squeeze(model, rank=2)
    close(inner.dense(model.layer.weight), best_of_rank(D, 2), 1e-12)
    assert torch.equal(delta_of(model).m, m)
    gated = adapted(linear(IN, OUT), {"delta": "gated", "inner": rw.LoRA(rank=4)})
    shake(gated)
    D = change_of(gated)
    rw.squeeze(gated, rank=2)
    close(change_of(gated), best_of_rank(D, 2), 1e-12)
    assert torch.equal(delta_of(gated).gate, torch.ones(2))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind: str):
    layer, x = layer_and_input(kind)
    model = adapted(layer, "lora", rank=4)
    shake(model)
    D = change_of(model)
    rw.squeeze(model, rank=2)
    close(change_of(model), best_of_rank(D, 2), 1e-12)
    with rw.disabled(model):
        frozen = model(x)
    merged = rw.merge(model)(x)
    rw.unmerge(model)
    close(model(x) - frozen, merged - frozen, 1e-10)


def test_one_change_that_two_weights_share_is_squeezed_once():
    model = rw.adapt(tiny_llama(tie=True), "lora", rank=4, targets=["embed_tokens", "lm_head"], tied="shared")
    shake(model)
    wanted = {k: best_of_rank(D, 2) for k, D in rw.delta_weights(model).items()}
    report = rw.squeeze(model, rank=2)
    assert len(report.sites) == 1
    assert report.before == 2 * report.after
    for key, D in rw.delta_weights(model).items():
        close(D, wanted[key], 1e-5)


def test_a_truncated_dylora_is_squeezed_as_it_acts():
    model = one(ranks="dylora")
    rw.set_rank(model, 4)
    D = change_of(model)
    rw.squeeze(model, rank=2)
    close(change_of(model), best_of_rank(D, 2), 1e-12)


def test_surplus_ranks_change_nothing_and_can_learn():
    model = one()
    with torch.no_grad():
        delta_of(model).B[:, 1:] = 0
    D, x = change_of(model), torch.randn(5, IN)
    rw.squeeze(model, rank=4)
    delta = delta_of(model)
    close(change_of(model), D, 1e-13)
    assert not delta.B[:, 1:].any()
    assert delta.A[1:].abs().min() > 0
    assert delta.A[1:].abs().max() <= IN**-0.5
    model(x).square().sum().backward()
    assert delta.B.grad.abs().amin(0).min() > 0
    rw.squeeze(untrained := adapted(linear(IN, OUT), "lora", rank=4), rank=2)
    assert not change_of(untrained).any()
    assert delta_of(untrained).A.abs().min() > 0


class Two(nn.Module):
    """Two layers of other spectra."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, OUT), nn.Linear(OUT, IN)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def two() -> Any:
    model = rw.adapt(Two(), "lora", rank=4, alpha=4, targets=["first", "second"])
    shake(model)
    for name, values in (("first", [4.0, 0.1, 0.1, 0.1]), ("second", [2.0, 2.0, 2.0, 2.0])):
        delta = delta_of(model, site=name)
        u, _, v = (t.detach() for t in svd_of_product(delta.B, delta.A))
        with torch.no_grad():
            delta.B.copy_(u * torch.tensor(values))
            delta.A.copy_(v)
    return model


def test_ranks_by_energy():
    ranks = lambda report: {s.site: s.after for s in report.sites}  # noqa: E731
    assert ranks(rw.squeeze(two(), energy=0.9)) == {"first": 1, "second": 4}
    assert ranks(rw.squeeze(two(), energy=0.9, rank=3)) == {"first": 1, "second": 3}
    # mean of V over the sites: k=1 (1 + .25)/2, k=2 (1 + .5)/2, k=3 (1 + .75)/2
    assert ranks(rw.squeeze(two(), energy=0.7, common=True)) == {"first": 2, "second": 2}
    assert ranks(rw.squeeze(two(), energy=1.0)) == {"first": 4, "second": 4}
    report = rw.squeeze(two(), energy=0.7)
    for site in report.sites:
        assert 1 - site.error**2 >= 0.7
    assert report.after == (1 + 3) * (IN + OUT)
    assert report.before == 8 * (IN + OUT)
    assert "first" in str(report)
    assert rank_for(torch.zeros(3), 0.9) == 1


def test_what_is_wrong_is_refused():
    model = one()
    before = {k: t.clone() for k, t in adapter_state(model).items()}
    for wrong in (
        {},
        {"rank": 2, "svd": "random"},
        {"rank": 0},
        {"energy": 0.0},
        {"energy": 1.5},
        {"rank": 2, "common": True},
    ):
        with pytest.raises(ConfigError):
            rw.squeeze(model, **wrong)
    rw.merge(model)
    with pytest.raises(MergeError, match="unmerge"):
        rw.squeeze(model, rank=2)
    rw.unmerge(model)
    same(adapter_state(model), before)
    with pytest.raises(ConfigError, match=r"vera.*kind='lora'"):
        rw.squeeze(adapted(linear(IN, OUT), "vera", rank=2), rank=1)


def test_a_site_without_ranks_stays_so():
    model = two()
    keep_ranks(delta_of(model, site="second"), torch.arange(0))
    for request in ({"energy": 0.9}, {"energy": 0.9, "common": True}, {"rank": 3}):
        report = rw.squeeze(model, **request)  # type: ignore[arg-type]
        assert [(s.after, s.error) for s in report.sites if s.site == "second"] == [(0, 0.0)]


def test_squeeze_and_train_on():
    loop = tiny_run(rank=8)
    loop.run()
    report = rw.squeeze(loop.model, rank=2)
    assert {s.after for s in report.sites} == {2}
    rebuilt = type(loop)(loop.model, loop.examples, loop.train, loop.optim, progress=False)
    assert falls(rebuilt.run().losses)
    assert {rw.get_delta(loop.model, s.site).rank for s in report.sites} == {2}


def test_an_optimizer_goes_on_with_what_was_squeezed():
    model = one()
    acting = torch.optim.AdamW(trained(model), lr=0.01)
    x = torch.randn(8, IN)
    for _ in range(3):
        acting.zero_grad()
        model(x).square().sum().backward()
        acting.step()
    rw.squeeze(model, rank=2, optimizer=acting)
    delta = delta_of(model)
    assert {id(p) for g in acting.param_groups for p in g["params"]} == {id(delta.A), id(delta.B)}
    assert not acting.state
    before = change_of(model)
    acting.zero_grad()
    model(x).square().sum().backward()
    acting.step()
    assert not torch.equal(change_of(model), before)


def test_rotated_moments_are_the_gradients_in_the_new_coordinates():
    """The first moments of a gradient G of the weight, s G A^T and s B^T G, become s G A'^T and s B'^T G."""
    model, G = one(), torch.randn(OUT, IN)
    delta = delta_of(model)
    acting = torch.optim.Adam([delta.A, delta.B], lr=0.0)
    model(torch.randn(8, IN)).square().sum().backward()
    acting.step()
    with torch.no_grad():
        acting.state[delta.A]["exp_avg"].copy_(delta.scale * delta.B.t() @ G)
        acting.state[delta.B]["exp_avg"].copy_(delta.scale * G @ delta.A.t())
    Squeezer(moments="rotate").squeeze(delta, 3, "layer", acting)
    close(acting.state[delta.A]["exp_avg"], delta.scale * delta.B.detach().t() @ G, 1e-9)
    close(acting.state[delta.B]["exp_avg"], delta.scale * G @ delta.A.detach().t(), 1e-9)
    for part in (delta.A, delta.B):
        state = acting.state[part]
        assert state["exp_avg_sq"].shape == part.shape
        assert state["exp_avg_sq"].min() >= 0
        assert state["step"] == 1
