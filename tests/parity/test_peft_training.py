"""Equal weights, to 1e-6, after ten identical AdamW steps from the same start.

In float32 for every method but DoRA, in float64 for all. Adam divides a gradient by its own size, so an entry whose
gradient is nearly zero turns rounding into a full step: float32 cannot hold 1e-6 there. That is met with DoRA (its
norms round differently in two implementations), with a scale that is no power of two, and with the starts that PEFT
moves out of the base in float32; those are compared in float64 alone.
"""

from __future__ import annotations

import pytest
import torch
from both import METHODS, TARGETS, in_peft, saved_by_peft
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import rankworks as rw
from rankworks.core.state import state_of
from tiny import tiny_convnet, tiny_gpt2, tiny_llama, token_batch

STEPS, RATE = 10, 1e-2
MOVED = [m for m in METHODS if "pissa" in m or "olora" in m]  # PEFT rewrites the base for these
PLAIN = [m for m in METHODS if m not in MOVED]


def train(model, parameters, loss_of):
    """Ten AdamW steps; returns the losses."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def language_loss(model, step):
    tokens = token_batch(seed=step)
    return model(input_ids=tokens, labels=tokens).loss


def image_loss(model, step):
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    image = image.to(next(model.parameters()).dtype)
    return model(image).square().mean()


def both_trained(tmp_path, build, loss_of, delta, dtype, settings):
    """Train one start in both libraries; returns (our file's tensors, theirs, our losses, theirs)."""
    ours = rw.adapt(build().to(dtype), delta, **settings)
    rw.export(ours, tmp_path / "start", kind="peft")
    theirs = in_peft(build().to(dtype), tmp_path / "start", trainable=True)
    ours.train()
    mine = train(ours, state_of(ours).adapter("default").parameters(), loss_of)
    yours = train(theirs, [p for p in theirs.parameters() if p.requires_grad], loss_of)
    ours.eval()
    rw.export(ours, tmp_path / "ours", kind="peft")
    saved_by_peft(theirs, tmp_path / "theirs")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("start", "ours", "theirs")]
    return *files, mine, yours


def exactly(tmp_path, build, loss_of):
    """Return the weights of peft's run from the same start in float64."""
    theirs = in_peft(build().double(), tmp_path / "start", trainable=True).double()
    train(theirs, [p for p in theirs.parameters() if p.requires_grad], loss_of)
    saved_by_peft(theirs, tmp_path / "exact")
    return load_file(tmp_path / "exact" / "adapter_model.safetensors")


def farthest(some, others, keys):
    """Return the largest difference of two sets of weights."""
    return max(float((some[k].double() - others[k].double()).abs().max()) for k in keys)


def check(tmp_path, build, loss_of, delta, settings, dtype=torch.float64):
    """Weights equal to 1e-6, and moved from their start.

    Where peft's own float32 run strays, as AdamW lets it by dividing gradients near zero by themselves, ours has to be
    as close to peft's run in float64.
    """
    start, mine, yours, curve, other = both_trained(tmp_path, build, loss_of, delta, dtype, settings)
    shared = [k for k in mine if ".base_layer." not in k]
    assert set(shared) == {k for k in yours if ".base_layer." not in k}
    floating = [k for k in shared if mine[k].is_floating_point()]
    if dtype == torch.float32 and farthest(mine, yours, floating) >= 1e-6:
        yours = exactly(tmp_path, build, loss_of)
    assert farthest(mine, yours, floating) < 1e-6
    moved = farthest(mine, start, floating)
    assert moved > RATE
    assert curve == pytest.approx(other, abs=1e-9 if dtype == torch.float64 else 1e-5)


BOTH = pytest.mark.parametrize(
    ("delta", "dtype"), [("lora", torch.float32), ("lora", torch.float64), ("dora", torch.float64)], ids=str
)


