"""Rank surgery: what is kept is kept to the bit, moments too, and an adapter of other ranks is an adapter like any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ExportError, MergeError, TrainingError
from rankworks.core.forms.lowrank import alpha_of, scale_of
from rankworks.core.ranks.surgery import (
    compact,
    gated_of,
    grow_ranks,
    keep_ranks,
    pair_of,
    rebind,
    replace_ranks,
    site_settings,
)
from rankworks.core.state import state_of
from rankworks.train.optim import make_optimizer
from tiny import tiny_convnet, tiny_gpt2, tiny_llama, tiny_mlp, token_batch

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.25},
    "adam": {"weight_decay": 0.25, "amsgrad": True},
    "sgd": {"momentum": 0.5, "weight_decay": 0.25},
}
KEPT = [2, 0, 5]  # of six ranks; a kept rank may stand elsewhere afterwards


class Whole(nn.Module):
    """One layer of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 7).double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randint(-3, 4, p.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def whole(delta: str, **settings: Any) -> nn.Module:
    """An adapted layer all of whose numbers are small integers, so that every sum is exact whatever its order."""
    torch.manual_seed(0)
    model = rw.adapt(Whole(), delta, rank=6, alpha=6, targets="layer", **settings)
    with torch.no_grad():
        for p in state_of(model).adapter("default").parameters():
            p.copy_(torch.randint(1, 4, p.shape))
    return model


def inner(delta: str) -> dict[str, Any]:
    """Gates inside DoRA."""
    return {"inner": "gated"} if delta == "dora" else {}


def delta_of(model: nn.Module) -> Any:
    return rw.get_delta(model, "layer")


@torch.no_grad()
def silence(delta: Any, index: list[int]) -> None:
    """Let ranks be zero: their gate, or their row of A."""
    gated = gated_of(delta)
    (pair_of(delta).A if gated is None else gated.gate)[index] = 0


def step_on(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> Tensor:
    optimizer.zero_grad()
    y = model(x)
    ((y - target) * target).sum().backward()  # a linear loss: gradients of whole numbers
    optimizer.step()
    return y.detach()


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(-3, 4, (4, 9)).double(), torch.randint(-3, 4, (4, 7)).double()


def parts(delta: Any, index: list[int] | slice) -> list[Tensor]:
    pair, gated = pair_of(delta), gated_of(delta)
    found = [pair.A[index], pair.B[:, index]]
    return found + ([] if gated is None else [gated.gate[index]])


@pytest.mark.parametrize("delta", ["lora", "gated"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_removing_inactive_ranks_leaves_outputs_and_the_next_update_of_the_others(name: str, delta: str) -> None:
    """To the bit, in numbers whose sums are exact; the moments that are left are the old ones."""
    x, target = data()
    states = []
    for cut in (False, True):
        model = whole(delta)
        optimizer = make_optimizer(model, name, lr=0.5, **OPTIMIZERS[name])
        step_on(model, optimizer, x, target)
        with torch.no_grad():  # a state of whole numbers again, with moments
            for p in model.parameters():
                p.round_()
        silence(delta_of(model), [1, 3, 4])
        before = model(x).detach()
        if cut:
            keep_ranks(delta_of(model), torch.tensor(KEPT), optimizer)
            assert torch.equal(model(x), before)
            assert len(pair_of(delta_of(model)).A) == pair_of(delta_of(model)).rank == 3
        step_on(model, optimizer, x, target)
        index = slice(None) if cut else KEPT
        moments = [
            value if cut or value.dim() == 0 else value.index_select(axis, torch.tensor(KEPT))
            for p, axis in ((pair_of(delta_of(model)).A, 0), (pair_of(delta_of(model)).B, 1))
            for value in optimizer.state[p].values()
            if isinstance(value, Tensor)
        ]
        assert moments
        states.append([*parts(delta_of(model), index), *moments])
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("foreach", [False, True])
def test_the_same_gradients_give_the_same_bits(name: str, foreach: bool) -> None:
    """In ordinary float32 numbers the elementwise update of what is left does not depend on what was removed."""
    results = []
    for cut in (False, True):
        torch.manual_seed(0)
        model = rw.adapt(tiny_mlp(), "gated", rank=6, targets="all-linear")
        optimizer = make_optimizer(model, name, lr=0.1, foreach=foreach, **OPTIMIZERS[name])
        delta = rw.get_delta(model, "first")
        gradients = [torch.randn_like(p) for p in model.parameters() if p.requires_grad]
        trained = [p for p in model.parameters() if p.requires_grad]
        for p, g in zip(trained, gradients, strict=True):
            p.grad = g
        optimizer.step()
        if cut:
            keep_ranks(delta, torch.tensor(KEPT), optimizer)  # the gradients are cut too
        optimizer.step()
        results.append([p.detach().clone() for p in parts(delta, slice(None) if cut else KEPT)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("delta", ["lora", "dora"])
def test_in_rounded_numbers_the_output_moves_by_rounding_alone(delta: str) -> None:
    model = rw.adapt(tiny_llama(), delta, rank=6, alpha=11, seed=3, **inner(delta))
    ids = token_batch()
    for d in {id(d): d for d in state_of(model).adapter("default").deltas.values()}.values():
        with torch.no_grad():
            pair_of(d).B.normal_(std=0.1)
        silence(d, [1, 3, 4])
    before = model(ids).logits.detach()
    for d in state_of(model).adapter("default").deltas.values():
        keep_ranks(d, torch.tensor(KEPT))
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("delta", ["lora", "gated", "dora"])
def test_new_ranks_of_zero_change_nothing_and_have_moments_of_zero(delta: str) -> None:
    x, target = data()
    model = whole(delta)
    optimizer = make_optimizer(model, "adamw", lr=0.5)
    step_on(model, optimizer, x, target)
    before = model(x).detach()
    more = {"A": torch.ones(2, 9), "B": torch.zeros(7, 2), "gate": torch.ones(2)}
    old = optimizer.state[pair_of(delta_of(model)).A]["exp_avg"].clone()
    scale = pair_of(delta_of(model)).scale
    grow_ranks(delta_of(model), more, optimizer)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    pair = pair_of(delta_of(model))
    assert (pair.rank, pair.scale, len(pair.A), pair.B.shape[1]) == (8, scale, 8, 8)
    moment = optimizer.state[pair.A]["exp_avg"]
    assert torch.equal(moment[:6], old)
    assert not moment[6:].any()
    assert delta_of(model).current_spec() == site_spec(model)
    step_on(model, optimizer, x, target)
    assert pair.B[:, 6:].any()


def site_spec(model: nn.Module) -> Any:
    spec = delta_of(model).spec
    return spec if not hasattr(spec, "inner") else spec.replace(inner=delta_of(model).inner.current_spec())


def test_replaced_factors_keep_their_place_and_forget_their_moments() -> None:
    x, target = data()
    model = whole("gated")
    optimizer = make_optimizer(model, "adamw", lr=0.5)
    step_on(model, optimizer, x, target)
    names = [n for group in optimizer.param_groups for n in group["names"]]
    new = {"A": torch.randn(2, 9), "B": torch.randn(7, 2), "gate": torch.ones(2)}
    replace_ranks(delta_of(model), new, optimizer)
    for name, tensor in zip(("A", "B"), parts(delta_of(model), slice(None))[:2], strict=True):
        assert torch.equal(tensor, new[name].double())
    assert pair_of(delta_of(model)).A not in optimizer.state
    held = [p for group in optimizer.param_groups for p in group["params"]]
    parameters = dict(model.named_parameters())
    assert all(parameters[n] is p for n, p in zip(names, held, strict=True))
    rebind(optimizer, model)
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in held]


def test_an_optimizer_that_keeps_other_shapes_begins_anew_with_a_cut_tensor() -> None:
    x, target = data()
    model = whole("lora")
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step_on(model, optimizer, x, target)
    keep_ranks(delta_of(model), torch.tensor(KEPT), optimizer)
    assert pair_of(delta_of(model)).A not in optimizer.state
    step_on(model, optimizer, x, target)


def test_the_scale_survives_every_rank_or_moves_by_one_unit_in_the_last_place() -> None:
    for alpha in (1.0, 8.0, 11.0, 16.0, 32.0):
        for rank in range(1, 20):
            for scaling in ("standard", "rslora"):
                scale = scale_of(alpha, rank, scaling)
                for other in range(20):
                    again = scale_of(alpha_of(scale, other, scaling), other, scaling)
                    assert abs(again - scale) <= 2**-52 * scale


def test_a_delta_without_a_pair_is_refused() -> None:
    model = rw.adapt(tiny_mlp(), "vera", rank=4)
    with pytest.raises(TrainingError, match="vera has no trained pair"):
        keep_ranks(rw.get_delta(model, "first"), torch.tensor([0]))


# ---- rank 0, and another rank at every site --------------------------------------------------------------------------


def cut_to(model: nn.Module, ranks: list[int]) -> dict[str, int]:
    """Cut the sites to these ranks in turn; returns what each has."""
    deltas = state_of(model).adapter("default").deltas
    wanted = {key: ranks[i % len(ranks)] for i, key in enumerate(deltas)}
    for key, delta in deltas.items():
        keep_ranks(delta, torch.arange(wanted[key]))
    return wanted


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    for p in state_of(model).adapter("default").parameters():
        p += 0.1 * torch.randn_like(p)
    return model


DELTAS: dict[str, dict[str, Any]] = {
    "lora": {"delta": "lora"},
    "gated": {"delta": "gated"},
    "dora": {"delta": "dora"},
    "gated-in-dora": {"delta": "dora", "inner": "gated"},
    "pissa": {"delta": "lora", "init": "pissa"},
    "gated-pissa": {"delta": "gated", "init": "pissa"},
}


def ragged(case: str, ranks: tuple[int, ...] = (0, 1, 3)) -> tuple[nn.Module, dict[str, int]]:
    model = shaken(rw.adapt(tiny_llama(), rank=3, alpha=5, targets="all-linear", **DELTAS[case]))
    return model, cut_to(model, list(ranks))


@pytest.mark.parametrize("case", DELTAS)
def test_other_ranks_per_site_merge_save_load_and_summarise(case: str, tmp_path: Path) -> None:
    model, ranks = ragged(case)
    ids = token_batch()
    y = model(ids).logits.detach()
    loaded = rw.load(tiny_llama(), rw.save(model, tmp_path / "adapter"))
    assert torch.equal(loaded(ids).logits, y)
    assert site_settings(loaded) == site_settings(model)
    assert {r.site: pair_of(rw.get_delta(model, r.site)).rank for r in rw.summary(model).rows} == ranks
    assert rw.trainable_parameters(model) == sum(r.parameters for r in rw.summary(model).rows)
    rw.merge(model)
    torch.testing.assert_close(model(ids).logits, y, rtol=1e-4, atol=1e-4)
    rw.unmerge(model)
    assert torch.equal(model(ids).logits, y)


@pytest.mark.parametrize("case", DELTAS)
def test_other_ranks_per_site_train_and_export(case: str, tmp_path: Path) -> None:
    model, _ = ragged(case)
    ids = token_batch()
    optimizer = make_optimizer(model, "adamw", lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grads_with_norm_(
            [p for g in optimizer.param_groups for p in g["params"]],
            1.0,
            nn.utils.get_total_norm([p.grad for g in optimizer.param_groups for p in g["params"]]),
        )
        optimizer.step()
    y = model.eval()(ids).logits.detach()
    if "dora" not in case:
        assert rw.export(model, tmp_path / "lora.gguf", kind="gguf").verified < 1e-6
    for kind in ("peft", "lora") if "dora" not in case else ("peft",):
        rw.export(model, tmp_path / kind, kind=kind)
        reader = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / kind)).eval()
        torch.testing.assert_close(reader(ids).logits, y, rtol=1e-4, atol=1e-4)


def test_cutting_the_last_rank_leaves_what_the_start_took_out_of_the_base() -> None:
    model = rw.adapt(tiny_mlp().double(), "gated", rank=3, alpha=7, init="pissa", targets="first")
    delta: Any = rw.get_delta(model, "first")
    with torch.no_grad():
        delta.gate.zero_()
    before = rw.delta_weights(model)["first"]
    assert before.norm() > 0.1
    compact(model)
    assert pair_of(delta).rank == 0
    torch.testing.assert_close(rw.delta_weights(model)["first"], before, rtol=1e-12, atol=1e-14)
    assert not delta.empty
    grow_ranks(delta, {"A": torch.ones(1, 12), "B": torch.zeros(16, 1), "gate": torch.ones(1)})
    torch.testing.assert_close(rw.delta_weights(model)["first"], before, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("build", [tiny_convnet, tiny_gpt2])
def test_no_rank_at_any_kind_of_layer_is_the_base(build: Any) -> None:
    targets = "all-linear" if build is tiny_gpt2 else ["stem", "dilated", "grouped", "strided1d", "hidden"]
    targets = [*targets, "wte"] if isinstance(targets, list) and build is tiny_gpt2 else targets
    model = shaken(rw.adapt(build(), "lora", rank=2, targets=targets))
    x = token_batch() if build is tiny_gpt2 else torch.randn(2, 3, 16, 16)
    cut_to(model, [0])
    out = model(x)
    out = out.logits if hasattr(out, "logits") else out
    out.sum().backward()
    with rw.disabled(model):
        base = model(x)
    torch.testing.assert_close(out, base.logits if hasattr(base, "logits") else base)
    assert all(delta.empty for delta in state_of(model).adapter("default").deltas.values())


def test_an_embedding_without_ranks_is_the_base() -> None:
    model = shaken(rw.adapt(tiny_llama(), "lora", rank=2, targets="embed_tokens"))
    cut_to(model, [0])
    ids = token_batch()
    y = model(ids).logits
    with rw.disabled(model):
        torch.testing.assert_close(y, model(ids).logits)


def test_an_adapter_without_any_rank_is_kept_and_has_nothing_to_export(tmp_path: Path) -> None:
    model, _ = ragged("lora", (0,))
    assert rw.trainable_parameters(rw.load(tiny_llama(), rw.save(model, tmp_path / "a"))) == 0
    with pytest.raises(ExportError, match=r"rank 0.*nothing to export"):
        rw.export(model, tmp_path / "b", kind="lora")


# ---- gates ----------------------------------------------------------------------------------------------------------


def closed(delta: str = "gated", **settings: Any) -> tuple[nn.Module, dict[str, int]]:
    """A tiny Llama with 0, 1, 2, ... of four gates open at its sites."""
    model = shaken(rw.adapt(tiny_llama(), delta, rank=4, targets="all-linear", **settings))
    kept = {}
    for i, (key, each) in enumerate(state_of(model).adapter("default").deltas.items()):
        kept[key] = i % 5
        silence(each, list(range(i % 5, 4)))
    return model, kept


@pytest.mark.parametrize("settings", [{}, {"delta": "dora", "inner": "gated"}])
def test_compacting_leaves_real_ranks_and_the_output(settings: dict[str, Any]) -> None:
    model, kept = closed(**settings)
    ids = token_batch()
    y = model(ids).logits.detach()
    optimizer = make_optimizer(model, "adamw", lr=1e-3)
    assert compact(model, optimizer=optimizer) == kept
    assert {k: pair_of(rw.get_delta(model, k)).rank for k in kept} == kept
    torch.testing.assert_close(model(ids).logits, y, rtol=1e-5, atol=1e-5)
    parameters = dict(model.named_parameters())
    assert all(parameters[n] is p for g in optimizer.param_groups for n, p in zip(g["names"], g["params"], strict=True))
    before = rw.trainable_parameters(model)
    assert compact(model) == kept
    assert rw.trainable_parameters(model) == before


def test_siblings_that_read_one_input_see_a_rank_that_is_cut_between_them() -> None:
    """What the first of q, k and v made of the input for all three is not used once the factors are others."""
    model = shaken(rw.adapt(tiny_llama(), "gated", rank=4, targets=["q_proj", "k_proj"]))
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    key = "model.layers.0.self_attn.k_proj"
    x = torch.randn(2, 5, 32)
    attention.q_proj(x)
    keep_ranks(rw.get_delta(model, key), torch.tensor([1, 2]))
    got = attention.k_proj(x)
    torch.testing.assert_close(got, attention.k_proj(x.clone()))
    attention.q_proj(x)
    with torch.no_grad():
        pair_of(rw.get_delta(model, key)).A.mul_(2)
    got = attention.k_proj(x)
    torch.testing.assert_close(got, attention.k_proj(x.clone()))


def test_compacting_a_merged_model_is_refused() -> None:
    model, _ = closed()
    rw.merge(model)
    with pytest.raises(MergeError, match="cut ranks of"):
        compact(model)


def test_gates_around_frozen_factors_stay() -> None:
    model, kept = closed(inner="vera")
    assert compact(model) == kept
    assert all(len(gated_of(rw.get_delta(model, k)).gate) == 4 for k in kept)
