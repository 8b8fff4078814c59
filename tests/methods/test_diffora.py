"""DiffoRA: a gate per module, an exact budget, and one change that the others share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from facts import close, quick
from hypothesis import given
from hypothesis import strategies as st
from learning import losses
from safetensors import safe_open
from searching import batches, differences, language_model, loss_of, relaxed, toy_scores
from torch import Tensor

import rankworks as rw
from rankworks.core.errors import ConfigError, TargetError
from rankworks.core.registry import build
from rankworks.core.scaled import scaled
from rankworks.core.select import layer_of
from rankworks.core.state import state_of
from rankworks.train.losses.objective import Objective
from tiny import tiny_llama, token_batch

SELECT = {"select": "diffora"}
Q, V = "self_attn.q_proj", "self_attn.v_proj"


def selection(**settings):
    spec = build("selection", {**SELECT, **settings})
    return spec.method.cls(spec)


def site(layer: int, part: str) -> str:
    return f"model.layers.{layer}.{part}"


def shared_llama(delta: str = "lora", layers: int = 3, **settings):
    """q_proj of layer 0 has a change of its own; all q_proj and v_proj else share one per type."""
    select = {**SELECT, "chosen": [site(0, Q)]}
    return rw.adapt(tiny_llama(layers=layers), delta, targets=["q_proj", "v_proj"], select=select, rank=2, **settings)


# ---- the matrix ----------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(0, 10))
def test_the_matrix_has_the_requested_count_in_every_layer(scores: list[list[float]], tenths: int):
    flat = {f"layers.{i}.m{j}": score for i, row in enumerate(scores) for j, score in enumerate(row)}
    chosen = selection(rho=tenths / 10).decide(flat)
    for i, row in enumerate(scores):
        mine = [name for name in chosen if name.startswith(f"layers.{i}.")]
        assert len(mine) == -(-tenths * len(row) // 10)  # ceil(rho M), in integers
        assert not mine or min(flat[n] for n in mine) >= sorted(row, reverse=True)[len(mine) - 1]
    anywhere = selection(rho=tenths / 10, scope="global").decide(flat)
    assert len(anywhere) == -(-tenths * len(flat) // 10)
    assert not anywhere or min(flat[n] for n in anywhere) >= sorted(flat.values(), reverse=True)[len(anywhere) - 1]


def test_everything_chosen_is_plain_lora():
    torch.set_default_dtype(torch.float32)
    plain = rw.adapt(tiny_llama(), "lora", rank=2)
    names = list(state_of(plain).adapter("default").sites)
    everything = selection(rho=1.0).decide(dict.fromkeys(names, 0.0))
    assert everything == names
    chosen = rw.adapt(tiny_llama(), "lora", rank=2, select={**SELECT, "rho": 1.0, "chosen": everything})
    ours, theirs = (state_of(m).adapter("default").tensors() for m in (chosen, plain))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_nothing_chosen_and_nothing_shared_is_the_base():
    assert selection(rho=0.0).decide({site(0, Q): 9.0, site(0, V): 1.0}) == []
    model, ids = language_model(), token_batch(vocab=32)
    with torch.no_grad():
        base = model(ids).logits
    with relaxed(model, SELECT) as search, torch.no_grad():
        for change in search.changes.values():
            change.factor = torch.zeros(())
        assert torch.equal(model(ids).logits, base)
    with pytest.raises(TargetError, match="leaves no site to adapt"):
        rw.adapt(tiny_llama(), "lora", select={**SELECT, "share": False, "chosen": []})


# ---- the search ----------------------------------------------------------------------------------------------------


def test_all_gates_start_equal():
    scores = torch.zeros(5)
    assert (selection().weights(scores) == 0.5).all()


@pytest.mark.parametrize("delta", ["lora", "dora", "vera"])
def test_the_gradient_of_the_gates_is_that_of_finite_differences(delta: str):
    model, held = language_model(2), batches()
    with relaxed(model, SELECT, delta) as search:
        search.scores.normal_()

        def loss(scores: Tensor) -> Tensor:
            with torch.no_grad():
                search.act(scores)
                return loss_of(model, held[0])

        gradient = search.gradient(Objective(model), held)
        close(gradient, differences(loss, search.scores), 1e-6)
        assert len(gradient) == 8


@pytest.mark.parametrize("order", ["first", "unrolled"])
def test_the_one_useful_module_of_every_layer_is_chosen(order: str):
    useful = ["layers.0.left", "layers.1.right", "layers.2.left"]
    scores = toy_scores({**SELECT, "every": 1, "order": order}, useful)
    assert selection(rho=0.5).decide(scores) == useful
    assert sorted(selection(rho=0.5, scope="global").decide(scores)) == useful


# ---- the outcome ---------------------------------------------------------------------------------------------------


def test_modules_of_a_type_share_the_very_tensors_which_count_once():
    model = shared_llama()
    q, v = ([rw.get_delta(model, site(i, part)) for i in range(3)] for part in (Q, V))
    assert q[1] is q[2]
    assert v[0] is v[1] is v[2]
    assert len({id(q[0]), id(q[1]), id(v[0])}) == 3
    pair_q, pair_v = 2 * (32 + 32), 2 * (32 + 16)
    assert rw.trainable_parameters(model) == 2 * pair_q + pair_v
    rows = {row.site: row.parameters for row in rw.summary(model).rows}
    assert rows[site(0, Q)] == rows[site(1, Q)] == pair_q
    assert rows[site(0, V)] == pair_v
    assert rows[site(2, Q)] == rows[site(1, V)] == 0


def test_shapes_types_and_stacks_share_apart():
    owners = selection(chosen=[]).owners
    model = rw.adapt(tiny_llama(), "lora", rank=2, select={**SELECT, "chosen": []})
    sites = list(state_of(model).adapter("default").sites.values())
    found = owners(sites)
    assert len(found) == 7
    assert all(layer_of(a).part == layer_of(b).part for a, b in found.items())  # type: ignore[union-attr]
    assert selection(chosen=[], share=False).owners(sites) == {}


@pytest.mark.parametrize("delta", ["lora", "vera", "bone", "randlora", "gated"])
def test_sharing_lasts_through_training_and_files(delta: str, tmp_path: Path):
    torch.set_default_dtype(torch.float32)
    model, ids = shared_llama(delta).train(), token_batch()
    with rw.disabled(model), torch.no_grad():
        base = model(ids).logits
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base)
    seen = losses(model, lr=3e-2)
    assert seen[-1] < seen[0]
    rw.save(model, tmp_path / "a")
    with safe_open(tmp_path / "a" / "adapter.safetensors", "pt") as data:
        names = {key.rsplit("_proj", 1)[0] for key in data.keys() if "layers" in key}  # noqa: SIM118
    assert names == {"model.layers.0.self_attn.q", "model.layers.1.self_attn.q", "model.layers.0.self_attn.v"}
    again = rw.load(tiny_llama(layers=3), tmp_path / "a")
    assert rw.get_delta(again, site(1, Q)) is rw.get_delta(again, site(2, Q))
    assert rw.trainable_parameters(again) == rw.trainable_parameters(model)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert torch.equal(again(ids).logits, expected)
        rw.merge(again)
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=2e-5)


def test_exported_it_is_a_plain_lora_and_equals_the_gated_model_with_gates_of_zero_and_one(tmp_path: Path):
    torch.set_default_dtype(torch.float32)
    ids, chosen = token_batch(), [site(0, Q), site(1, V)]
    every = [site(i, part) for i in (0, 1) for part in (Q, V)]
    gated, ours = (
        rw.adapt(
            tiny_llama(),
            "lora",
            rank=2,
            targets=["q_proj", "v_proj"],
            select={**SELECT, "share": False, "chosen": names},
        )
        for names in (every, chosen)
    )
    with torch.no_grad():
        for name in chosen:
            rw.get_delta(gated, name).B.normal_()  # type: ignore[union-attr,operator]
            for key, tensor in rw.get_delta(gated, name).named_parameters():
                rw.get_delta(ours, name).get_parameter(key).copy_(tensor)
        with scaled(gated) as changes:
            for name, change in changes.items():
                change.factor = torch.tensor(float(name in chosen))
            expected = gated(ids).logits
        assert torch.equal(ours(ids).logits, expected)
        rw.export(ours, tmp_path / "plain", kind="peft")
        torch.testing.assert_close(rw.load(tiny_llama(), tmp_path / "plain")(ids).logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["peft", "lora"])
def test_shared_changes_are_exported_at_every_site(kind: str, tmp_path: Path):
    torch.set_default_dtype(torch.float32)
    model, ids = shared_llama(), token_batch()
    losses(model, steps=3)
    rw.export(model, tmp_path / kind, kind=kind)  # type: ignore[arg-type]
    again = rw.load(tiny_llama(layers=3), tmp_path / kind)
    assert len(rw.summary(again).rows) == 6
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=0, atol=2e-5)


def test_counts_are_a_pair_per_chosen_module_and_one_per_type_and_shape():
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    chosen = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(32) for p in "qo"]
    counted = rw.plan("llama-2-7b", "lora", rank=8, targets=targets, select={**SELECT, "chosen": chosen})
    assert counted.trainable_parameters == (64 + 2) * 8 * (4096 + 4096)


def test_what_cannot_be_shared_is_refused_with_the_remedy():
    select = {**SELECT, "chosen": []}
    for delta in ("dora", "shira", "lora-xs"):
        with pytest.raises(TargetError, match=rf"that of {delta} is made for the weight it stands at: set share to"):
            rw.adapt(tiny_llama(), delta, rank=2, select=select)
        everything = selection(rho=0.5, share=False).decide(dict.fromkeys([site(0, Q), site(0, V)], 0.0))
        rw.adapt(tiny_llama(), delta, rank=2, select={**SELECT, "share": False, "chosen": everything})
    with pytest.raises(TargetError, match=r"can have one set of settings.*treat them alike"):
        rw.adapt(tiny_llama(), "lora", rank=2, select=select, overrides={"q_proj@1": {"rank": 4}})
    with pytest.raises(ConfigError, match="diffora chooses by a search on data"):
        rw.adapt(tiny_llama(), "lora", select="diffora")
    with pytest.raises(ConfigError, match="rho"):
        build("selection", {**SELECT, "rho": 1.5})
