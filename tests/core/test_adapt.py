"""The verbs: adapt, activate, disabled, detach; what is refused leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters import bits, logits, same, shaken

import rankworks as rw
from rankworks.conformance.case import Snapshot
from rankworks.core.errors import ConfigError, MergeError, RankworksError, TargetError, UnknownNameError
from rankworks.core.spec import AdaptSpec
from rankworks.core.state import state_of
from rankworks.core.summary import trained
from tiny import tiny_convnet, tiny_gpt2, tiny_llama, tiny_mlp, token_batch

IDS = token_batch()


def two(tie: bool = False):
    """A model with a LoRA and a SHiRA on the same layers."""
    model = rw.adapt(tiny_llama(tie), "lora", rank=2, targets=["q_proj", "up_proj"], name="a")
    rw.adapt(model, "shira", rank=1, targets=["q_proj", "v_proj"], name="b")
    return shaken(model)


def test_the_same_from_a_key_a_spec_a_mapping_and_a_whole_spec():
    given = [
        ("lora", {"rank": 3, "alpha": 5, "targets": "q_proj"}),
        (rw.LoRA(rank=3, alpha=5), {"targets": "q_proj"}),
        ({"delta": "lora", "rank": 3, "alpha": 5}, {"targets": "q_proj"}),
        (AdaptSpec.from_flat({"delta": "lora", "rank": 3, "alpha": 5, "targets": "q_proj"}), {}),
    ]
    states = [bits(rw.adapt(tiny_llama(), delta, **settings)) for delta, settings in given]
    assert all(same(states[0], other) for other in states[1:])


def test_adapt_returns_the_same_model_and_freezes_the_base():
    model = tiny_llama()
    assert rw.adapt(model, "lora", rank=2) is model
    mine = {id(p) for p in state_of(model).adapter("default").parameters()}
    assert all(p.requires_grad == (id(p) in mine) for p in model.parameters())
    assert [id(p) for p in trained(model)] == [id(p) for p in model.parameters() if id(p) in mine]
    assert rw.trainable_parameters(model) == sum(p.numel() for p in trained(model))


def test_the_newest_adapter_acts_alone_until_told_otherwise():
    model = two()
    assert rw.adapters(model) == ["a", "b"]
    assert rw.active(model) == ["b"]
    alone = {n: rw.activate(model, n) or logits(model, IDS) for n in ("a", "b")}
    base = logits(tiny_llama(), IDS)
    rw.activate(model, [])
    assert torch.equal(logits(model, IDS), base)
    assert rw.active(model) == []
    rw.activate(model, ["a", "b"])
    both = logits(model, IDS)
    assert not any(torch.allclose(both, other, atol=1e-4) for other in [*alone.values(), base])
    rw.activate(model, ["b", "a", "a"])
    assert rw.active(model) == ["b", "a"]
    assert torch.allclose(logits(model, IDS), both, atol=1e-6)


def test_activating_touches_no_flag():
    model = two()
    first = trained(model)[0].requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    for names in (["a"], ["b"], ["a", "b"], []):
        rw.activate(model, names)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not first.requires_grad


def test_only_acting_adapters_count_as_trained():
    model = two()
    counts = {}
    for names in (("a",), ("b",), ("a", "b"), ()):
        rw.activate(model, names)
        counts[names] = rw.trainable_parameters(model)
    assert counts[("a", "b")] == counts[("a",)] + counts[("b",)]
    assert counts[()] == 0


def test_disabled_is_the_base_and_nests():
    model, base = two(), logits(tiny_llama(), IDS)
    adapted = logits(model, IDS)
    with rw.disabled(model):
        assert torch.equal(logits(model, IDS), base)
        with rw.disabled(model):
            assert torch.equal(logits(model, IDS), base)
        assert torch.equal(logits(model, IDS), base), "leaving the inner block must not end the outer one"
    assert torch.equal(logits(model, IDS), adapted)


def test_disabled_ends_also_when_the_block_fails():
    model = two()
    adapted = logits(model, IDS)
    with pytest.raises(ZeroDivisionError), rw.disabled(model):
        _ = 1 / 0
    assert torch.equal(logits(model, IDS), adapted)


def test_detaching_one_leaves_the_other():
    model = two()
    rw.activate(model, "a")
    first = logits(model, IDS)
    rw.detach(model, "b")
    assert rw.adapters(model) == ["a"]
    assert torch.equal(logits(model, IDS), first)
    assert type(model.model.layers[0].self_attn.v_proj) is torch.nn.Linear
    with pytest.raises(UnknownNameError):
        rw.activate(model, "b")


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"], [None]])
def test_detaching_the_last_one_leaves_the_base(order):
    model = tiny_llama()
    model.model.norm.requires_grad_(False)
    before = Snapshot.of(model)
    rw.adapt(model, "lora", rank=2, targets=["q_proj"], name="a", full=["lm_head"])
    rw.adapt(model, "vera", rank=2, targets=["q_proj", "v_proj"], name="b", full=["lm_head"])
    shaken(model)
    for name in order:
        rw.detach(model, name)
    assert before.differences(model) == []
    assert not hasattr(model, "rankworks")


def test_a_model_can_be_adapted_again_after_detaching():
    model = two()
    rw.detach(model)
    with pytest.raises(ConfigError, match="no adapter"):
        rw.detach(model)
    assert same(bits(rw.adapt(model, "lora", rank=2)), bits(rw.adapt(tiny_llama(), "lora", rank=2)))


def test_a_bank_lives_as_long_as_an_adapter_needs_it():
    model = rw.adapt(tiny_llama(), "vera", rank=2, targets="q_proj", name="a")
    rw.adapt(model, "vera", rank=2, targets="q_proj", name="b")
    assert len(state_of(model).banks) == 1, "the same request shares one bank"
    shaken(model)
    rw.activate(model, "b")
    wanted = logits(model, IDS)
    rw.detach(model, "a")
    assert torch.equal(logits(model, IDS), wanted)
    rw.adapt(model, "lora", rank=2, targets="q_proj", name="c")
    rw.detach(model, "b")
    assert len(state_of(model).banks) == 0


BAD = [
    ({"rank": 0}, "rank"),
    ({"rank": -1}, "rank"),
    ({"rnak": 4}, "rank"),
    ({"targets": "q_porj"}, "q_proj"),
    ({"init": "pisa"}, "pissa"),
    ({"init": "pissa", "rank": 33}, "33"),
    ({"init": "lora"}, "axis"),
    ({"targets": "q_proj", "full": ["q_proj"]}, "full"),
    ({"targets": "q_proj", "full": ["lm_haed"]}, "lm_head"),
    ({"overrides": {"nothing": {"rank": 1}}}, "nothing"),
    ({"name": "a b"}, "name"),
    ({"tied": "maybe"}, "tied"),
    ({"dtype": "int8"}, "dtype"),
    ({"alpha": float("nan")}, "alpha"),
    ({"seed": -1}, "seed"),
]


@pytest.mark.parametrize(("settings", "said"), BAD, ids=[str(s) for s, _ in BAD])
def test_bad_settings_leave_the_model_untouched(settings, said):
    for model in (tiny_llama(), two()):
        before = Snapshot.of(model)
        acting = rw.active(model)
        with pytest.raises(RankworksError, match=said):
            rw.adapt(model, "lora", **{"name": "c", **settings})
        assert before.differences(model) == []
        assert rw.active(model) == acting


def test_a_method_that_cannot_take_a_site_is_refused_untouched():
    for model, settings in (
        (tiny_llama(), {"delta": "bone-bat", "rank": 7}),
        (tiny_llama(), {"delta": "vera", "init": "pissa"}),
        (tiny_llama(), {"delta": "dora", "inner": "bone-bat"}),
        (tiny_convnet(), {"delta": "lora", "targets": "grouped", "dropout": 0.1}),
    ):
        before = Snapshot.of(model)
        with pytest.raises(ConfigError):
            rw.adapt(model, **settings)
        assert before.differences(model) == []


def test_a_failure_while_building_leaves_no_bank_behind(monkeypatch):
    from rankworks.deltas.vera import VeRA

    model = two()
    before = Snapshot.of(model)
    monkeypatch.setattr(VeRA, "setup", lambda self, weight: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rw.adapt(model, "vera", rank=2, name="c")
    assert before.differences(model) == []


def test_names_are_taken_once():
    model = two()
    with pytest.raises(ConfigError, match="already has an adapter called 'a'"):
        rw.adapt(model, "lora", name="a")
    with pytest.raises(UnknownNameError, match="Did you mean"):
        rw.activate(model, "A")
    with pytest.raises(UnknownNameError):
        rw.detach(model, ["a", "nobody"])
    assert rw.adapters(model) == ["a", "b"]


def test_a_plain_model_has_no_adapter_to_speak_of():
    model = tiny_mlp()
    assert rw.adapters(model) == []
    assert rw.active(model) == []
    for verb in (rw.detach, rw.merge, rw.summary, lambda m: rw.activate(m, "a"), lambda m: rw.save(m, "nowhere")):
        with pytest.raises(ConfigError, match="no adapter"):
            verb(model)


def test_nothing_can_be_switched_while_merged():
    model = rw.merge(two())
    for verb in (
        lambda: rw.activate(model, "a"),
        lambda: rw.disabled(model).__enter__(),
        lambda: rw.adapt(model, "lora", name="c"),
    ):
        with pytest.raises((MergeError, ConfigError), match="unmerge"):
            verb()
    rw.unmerge(model)
    rw.activate(model, "a")


def test_the_dtype_of_the_adapter():
    for base, asked, wanted in (
        (torch.bfloat16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, "bfloat16", torch.bfloat16),
    ):
        model = rw.adapt(tiny_mlp().to(base), "lora", rank=2, dtype=asked)
        assert {p.dtype for p in trained(model)} == {wanted}
        assert model(torch.ones(2, 12, dtype=base)).dtype == base


def test_a_deep_copy_with_everything_on_it():
    model = rw.adapt(two(tie=True), "vera", rank=2, targets="down_proj", full=["lm_head"], name="c")
    shaken(model)
    rw.activate(model, ["a", "b", "c"])
    wanted = logits(model, IDS)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, IDS), wanted)
    shaken(twin, seed=3)
    assert not torch.equal(logits(twin, IDS), wanted)
    rw.merge(twin)
    rw.detach(twin)
    assert torch.equal(logits(twin, IDS), logits(tiny_llama(tie=True), IDS))
    assert torch.equal(logits(model, IDS), wanted)


def test_gpt2s_stored_orientation():
    model = shaken(rw.adapt(tiny_gpt2().double(), "lora", rank=2, targets="all-linear")).double()
    changes = rw.delta_weights(model)
    plain = tiny_gpt2().double()
    with torch.no_grad():
        for name, change in changes.items():
            plain.get_submodule(name).weight += change.t()
    assert torch.allclose(logits(model, IDS), logits(plain, IDS), atol=1e-10)


def test_generate_works():
    model = two()
    out = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 15)


def test_targets_of_an_embedding_with_max_norm_are_refused():
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4, max_norm=1.0))
    with pytest.raises(TargetError, match="max_norm"):
        rw.adapt(model, "lora", rank=2, targets="0")
