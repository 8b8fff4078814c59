"""Every printed parameter count of the methods there are, as a table: (model, delta, settings, targets, printed)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rankworks as rw
from rankworks.core.errors import TargetError
from rankworks.core.refuse import reasons_against
from rankworks.core.registry import get, methods
from rankworks.core.resolve import resolve
from rankworks.core.spec import AdaptSpec
from rankworks.core.targets import find_sites
from rankworks.plan.make import Step, plan_on
from rankworks.plan.source import open_source
from tiny import tiny_convnet, tiny_gpt2, tiny_llama, tiny_moe

QV = "q_proj,v_proj"
QKV_UP_DOWN = "q_proj,k_proj,v_proj,up_proj,down_proj"
DEBERTA_SIX = (
    "query_proj,key_proj,value_proj,attention.output.dense,intermediate.dense,re:layer\\.\\d+\\.output\\.dense"
)
ROBERTA_QV = "query,value"
ROBERTA_FOUR = "query,value,attention.output.dense,intermediate.dense"

PEFT_RESULTS = [  # the reference library's committed results on Llama-3.2-3B
    ("llama-3.2-3b", "lora", {"rank": 32, "alpha": 64}, QV, 9_175_040),
    ("llama-3.2-3b", "lora", {"rank": 64, "alpha": 128}, QV, 18_350_080),
    ("llama-3.2-3b", "lora", {"rank": 64, "alpha": 64, "scaling": "rslora"}, QV, 18_350_080),
    ("llama-3.2-3b", "lora", {"rank": 10}, "gate_proj,up_proj,down_proj", 9_461_760),
    ("llama-3.2-3b", "dora", {"rank": 32}, QV, 9_289_728),
    ("llama-3.2-3b", "vera", {"rank": 256}, QV, 129_024),
    ("llama-3.2-3b", "shira", {"rank": 32}, QV, 9_175_040),
    ("llama-3.2-3b", "bone", {"rank": 64}, QV, 7_340_032),
    ("llama-3.2-3b", "bone-bat", {"rank": 64}, QV, 7_340_032),
    ("llama-3.2-3b", "bone", {"rank": 64, "mini": 64}, QV, 229_376),
]
PAPERS = [
    ("roberta-base", "lora", {"rank": 8}, ROBERTA_QV, 294_912),
    ("llama-7b", "lora", {"rank": 32}, QKV_UP_DOWN, 56_098_816),
    ("llama-7b", "dora", {"rank": 32}, QKV_UP_DOWN, 56_975_360),
    ("llama-2-7b", "lora", {"rank": 36}, "all-linear", 89_948_160),
    ("llama-2-7b", "bone", {"rank": 64}, "all-linear", 87_031_808),
    ("llama-2-7b", "bone-bat", {"rank": 64}, "all-linear", 87_031_808),
    ("llama-2-7b", "lora", {"rank": 8}, QV, 4_194_304),
    ("llama-3-8b", "lora", {"rank": 32}, QKV_UP_DOWN, 56_623_104),
    ("llama-3-8b", "lora", {"rank": 8}, QV, 3_407_872),
    ("llama-3-8b", "lora", {"rank": 8}, "q_proj@0:1,v_proj@0:1", 106_496),
    ("llama-3-8b", "lora", {"rank": 8}, "q_proj@0:14,v_proj@0:14", 1_490_944),
    ("llama-3-8b", "lora", {"rank": 8}, "q_proj@0:16,v_proj@0:16", 1_703_936),
    ("llama-3-8b", "lora", {"rank": 8}, "q_proj@0:12,v_proj@0:12", 1_277_952),
    ("llama-3-8b", "lora", {"rank": 8}, "q_proj@-7:,v_proj@-7:", 745_472),
    ("llama-3.1-8b", "lora", {"rank": 8}, "@0:1", 655_360),
    ("llama-3.1-8b", "lora", {"rank": 8}, "@0:12", 7_864_320),
    ("llama-3.1-8b", "lora", {"rank": 8}, "all-linear", 20_971_520),
    ("qwen2.5-7b", "lora", {"rank": 8}, "@0:1", 720_896),
    ("qwen2.5-7b", "lora", {"rank": 8}, "@0:12", 8_650_752),
    ("qwen2.5-7b", "lora", {"rank": 8}, "all-linear", 20_185_088),
    ("mistral-7b", "lora", {"rank": 32}, "all-linear", 83_886_080),
    ("deberta-v3-base", "lora", {"rank": 1}, DEBERTA_SIX, 165_888),
    ("deberta-v3-base", "lora", {"rank": 2}, DEBERTA_SIX, 331_776),
    ("deberta-v3-base", "lora", {"rank": 8}, DEBERTA_SIX, 1_327_104),
    ("deberta-v3-base", "lora", {"rank": 8}, "all-linear", 1_327_104),
    ("roberta-large", "lora-xs", {"rank": 4}, ROBERTA_FOUR, 1_536),
    ("roberta-large", "lora-xs", {"rank": 25}, ROBERTA_FOUR, 60_000),
    ("mistral-7b", "lora-xs", {"rank": 32}, "all-linear", 229_376),
    ("mistral-7b", "lora-xs", {"rank": 64}, "all-linear", 917_504),
    ("mistral-7b", "lora-xs", {"rank": 96}, "all-linear", 2_064_384),
    ("gemma-7b", "lora-xs", {"rank": 64}, "all-linear", 802_816),
    ("roberta-base", "vera", {"rank": 1}, ROBERTA_QV, 18_456),
    ("roberta-base", "vera", {"rank": 16}, ROBERTA_QV, 18_816),
    ("roberta-base", "vera", {"rank": 256}, ROBERTA_QV, 24_576),
    ("roberta-base", "vera", {"rank": 1024}, ROBERTA_QV, 43_008),
    ("roberta-large", "vera", {"rank": 256}, ROBERTA_QV, 61_440),
    ("llama-7b", "vera", {"rank": 1024}, "all-linear", 1_589_248),
]
INITS = [  # an initialiser changes where training starts, not what is trained
    ("llama-2-7b", "lora", {"rank": rank, "init": init}, "all-linear", printed)
    for init in ("default", "gaussian", "pissa", "olora")
    for rank, printed in ((8, 19_988_480), (16, 39_976_960), (32, 79_953_920), (128, 319_815_680))
]


@pytest.fixture(scope="module")
def opened() -> dict[str, Any]:
    """Models on the meta device by name; a plan leaves them bare, so the rows share them."""
    return {}


@pytest.mark.parametrize(("model", "delta", "settings", "targets", "printed"), PEFT_RESULTS + PAPERS + INITS)
def test_printed_count(
    opened: dict[str, Any], model: str, delta: str, settings: dict[str, Any], targets: str, printed: int
) -> None:
    source = opened.get(model) or opened.setdefault(model, open_source(model))
    spec = AdaptSpec.from_flat({"delta": delta, "targets": targets, **settings})
    counted = sum(s.method.cls.count(s, site.shape) for site, s in resolve(source.model, spec))
    assert counted == printed, "the method's formula"
    rw.adapt(source.model, spec)
    assert rw.trainable_parameters(source.model) == printed, "what is really built"
    rw.detach(source.model)


@pytest.mark.parametrize(
    ("model", "delta", "settings", "targets", "percent"),
    [("llama-7b", "lora", {"rank": 32}, QKV_UP_DOWN, 0.83), ("llama-7b", "dora", {"rank": 32}, QKV_UP_DOWN, 0.84)],
)
def test_printed_percentage_counts_the_adapter_among_all(
    model: str, delta: str, settings: dict[str, Any], targets: str, percent: float
) -> None:
    step = Step("adamw", 1, 8, False)
    told = plan_on(
        open_source(model), AdaptSpec.from_flat({"delta": delta, "targets": targets, **settings}), step, None
    )
    assert round(told.percent, 2) == percent


def test_one_matrix_of_the_sparse_method() -> None:
    layer = nn.Sequential(nn.Linear(4096, 4096, bias=False, device="meta"))
    told = rw.plan(layer, "shira", rank=32, targets="0", example=torch.empty(1, 4096))
    assert told.trainable_parameters == 262_144
    assert round(100 * told.trainable_parameters / told.base_parameters, 2) == 1.56


@pytest.mark.parametrize("key", [m.key for m in methods("delta") if m.origin.startswith("rankworks.")])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_convnet, tiny_moe])
def test_a_plan_of_every_method_equals_the_real_thing(key: str, build: Any) -> None:
    """Count, bytes on disk and in memory of a tiny model, planned and then done, at the sites the method takes."""
    targets = {
        tiny_llama: "all-linear,embed_tokens",
        tiny_gpt2: "all-linear,wte",
        tiny_convnet: "stem,pointwise,strided1d,hidden",
        tiny_moe: "gate_up_proj,down_proj,q_proj",
    }[build]
    model, real = build(), build()
    ranked = "rank" in get("delta", key).cls.accepted({})
    settings: dict[str, Any] = {"rank": 1 if build is tiny_convnet else 4} if ranked else {}
    spec = AdaptSpec.from_flat({"delta": key, **settings})
    settings["targets"] = [
        s.name
        for s in find_sites(model, targets, (), spec.delta.method.cls.kinds)
        if not reasons_against(s, spec.delta, spec)
    ]
    if not settings["targets"]:
        with pytest.raises(TargetError, match=r"does not take|even rank"):
            rw.plan(model, key, **{**settings, "targets": targets})
        return
    told = rw.plan(
        model, key, example=torch.empty(1, 3, 16, 16) if build is tiny_convnet else None, sequence=8, **settings
    )
    rw.adapt(real, key, **settings)
    assert rw.adapters(model) == [], "the planned model is left alone"
    assert told.trainable_parameters == rw.trainable_parameters(real)
    assert told.adapter_bytes == rw.summary(real).bytes
    adapter = real.rankworks.adapter("default")
    held = {id(t): t for d in adapter.deltas.values() for t in [*d.parameters(), *d.buffers()]}
    held |= {id(t): t for bank in real.rankworks.banks.values() for t in [*bank.parameters(), *bank.buffers()]}
    assert told.adapter_bytes + told.frozen_bytes == sum(t.nbytes for t in held.values())
    assert told.activation_bytes > 0, told.notes
