"""`model.quantise`: a run's YAML quantises the frozen base; starts that make good what was lost find their product."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training import small_run

import rankworks as rw
from rankworks.calibrate import calibrate, needed
from rankworks.core.errors import ConfigError, FingerprintError, TargetError
from rankworks.core.spec import AdaptSpec
from rankworks.core.weights.holders import dense_weight
from rankworks.quantize import code_book, dequantise_blocks, quantise_blocks
from rankworks.train import load_config, run
from rankworks.train.quantising import QuantiseConfig, products, quantise_base, together
from tiny import tiny_llama, token_batch

QPISSA = {"init": "pissa", "quantised": True}
Q0 = "model.layers.0.self_attn.q_proj"


def config(folder: Path, quantise: Any = "nf4", **adapt: Any) -> dict[str, Any]:
    made = small_run(folder, adapt={"delta": "lora", "rank": 4, **adapt}, train={"steps": 2})
    made["model"]["quantise"] = quantise
    return made


# ---- the setting ----


@pytest.mark.parametrize(
    ("given", "code", "bits", "block"),
    [("nf4", "nf", 4, 64), ("int8", "int", 8, 64), ({"bits": 3, "block": 32}, "nf", 3, 32), ({}, "nf", 4, 64)],
)
def test_a_word_or_a_block(given: Any, code: str, bits: int, block: int) -> None:
    found = load_config({"model": {"name": "x", "quantise": given}}).model
    assert found is not None
    assert found.quantise is not None
    assert (found.quantise.code, found.quantise.bits, found.quantise.block) == (code, bits, block)
    assert load_config(yaml.safe_load(yaml.safe_dump({"model": found.model_dump()}))).model == found


def test_without_it_nothing_is_quantised() -> None:
    assert load_config({"model": {"name": "x"}}).model.quantise is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given", "words"),
    [("nf9", "'nf9' is no code: write nf4"), ({"bits": 9}, "model.quantise.bits"), ({"bit": 4}, "bits")],
)
def test_what_it_cannot_be_is_refused(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config({"model": {"name": "x", "quantise": given}})


def test_a_model_that_is_trained_whole_is_not_quantised() -> None:
    with pytest.raises(ConfigError, match="for a base that stays frozen"):
        load_config({"model": {"name": "x", "quantise": "nf4"}, "adapt": "none"})


# ---- the base, and what a start gets ----


def test_plain_adapters_stand_on_plainly_quantised_weights() -> None:
    model, exact = tiny_llama(), tiny_llama()
    spec = AdaptSpec.from_flat({"delta": "lora", "rank": 4})
    assert products(model, spec) == {}
    assert quantise_base(model, QuantiseConfig(bits=3, block=32), {}, progress=False) == {}
    moved, whole = dict(model.named_parameters()), dict(exact.named_parameters())
    for name, weight in whole.items():
        book = code_book("nf", 3)
        linear = name.endswith("proj.weight")
        wanted = dequantise_blocks(quantise_blocks(weight.detach(), book, 32)) if linear else weight
        assert torch.equal(moved[name], wanted), name


@pytest.mark.parametrize(("init", "order"), [("loftq", "loftq"), (QPISSA, "pissa")])
def test_a_start_gets_its_product_in_its_order_and_rank_site_by_site(init: Any, order: Any) -> None:
    spec = AdaptSpec.from_flat({"delta": "dora", "rank": 4, "init": init, "overrides": {"q_proj": {"rank": 2}}})
    model, whole = tiny_llama(), tiny_llama()
    wanted = products(model, spec)
    assert wanted[Q0] == (order, 2)
    assert wanted[Q0.replace("q_proj", "v_proj")] == (order, 4)
    evidence = quantise_base(model, QuantiseConfig(iterations=2), wanted, progress=False)
    assert set(evidence) == set(wanted)
    for ending, rank in (("q_proj", 2), ("v_proj", 4)):
        alone = rw.quantise(whole, ending, init=order, rank=rank, iterations=2)
        for site, parts in alone.items():
            assert all(torch.equal(tensor, evidence[site][name]) for name, tensor in parts.items())
            assert torch.equal(whole.get_parameter(f"{site}.weight"), model.get_parameter(f"{site}.weight"))
    rw.adapt(model, spec, evidence=evidence)


def test_what_is_known_is_not_measured() -> None:
    model = tiny_llama()
    spec = AdaptSpec.from_flat({"delta": "shira", "mask": "grad", "density": 0.1})
    assert needed(model, spec) == ("gradient",)
    ids = token_batch()
    first = calibrate(model, [{"input_ids": ids, "labels": ids}], spec, progress=False)
    assert needed(model, spec, first) == ()
    part = {name: parts for name, parts in first.items() if name != Q0}
    rest = calibrate(model, [{"input_ids": ids, "labels": ids}], spec, given=part, progress=False)
    assert {name for name, parts in rest.items() if parts} == {Q0}
    whole = together(part, rest)
    assert whole is not None
    assert all(torch.equal(whole[n]["gradient"], first[n]["gradient"]) for n in first)
    assert together(None, None) is None


# ---- whole runs ----


@pytest.mark.parametrize(
    "adapt", [{}, {"init": "loftq"}, {"init": QPISSA}, {"delta": "shira", "mask": "grad", "density": 0.1}]
)
def test_a_run_trains_on_the_quantised_base_and_its_adapter_belongs_to_it(tmp_path: Path, adapt: Any) -> None:
    if adapt.get("delta") == "shira":
        made = small_run(tmp_path, train={"steps": 2})
        made["adapt"] = adapt
        made["model"]["quantise"] = "nf4"
    else:
        made = config(tmp_path, **adapt)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(made))
    result = run(path, progress=False)
    kept = load_config(Path(str(result.output)) / "config.yaml")
    assert kept.model is not None
    assert kept.model.quantise == QuantiseConfig()
    base = tiny_llama()
    with pytest.raises(FingerprintError):
        rw.load(base, str(result.adapter))
    spec = AdaptSpec.from_flat(kept.adapt or {})
    quantise_base(base, QuantiseConfig(), products(base, spec), progress=False)
    rw.load(base, str(result.adapter))
    known = json.loads((Path(str(result.adapter)) / "adapter.json").read_text())["base"]
    assert len(known) == 14


def test_the_base_is_the_quantised_model(tmp_path: Path) -> None:
    plain = run({**config(tmp_path, None), "output": str(tmp_path / "plain")}, progress=False)
    coarse = run({**config(tmp_path, {"bits": 2}), "output": str(tmp_path / "coarse")}, progress=False)
    assert plain.losses[0] != coarse.losses[0]  # LoRA starts as its base
    better = run({**config(tmp_path, {"bits": 2}, init="loftq"), "output": str(tmp_path / "loftq")}, progress=False)
    assert better.before == coarse.before
    assert better.losses[0] != coarse.losses[0]  # LoftQ does not


def test_loftq_without_it_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, TargetError), match=r"model.quantise in a recipe"):
        run(config(tmp_path, None, init="loftq"), progress=False)


def test_packed_weights_hold_the_same_numbers_and_train(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="a development dependency")
    dense, packed = tiny_llama(hidden=64), tiny_llama(hidden=64)
    for model, holder in ((dense, "dense"), (packed, "bitsandbytes")):
        quantise_base(model, QuantiseConfig(holder=holder), {}, progress=False)  # type: ignore[arg-type]
    for name, module in dense.named_modules():
        if name.endswith("_proj"):
            held: Any = packed.get_submodule(name)
            assert torch.equal(dense_weight(held.weight, held), module.weight)
    packed_run = config(tmp_path, {"holder": "bitsandbytes"}, init="loftq")
    tiny_llama(hidden=64).save_pretrained(packed_run["model"]["name"])
    one = run({**packed_run, "output": str(tmp_path / "packed")}, progress=False)
    packed_run["model"]["quantise"] = "nf4"
    two = run({**packed_run, "output": str(tmp_path / "dense")}, progress=False)
    assert one.losses == pytest.approx(two.losses, rel=1e-3)
