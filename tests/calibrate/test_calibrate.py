"""rankworks.calibrate: what autograd says of the weights, measured without their gradients ever standing together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankworks as rw
from rankworks.calibrate import needed
from rankworks.core.errors import ConfigError, TargetError, UnknownNameError
from rankworks.core.spec import AdaptSpec
from rankworks.core.targets import find_sites
from tiny import (
    byte_tokenizer,
    tiny_bert_classifier,
    tiny_convnet,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
    tiny_moe,
    token_batch,
)

BOTH = ("gradient", "gradient_magnitude")


def language_batches(count: int = 3) -> list[dict[str, Tensor]]:
    return [{"input_ids": (ids := token_batch(batch=2, seed=s)), "labels": ids} for s in range(count)]


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def by_autograd(model: nn.Module, data: list[Any], targets: Any, loss: Any) -> dict[str, dict[str, Tensor]]:
    """The means over batches of G and |G|, by plain .backward() on every parameter."""
    model = copy.deepcopy(model).eval()
    model.requires_grad_(True)
    sites = find_sites(model, targets)
    sums = {s.name: {what: torch.zeros(*s.shape) for what in BOTH} for s in sites}
    for batch in data:
        model.zero_grad()
        loss(model, batch).backward()
        for site in sites:
            holder = copy.copy(site)
            gradient = nn.Parameter(site.tensor.grad.clone(), requires_grad=False)
            held = site.module._parameters[site.param]
            site.module._parameters[site.param] = gradient
            G = holder.weight.clone()
            site.module._parameters[site.param] = held
            sums[site.name]["gradient"] += G / len(data)
            sums[site.name]["gradient_magnitude"] += G.abs() / len(data)
    return sums


def agrees(found: Any, wanted: Any) -> None:
    assert set(found) == set(wanted)
    for name, statistics in wanted.items():
        for what, tensor in statistics.items():
            torch.testing.assert_close(found[name][what], tensor, rtol=1e-4, atol=1e-6)


def model_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


CASES = {
    "llama": (tiny_llama, "all-linear"),
    "llama, head and embedding": (tiny_llama, ["lm_head", "embed_tokens", "q_proj"]),
    "llama, tied": (lambda: tiny_llama(tie=True), ["q_proj", "down_proj"]),
    "gpt2, turned": (tiny_gpt2, "all-linear"),
    "gpt2, rows": (tiny_gpt2, ["c_attn[0:32]", "c_attn[40:50]"]),
    "experts": (tiny_moe, ["gate_up_proj", "down_proj#1:3", "q_proj"]),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_means_are_autograds(case: str) -> None:
    build, targets = CASES[case]
    model, data = build(), language_batches()
    agrees(rw.calibrate(model, data, BOTH, targets=targets), by_autograd(model, data, targets, model_loss))


def test_convolutions_of_every_sort() -> None:
    model = tiny_convnet()
    data = [torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]
    agrees(rw.calibrate(model, data, BOTH, targets=names, loss=squares), by_autograd(model, data, names, squares))


def test_a_layer_used_twice_in_a_batch_counts_as_one_gradient() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    torch.manual_seed(0)
    model, data = Twice(), [torch.randn(4, 6) for _ in range(3)]
    agrees(rw.calibrate(model, data, BOTH, targets="layer", loss=squares), by_autograd(model, data, "layer", squares))


def test_layers_followed_by_an_operation_in_place() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), [torch.randn(4, 6)]
    agrees(rw.calibrate(model, data, BOTH, loss=squares), by_autograd(model, data, "all-linear", squares))


def test_the_second_moment_of_the_inputs() -> None:
    model, data = tiny_mlp(), [torch.randn(4, 12, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    found = rw.calibrate(model, data, ("input_second_moment",), targets="first", loss=squares)
    x = torch.cat(data)
    torch.testing.assert_close(found["first"]["input_second_moment"], x.t() @ x / len(x))


def snapshot(model: nn.Module) -> Any:
    return (
        {n: (p.requires_grad, p.grad is None, p.detach().clone()) for n, p in model.named_parameters()},
        {n: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        [len(p._backward_hooks or {}) for p in model.parameters()],
    )


def unchanged(before: Any, after: Any) -> bool:
    tensors = all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before[0].values(), after[0].values(), strict=True)
    )
    return tensors and before[1:] == after[1:]


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was_also_by_an_exception(failing: bool) -> None:
    model = tiny_moe().train()
    model.model.embed_tokens.requires_grad_(False)
    before = snapshot(model)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        value = model(**batch).loss
        if failing:
            raise RuntimeError("no more")
        return value

    targets = ["q_proj", "gate_up_proj"]
    if failing:
        with pytest.raises(RuntimeError, match="no more"):
            rw.calibrate(model, language_batches(), targets=targets, loss=loss)
    else:
        rw.calibrate(model, language_batches(), targets=targets, loss=loss)
    assert unchanged(before, snapshot(model))


def test_two_calls_give_the_same_bits() -> None:
    model, data = tiny_llama().train(), language_batches()
    first, second = (rw.calibrate(model, data, BOTH) for _ in range(2))
    assert all(torch.equal(first[n][w], second[n][w]) for n in first for w in BOTH)


def test_gradients_of_a_weight_live_one_layer_at_a_time() -> None:
    """While the backward pass runs, the sizes of all weight gradients that exist never exceed the largest one's."""
    import gc

    model, seen = tiny_mlp(64, 64, 64), []
    from rankworks.calibrate import statistics

    plain = statistics.Gradient.gradient

    def watched(self: Any, G: Tensor) -> None:
        mine = [t for t in gc.get_objects() if isinstance(t, Tensor) and tuple(t.shape) == (64, 64)]
        seen.append(len({t.data_ptr() for t in mine}))
        plain(self, G)

    statistics.Gradient.gradient = watched
    try:
        rw.calibrate(model, [torch.randn(8, 64)], loss=squares)
    finally:
        statistics.Gradient.gradient = plain
    assert seen == [4, 5, 6]  # 3 weights, the gradient at hand, and the sums that earlier layers left on the CPU


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"data": []}, ConfigError, "no data"),
        ({"needs": ("gradiant",)}, UnknownNameError, "gradient"),
        ({"targets": "nowhere"}, TargetError, "nowhere"),
        ({"data": [torch.ones(1)]}, ConfigError, "loss="),
        ({"data": [{"input_ids": token_batch()}]}, ConfigError, "labels"),
        ({"needs": ("input_second_moment",), "targets": "embed_tokens"}, ConfigError, "not defined at"),
    ],
)
def test_bad_calls_are_refused_with_the_remedy(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        rw.calibrate(tiny_llama(), **{"data": language_batches(1), **kwargs})


def test_a_layer_that_the_data_never_reach_is_named() -> None:
    model = tiny_mlp()
    model.idle = nn.Linear(3, 3)
    with pytest.raises(ConfigError, match="idle took no part"):
        rw.calibrate(model, [torch.randn(2, 12)], loss=squares)


def test_a_method_is_adapted_from_it() -> None:
    model, data = tiny_llama(), language_batches()
    spec = AdaptSpec.from_flat({"delta": "shira", "rank": 1, "mask": "snip"})
    assert needed(model, spec) == ("gradient",)
    assert needed(model, AdaptSpec.from_flat({"delta": "dora", "inner": "shira", "mask": "grad"})) == ("gradient",)
    evidence = rw.calibrate(model, data, needed(model, spec))
    rw.adapt(model, spec, evidence=evidence)
    delta = rw.get_delta(model, "model.layers.0.mlp.down_proj")
    scores = (evidence["model.layers.0.mlp.down_proj"]["gradient"] * model.model.layers[0].mlp.down_proj.weight).abs()
    assert set(delta.index.tolist()) == set(scores.flatten().topk(len(delta.index)).indices.tolist())


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_a_recipe_measures_before_it_adapts(task: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankworks.train import api

    model = tiny_llama() if task == "causal-lm" else tiny_bert_classifier(2)
    monkeypatch.setattr(api, "load_model", lambda *a, **k: (model, byte_tokenizer()))
    rows = "\n".join(
        f'{{"text": "{"good" if i % 2 else "bad"} {i}", "label": "{"pos" if i % 2 else "neg"}"}}' for i in range(16)
    )
    (tmp_path / "data.jsonl").write_text(rows)
    config = {
        "model": {"name": "any", "task": task},
        "data": {"path": str(tmp_path / "data.jsonl"), "max_length": 64},
        "adapt": {"delta": "shira", "rank": 1, "mask": "grad"},
        "calibrate": {"batches": 2},
        "train": {"steps": 2, "batch_size": 4},
        "evaluate": {"limit": 4},
        "output": str(tmp_path / "run"),
    }
    seen: dict[str, Any] = {}
    measure = api.measure_evidence
    monkeypatch.setattr(api, "measure_evidence", lambda *a, **k: seen.setdefault("evidence", measure(*a, **k)))
    result = api.run(config, progress=False)
    assert result.steps == 2
    name, statistics = next(iter(seen["evidence"].items()))
    delta = rw.get_delta(model, name)
    chosen = statistics["gradient"].abs().flatten().topk(len(delta.index)).indices
    assert set(delta.index.tolist()) == set(chosen.tolist())


def test_fisher_is_the_mean_of_squared_gradients_of_samples() -> None:
    """Batches of one text, against a gradient per text by autograd."""
    model = tiny_llama()
    texts = [{"input_ids": (ids := token_batch(batch=1, length=4 + s, seed=s)), "labels": ids} for s in range(4)]
    found = rw.calibrate(model, texts, ("fisher",))
    per_sample = [by_autograd(model, [text], "all-linear", model_loss) for text in texts]
    for name, statistics in found.items():
        wanted = torch.stack([sample[name]["gradient"].square() for sample in per_sample]).mean(0)
        torch.testing.assert_close(statistics["fisher"], wanted, rtol=1e-4, atol=1e-9)


def test_a_bar_is_shown_where_a_person_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankworks.calibrate import api

    shown: list[tuple[int, str]] = []

    def track(items: Any, title: str) -> Any:
        shown.append((len(items), title))
        return items

    monkeypatch.setattr(api, "track", track)
    rw.calibrate(tiny_mlp(), [torch.randn(2, 12)] * 3, loss=squares, progress=False)
    assert shown == []
    rw.calibrate(tiny_mlp(), [torch.randn(2, 12)] * 3, loss=squares)
    assert shown == [(3, "calibrating")]


def test_the_seed_of_a_run_decides_what_is_measured() -> None:
    from types import SimpleNamespace

    from rankworks.train.batching.batches import Example
    from rankworks.train.calibration import measure_evidence

    examples = [Example(ids := tuple(token_batch(batch=1, length=4 + s, seed=s)[0].tolist()), ids) for s in range(12)]
    task = SimpleNamespace(train=list(range(12)))
    prepared: Any = SimpleNamespace(task=task, pad=0, examples=lambda records, where: [examples[r] for r in records])
    model, spec = tiny_llama(), AdaptSpec.from_flat({"delta": "lora", "rank": 2, "init": "eva"})
    one, again, other = (
        measure_evidence(model, prepared, spec, batches=2, batch_size=3, seed=s, progress=False) for s in (0, 0, 1)
    )
    parts = [(name, part) for name in one for part in one[name]]
    assert all(torch.equal(one[n][p], again[n][p]) for n, p in parts)
    assert not all(torch.equal(one[n][p], other[n][p]) for n, p in parts)


def test_text_that_gives_many_examples_is_measured_on_as_many_as_were_asked_for(monkeypatch) -> None:
    """A document of a text becomes hundreds of examples: two batches of three are six of them, from all over."""
    from types import SimpleNamespace

    from rankworks.train import calibration
    from rankworks.train.batching.batches import Example

    def pieces(records: list[int], where: str) -> list[Example]:
        return [Example((r + 1, piece + 1), (r + 1, piece + 1)) for r in records for piece in range(50)]

    prepared: Any = SimpleNamespace(task=SimpleNamespace(train=list(range(20))), pad=0, examples=pieces)
    spec = AdaptSpec.from_flat({"delta": "lora", "rank": 2, "init": "eva"})
    seen: list[Any] = []
    monkeypatch.setattr(calibration, "calibrate", lambda model, data, *a, **k: seen.append(data))
    for seed in (0, 0, 1):
        calibration.measure_evidence(tiny_llama(), prepared, spec, batches=2, batch_size=3, seed=seed)
    ids = [torch.cat([batch.inputs["input_ids"] for batch, _ in data]).tolist() for data in seen]
    assert [len(rows) for rows in ids] == [6, 6, 6]
    assert ids[0] == ids[1] != ids[2]
    assert len({row[0] for row in ids[0]}) > 2  # not the head of one document


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_a_recipe_starts_from_what_its_layers_read(init: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankworks.train import api

    model = tiny_llama()
    monkeypatch.setattr(api, "load_model", lambda *a, **k: (model, byte_tokenizer()))
    rows = [
        f'{{"text": "{"good" if i % 2 else "bad"} {i}", "label": "{"pos" if i % 2 else "neg"}"}}' for i in range(16)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    config = {
        "model": {"name": "any"},
        "data": {"path": str(tmp_path / "data.jsonl"), "max_length": 64},
        "adapt": {"delta": "lora", "rank": 4, "init": init},
        "calibrate": {"batches": 2},
        "train": {"steps": 4, "batch_size": 4},
        "optim": {"lr": 1e-2},
        "evaluate": {"limit": 4},
        "output": str(tmp_path / "run"),
    }
    result = api.run(config, progress=False)
    assert result.steps == 4
    assert result.losses[-1] < result.losses[0]
    ranks = [row.rank for row in rw.summary(model).rows]
    assert sum(r or 0 for r in ranks) == 4 * len(ranks)
    assert (len(set(ranks)) > 1) == (init == "eva")