@pytest.mark.parametrize("method", [m for m in PLAIN if "dora" not in m])
def test_methods_in_float32(tmp_path, method):
    delta, settings = METHODS[method]
    check(tmp_path, tiny_llama, language_loss, delta, {"targets": TARGETS, **settings}, torch.float32)


@pytest.mark.parametrize("method", PLAIN)
def test_methods_in_float64(tmp_path, method):
    delta, settings = METHODS[method]
    check(tmp_path, tiny_llama, language_loss, delta, {"targets": TARGETS, **settings})


@BOTH
def test_conv1d_and_embedding(tmp_path, delta, dtype):
    check(tmp_path, tiny_gpt2, language_loss, delta, {"rank": 4, "targets": ["c_attn", "c_proj", "wte"]}, dtype)


@BOTH
def test_convolutions(tmp_path, delta, dtype):
    settings = {"rank": 4, "targets": ["stem", "pointwise", "strided1d", "head"]}
    check(tmp_path, tiny_convnet, image_loss, delta, settings, dtype)


def test_rank_and_alpha_per_layer(tmp_path):
    settings = {"rank": 4, "alpha": 8, "overrides": {"q_proj": {"rank": 6, "alpha": 5}}, "targets": TARGETS}
    check(tmp_path, tiny_llama, language_loss, "lora", settings)


@pytest.mark.parametrize("method", MOVED)
def test_starts_taken_out_of_the_base(tmp_path, method):
    """PEFT moves the start out of the base weight and we subtract it in the delta: the effective weights agree.

    PEFT's own start is taken, so that only the signs of singular vectors could differ; its factors are given ours.
    """
    delta, settings = METHODS[method]
    name = settings["init"]
    ours = rw.adapt(tiny_llama(), delta, targets=TARGETS, **settings)
    config = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        use_rslora=settings.get("scaling") == "rslora",
        use_dora=delta == "dora",
        init_lora_weights=name,
        target_modules=TARGETS,
    )
    theirs = get_peft_model(tiny_llama(), config)
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A") and n.endswith("_proj")}
    sites = state_of(ours).adapter("default")
    with torch.no_grad():
        for site, layer in layers.items():
            own = sites.deltas[site].inner if delta == "dora" else sites.deltas[site]
            pair = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            torch.testing.assert_close(own.B @ own.A, pair, rtol=1e-4, atol=1e-5)  # the same start, but for signs
            signs = (own.A * layer.lora_A["default"].weight).sum(dim=1).sign()
            torch.testing.assert_close(own.A, signs.unsqueeze(1) * layer.lora_A["default"].weight, rtol=1e-3, atol=1e-4)
    ours.double(), theirs.double()
    with torch.no_grad():
        for site, layer in layers.items():
            own = sites.deltas[site].inner if delta == "dora" else sites.deltas[site]
            layer.lora_A["default"].weight.copy_(own.A)
            layer.lora_B["default"].weight.copy_(own.B)
            base = sites.sites[site].weight - own.scale * own.B0 @ own.A0  # in float64: the same rest on both sides
            layer.get_base_layer().weight.copy_(base)
            if delta == "dora":
                layer.lora_magnitude_vector["default"].weight.copy_(sites.deltas[site].m)
    ours.train(), theirs.train()
    mine = train(ours, sites.parameters(), language_loss)
    yours = train(theirs, [p for p in theirs.parameters() if p.requires_grad], language_loss)
    assert mine == pytest.approx(yours, abs=1e-9)
    changed = rw.delta_weights(ours)
    theirs.eval()
    for site, layer in layers.items():
        own = sites.deltas[site].inner if delta == "dora" else sites.deltas[site]
        torch.testing.assert_close(own.A, layer.lora_A["default"].weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(own.B, layer.lora_B["default"].weight, rtol=0, atol=1e-6)
        effective = sites.sites[site].weight + changed[site]
        layer.merge()
        torch.testing.assert_close(effective, layer.get_base_layer().weight, rtol=0, atol=1e-6)
        assert changed[site].abs().max() > RATE / 10
