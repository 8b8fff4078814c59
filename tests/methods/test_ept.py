"""EPT: the model reads [P_out ; E + c A B], and what it gives back has a row per token of the text, as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from facts import close
from learning import losses
from safetensors.torch import load_file
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError, ExportError, MergeError, TargetError
from rankworks.core.state import state_of
from rankworks.train.losses.objective import Objective
from rankworks.train.optim import set_learning_rate
from tiny import tiny_bert_classifier, tiny_gemma3, tiny_gpt2, tiny_llama, token_batch

IDS = token_batch(vocab=320)
PLAIN: dict[str, Any] = {"fusion": False, "spaces": 0}
SMALL: dict[str, Any] = {"rank": 3, "prompt_length": 5, "max_length": 32, "width": 4}


def llama() -> Any:
    return tiny_llama().double()


def adapted(build: Any = llama, **settings: Any) -> Any:
    return rw.adapt(build(), "ept", **{**SMALL, **settings})


def delta_of(model: Any) -> Any:
    return next(iter(state_of(model).adapter("default").deltas.values()))


@torch.no_grad()
def shake(model: nn.Module, std: float = 0.3) -> Any:
    for parameter in state_of(model).adapter("default").parameters():
        parameter.add_(std * torch.randn_like(parameter))
    return delta_of(model)


def by_hand(base: Any, prompt: Tensor, shift: Tensor, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    """Logits of a plain model that is given the prompt and the shifted embeddings as its input."""
    embedded = base.get_input_embeddings()(ids) + shift[: ids.shape[1]]
    embedded = torch.cat([prompt.expand(len(ids), -1, -1), embedded], dim=1)
    return base(inputs_embeds=embedded, **kwargs).logits[:, -ids.shape[1] :]


# ---- what the model reads ----


@pytest.mark.parametrize("build", [llama, lambda: tiny_gpt2().double(), lambda: tiny_gemma3().double()])
def test_without_shift_fusion_and_spaces_it_is_prompt_tuning_bit_for_bit(build: Any) -> None:
    """By hand the head sees the same rows, of a frozen model as well: torch multiplies in other ways otherwise."""
    model, base = adapted(build, **PLAIN), build().requires_grad_(False)
    zeros, rows = torch.zeros(32, 32), IDS.shape[1]
    assert torch.equal(model(IDS).logits, by_hand(base, delta_of(model).P, zeros, logits_to_keep=rows))


def test_the_whole_method_starts_as_the_plain_prompt() -> None:
    assert torch.equal(adapted()(IDS).logits, adapted(**PLAIN)(IDS).logits)


def test_the_prompt_starts_at_words_of_the_vocabulary_as_the_model_reads_them() -> None:
    for build in (llama, lambda: tiny_gemma3().double()):  # the second scales what it looks up
        model = adapted(build)
        words = build().get_input_embeddings()(torch.arange(320))
        nearest = torch.cdist(delta_of(model).P, words).min(dim=1)
        assert nearest.values.max() < 1e-6
        assert len(set(nearest.indices.tolist())) == 5


def test_without_a_prompt_only_the_embeddings_shift() -> None:
    model = adapted(prompt_length=0)
    delta = shake(model)
    assert set(dict(delta.named_parameters())) == {"P", "A", "B"}
    shift = 8 / 3**0.5 * delta.A @ delta.B
    close(model(IDS).logits, by_hand(llama(), delta.P, shift))


def test_the_prompt_is_the_equations() -> None:
    model = adapted(spaces=3)
    d = shake(model)
    AB = d.A @ d.B
    weights = ((d.P @ d.W_q) @ (AB @ d.W_k).t() / 4**0.5).softmax(-1)
    fused = d.P + weights @ (AB @ (d.U_v @ d.D_v))
    close(d.fused_prompt(), fused)
    gate = (d.W_g @ fused.mean(0)).softmax(0)
    wanted = fused + sum(gate[k] * F.gelu(fused @ d.S[k]) @ d.T[k] for k in range(3))
    close(d.prompt(), wanted)
    close(model(IDS).logits, by_hand(llama(), wanted, 8 / 3**0.5 * AB))


def test_the_gate_is_uniform_at_the_start_and_sums_to_one() -> None:
    delta = delta_of(adapted())
    close(delta.gate(delta.fused_prompt()), torch.full((4,), 0.25))
    delta = shake(adapted())
    gate = delta.gate(delta.fused_prompt())
    close(gate.sum(), torch.tensor(1.0))
    assert gate.std() > 1e-3


def test_the_backbone_reads_m_tokens_more_and_gives_none_of_them_back() -> None:
    model, lengths = adapted(), []
    handle = model.model.layers[0].register_forward_hook(lambda m, args, out: lengths.append(args[0].shape[1]))
    out = model(IDS, output_hidden_states=True)
    handle.remove()
    assert lengths == [12 + 5]
    assert out.logits.shape == (2, 12, 320)
    assert {h.shape[1] for h in out.hidden_states} == {12}


def test_positions_past_the_shift_are_left_alone() -> None:
    model = adapted(max_length=4)
    delta = shake(model)
    shift = torch.cat([delta.cached()["shift"], torch.zeros(8, 32)])
    close(model(IDS).logits, by_hand(llama(), delta.cached()["prompt"], shift))


# ---- masks, labels, positions, caches ----


def test_rows_of_padding_do_not_leak() -> None:
    model = adapted()
    shake(model)
    padded = torch.cat([IDS, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    mask = (torch.arange(16) < 12).long().expand(2, -1)
    close(model(padded, attention_mask=mask).logits[:, :12], model(IDS).logits)
    with torch.no_grad():
        delta_of(model).A[12:].add_(3)  # the shift of the padding's own positions
    close(model(padded, attention_mask=mask).logits[:, :12], model(IDS).logits)


def test_the_loss_of_labels_is_that_of_the_text_alone() -> None:
    model = adapted()
    shake(model)
    out = model(IDS, labels=IDS)
    wanted = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    close(out.loss.double(), wanted, 1e-6)  # transformers' own loss is float32
    objective = Objective(model)  # of the training loop, which asks the backbone and the head apart
    assert objective.split is not None
    close(objective({"input_ids": IDS}, IDS).double() / IDS[:, 1:].numel(), wanted, 1e-6)


@pytest.mark.parametrize("build", [llama, lambda: tiny_gpt2().double()])
def test_a_cache_gives_what_the_whole_text_gives(build: Any) -> None:
    model = adapted(build)
    shake(model)
    whole = model(IDS).logits
    first = model(IDS[:, :7], use_cache=True)
    close(first.logits, whole[:, :7])
    cache = first.past_key_values
    for t in (7, 8):
        step = model(IDS[:, t : t + 1], past_key_values=cache, use_cache=True)
        close(step.logits, whole[:, t : t + 1])
    mask = torch.ones(2, 12, dtype=torch.long)
    close(model(IDS[:, 9:], attention_mask=mask, past_key_values=cache).logits, whole[:, 9:])


@pytest.mark.parametrize("build", [llama, lambda: tiny_gpt2().double()])
def test_generation_is_greedy_search_by_hand(build: Any) -> None:
    model = adapted(build)
    shake(model, 0.5)
    ids = IDS[:1]
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    told = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert told.tolist() == ids.tolist()
    assert (
        model.generate(IDS[:1], max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False).tolist()
        == ids.tolist()
    )


def test_a_row_padded_on_the_left_generates_what_it_does_alone() -> None:
    model = adapted()
    shake(model, 0.5)
    alone = model.generate(IDS[:1, :8], max_new_tokens=5, do_sample=False, eos_token_id=None)[:, 8:]
    ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS[:1, :8]], 1), IDS[1:]])
    mask = (ids != 0).long()
    both = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, 12:]
    assert both[0].tolist() == alone[0].tolist()


def test_a_classifier_takes_a_prompt_too() -> None:
    model = rw.adapt(tiny_bert_classifier().double(), "ept", **SMALL)
    types = torch.zeros_like(IDS)
    assert model(IDS, attention_mask=torch.ones_like(IDS), token_type_ids=types).logits.shape == (2, 3)


def test_a_mask_of_four_dimensions_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave no room"):
        adapted()(IDS, attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool))


# ---- on and off, files, exports ----


def test_disabled_and_detached_it_leaves_the_base_bit_for_bit() -> None:
    model, plain = adapted(), llama()
    shake(model)
    with rw.disabled(model):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    rw.detach(model)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_hooks


def test_it_stands_beside_a_lora_which_can_be_exported_alone(tmp_path: Path) -> None:
    model = rw.adapt(llama(), "lora", rank=2, name="lora")
    with torch.no_grad():
        for parameter in state_of(model).adapter("lora").parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    alone = model(IDS).logits
    rw.adapt(model, "ept", **SMALL, name="ept")
    rw.activate(model, ["lora", "ept"])
    assert not torch.allclose(model(IDS).logits, alone)
    rw.export(model, tmp_path / "merged", kind="merged", name="lora")
    close(type(llama()).from_pretrained(tmp_path / "merged", dtype=torch.float64)(IDS).logits, alone)


def test_it_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = adapted()
    shake(model)
    again = rw.load(llama(), rw.save(model, tmp_path / "ept"))
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_cached_export_equals_the_live_model(tmp_path: Path) -> None:
    model = adapted()
    shake(model)
    report = rw.export(model, tmp_path / "prompt", kind="prompt")
    made = load_file(tmp_path / "prompt" / "prompt.safetensors")
    assert report.exact
    assert (made["prompt"].shape, made["shift"].shape) == ((5, 32), (32, 32))
    close(by_hand(llama(), made["prompt"], made["shift"]), model(IDS).logits)


def test_merging_and_other_exports_are_refused(tmp_path: Path) -> None:
    model = adapted()
    shake(model)
    before = model(IDS).logits
    with pytest.raises(MergeError, match="changes no weight and cannot be merged"):
        rw.merge(model)
    assert torch.equal(model(IDS).logits, before)
    for kind in ("lora", "peft", "merged", "gguf"):
        with pytest.raises(ExportError, match="changes no weight"):
            rw.export(model, tmp_path / kind, kind=kind)
    with pytest.raises(ExportError, match="has no prompt"):
        rw.export(rw.adapt(llama(), "lora"), tmp_path / "x", kind="prompt")


def test_a_model_that_reads_no_tokens_is_refused() -> None:
    with pytest.raises(TargetError, match="ept does not take sites of kind 'linear'"):
        rw.adapt(nn.Sequential(nn.Linear(4, 4)), "ept")


# ---- counts ----


@pytest.mark.parametrize(("m", "r"), [(60, 30), (40, 45), (20, 60)])
def test_the_budget_of_a_prompt_of_100_tokens(m: int, r: int) -> None:
    told = rw.plan("roberta-base", "ept", prompt_length=m, rank=r, max_length=256, sequence=8, **PLAIN)
    assert told.trainable_parameters == 76_800 == 100 * 768
    assert r == (100 - m) * 768 // (256 + 768)


def test_the_count_of_the_extras() -> None:
    counts = {
        name: rw.plan("roberta-base", "ept", sequence=8, **settings).trainable_parameters
        for name, settings in {"none": PLAIN, "fusion": {"spaces": 0}, "spaces": {"fusion": False}}.items()
    }
    assert counts["none"] == 76_800
    assert counts["fusion"] - counts["none"] == 196_608
    assert counts["spaces"] - counts["none"] == 393_216 + 3_072


def test_the_shift_has_a_learning_rate_of_its_own() -> None:
    """The prompt's is the run's; a schedule moves both, and a step of SGD shows each."""
    model = adapted(shift_rate=0.25)
    delta = shake(model)
    optimizer = rw.make_optimizer(model, "sgd", lr=0.4)
    rates = {name.rsplit(".", 1)[-1]: g["lr"] for g in optimizer.param_groups for name in g["names"]}
    assert rates["P"] == rates["W_q"] == 0.4
    assert rates["A"] == rates["B"] == 0.1
    set_learning_rate(optimizer, 0.5)
    before = {name: p.detach().clone() for name, p in delta.named_parameters()}
    model(IDS).logits.square().mean().backward()
    optimizer.step()
    for name, rate in (("P", 0.2), ("A", 0.05), ("B", 0.05)):
        moved = getattr(delta, name)
        close(before[name] - moved.detach(), rate * moved.grad, 1e-12)


def test_training_lowers_the_loss() -> None:
    seen = losses(rw.adapt(tiny_llama(), "ept", **SMALL).train(), steps=15, lr=3e-2)
    assert seen[-1] < 0.95 * seen[0]
