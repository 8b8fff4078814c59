"""The cost of an optimizer's step beside torch's AdamW and the released packages, refresh steps counted in.

    python benchmarks/optimizers.py                                   # everything, about 20 minutes on two cores
    python benchmarks/optimizers.py --optimizers galore,fira --cases 1024x1024 --rounds 30
    python benchmarks/optimizers.py --set fira.scaling=tensor --optimizers fira

A contender is any registered optimizer by its key (with `refresh` once at 10 and once at 200 where it has one), or one
of the packages: galore-torch, galore-torch-adafactor, bitsandbytes (its 8-bit AdamW on this processor), adamw-fused,
adamw-foreach; or `products`, the floor of whatever projects: G into the subspace and back, added to W, and nothing
else. A case is one matrix with its rank: 1024x1024 of rank 128, the distinct weights of LLaMA 130M (rank 256) and 1B
(rank 512), or `smollm2`: every weight of SmolLM2-135M at rank 128. Gradients are given, not computed. Cases measured
alone take their places in a file that is there; `environments` says where the others were measured.

One process; in a round every contender takes one step after the other. The first round, with the first subspace, is
left out. `over_adamw` is the median of the rounds' ratios to torch's AdamW as it comes, which is what a step without a
refresh costs; `mean_over_adamw` is the ratio of the sums over as many rounds as refreshes come evenly in, with every
refresh in it. For a refresh of 200 the mean is put together from the median step and the mean refresh step. See
README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES: dict[str, tuple[tuple[int, int], int]] = {
    "1024x1024": ((1024, 1024), 128),
    "130m-attention": ((768, 768), 256),
    "130m-up": ((2048, 768), 256),
    "130m-down": ((768, 2048), 256),
    "1b-attention": ((2048, 2048), 512),
    "1b-up": ((5461, 2048), 512),
    "1b-down": ((2048, 5461), 512),
}
WHOLE_MODELS = 3  # contenders at a time where each has a model of its own, with gradients and state
FLOOR = "products"
PACKAGES = ("galore-torch", "galore-torch-adafactor", "bitsandbytes", "adamw-fused", "adamw-foreach")
OURS = (
    "galore", "galore-fast", "galore-adafactor", "galore-8bit", "galore-svd", "fira", "fira-fast", "apollo",
    "apollo-fast", "frugal", "dct-adamw", "adamw8bit", "adafactor",
)  # fmt: skip
SPELT: dict[str, dict[str, Any]] = {
    "frugal": {"optimizer": "frugal", "projection": "columns"},  # blocks are whole weights: one alone is in or out
    "galore-adafactor": {"optimizer": "galore", "rule": "adafactor"},
    "galore-8bit": {"optimizer": "galore", "rule": "adamw8bit"},
    "galore-svd": {"optimizer": "galore", "subspace": "svd"},
    "galore-fast": {"optimizer": "galore", "products": "fast"},
    "fira-fast": {"optimizer": "fira", "products": "fast"},
    "apollo-fast": {"optimizer": "apollo", "products": "fast"},
}
OFTEN, SELDOM = 10, 200


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="An optimizer's step beside AdamW's.")
    parser.add_argument("--cases", default="all", help=f"with commas: {', '.join(SHAPES)}, smollm2")
    parser.add_argument("--optimizers", default=parse_default(), help="keys and packages, with commas")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.SETTING=VALUE")
    parser.add_argument("--rounds", type=int, default=30, help="rounded up to a multiple of 10")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--output", type=Path, help="default: results/optimizers.json when everything is measured")
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)  # before torch is imported
    import common
    import torch

    torch.set_num_threads(options.threads)
    cases = [*SHAPES, "smollm2"] if options.cases == "all" else options.cases.split(",")
    rounds = -(-options.rounds // OFTEN) * OFTEN
    result: dict[str, Any] = {"benchmark": "optimizers", "environment": common.environment(options.clock)}
    result["setting"] = {"dtype": "float32", "refresh": [OFTEN, SELDOM], "rounds": rounds, "side": "std"}
    result |= {"environments": {}, "cases": {}}
    everything = options.cases == "all" and options.optimizers == parse_default()
    output = options.output or (common.RESULTS / "optimizers.json" if everything else None)
    if output is not None and output.exists() and not everything:
        before = json.loads(output.read_text())
        result["environments"] = dict.fromkeys(before["cases"], before["environment"]) | before["environments"]
        result["cases"] = before["cases"]
    for case in cases:
        common.note(f"{case}: {options.optimizers}")
        result["cases"][case] = measure(case, options, rounds)
        result["environments"].pop(case, None)  # the one above
        common.write(result, output)
    common.finish(result, output)


def parse_default() -> str:
    """All contenders."""
    return ",".join((FLOOR, *OURS, *PACKAGES))


def measure(case: str, options: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """Time every contender on one case and return its rows."""
    shapes, rank = weights_of(case)
    names = options.optimizers.split(",")
    together = len(names) if case in SHAPES else WHOLE_MODELS
    rows = {}
    for i in range(0, len(names), together):  # AdamW takes its steps beside each of them
        beside = beside_adamw(["adamw", *names[i : i + together]], shapes, rank, options, rounds)
        rows = {**beside, **rows}
    return rows


def beside_adamw(
    names: list[str], shapes: list[tuple[int, ...]], rank: int, options: argparse.Namespace, rounds: int
) -> dict[str, Any]:
    """Time contenders, AdamW the first of them, in rounds of one step each."""
    import common

    made = {name: contender(name, shapes, rank, settings_of(name, options.set)) for name in names}
    steps = {name: (lambda round_, step=step: step()) for name, (step, _) in made.items()}
    seconds = common.alternate(steps, rounds, clock=options.clock)
    rows = {}
    for name in names:
        rows[name] = common.summarise(seconds[name], {"adamw": seconds["adamw"]})
        rows[name]["mean_over_adamw"] = round(sum(seconds[name]) / sum(seconds["adamw"]), 4)
        rows[name]["state_bytes"] = made[name][1]()
        if refreshes(name):
            rows[name] |= at_200(seconds[name], seconds["adamw"])
    return rows


def at_200(seconds: list[float], adamw: list[float]) -> dict[str, float]:
    """The mean ratio if a subspace is found every 200 steps: the first of every ten rounds but the first finds one."""
    refresh = [(i + 1) % OFTEN == 0 for i in range(len(seconds))]  # the round left out was step 1
    at, between = ([s for s, yes in zip(seconds, refresh, strict=True) if yes == which] for which in (True, False))
    mean = (statistics.mean(at) + (SELDOM - 1) * statistics.median(between)) / SELDOM
    base = statistics.median(adamw)
    return {
        "refresh_seconds": round(statistics.median(at), 4),
        "over_adamw_without_refresh": round(statistics.median(between) / base, 4),
        "mean_over_adamw_at_200": round(mean / base, 4),
    }


def weights_of(case: str) -> tuple[list[tuple[int, ...]], int]:
    """Return the shapes of a case's weights and its rank."""
    if case in SHAPES:
        shape, rank = SHAPES[case]
        return [shape], rank
    from rankworks.plan.source import open_source

    model = open_source("smollm2-135m", "float32").model
    return [tuple(p.shape) for p in model.parameters()], 128


def settings_of(name: str, given: list[str]) -> dict[str, Any]:
    """Return what --set says of an optimizer."""
    import yaml

    pairs = [text.removeprefix(f"{name}.").split("=", 1) for text in given if text.startswith(f"{name}.")]
    return {key: yaml.safe_load(value) for key, value in pairs}


def refreshes(name: str) -> bool:
    """Whether a contender finds subspaces now and then."""
    from rankworks.core.registry import build

    if name in PACKAGES or name == FLOOR:
        return name.startswith("galore")
    return "refresh" in type(build("optimizer", SPELT.get(name, {"optimizer": name}))).model_fields


def contender(
    name: str, shapes: list[tuple[int, ...]], rank: int, settings: dict[str, Any]
) -> tuple[Callable[[], Any], Callable[[], int]]:
    """Return a step of an optimizer on weights of its own with gradients given, and the bytes that it keeps."""
    import torch
    from torch import nn

    model = nn.Module()
    generator = torch.Generator().manual_seed(0)
    model.layers = nn.ModuleList()
    for shape in shapes:  # linear layers are what is projected; vectors and the embedding are plain parameters
        layer: Any = nn.Module()
        if len(shape) == 2 and shape[0] < 10_000:
            layer = nn.Linear(shape[1], shape[0], bias=False)
        else:
            layer.weight = nn.Parameter(torch.zeros(shape))
        layer.weight.data.normal_(std=0.02, generator=generator)
        layer.weight.grad = 1e-3 * torch.randn(shape, generator=generator)
        model.layers.append(layer)
    if name == FLOOR:
        return products(model, rank), lambda: 0
    optimizer = package(name, model, rank) if name in PACKAGES else ours(name, model, rank, settings)

    def kept() -> int:
        tensors = [t for state in optimizer.state.values() for k, t in state.items() if torch.is_tensor(t)]
        tensors += [v.ortho_matrix for s in optimizer.state.values() for v in s.values() if hasattr(v, "ortho_matrix")]
        return sum(t.numel() * t.element_size() for t in tensors if t.ndim and t.numel() > 1)

    return optimizer.step, kept


def products(model: Any, rank: int) -> Callable[[], None]:
    """The gradient of every linear layer into a subspace of its shorter side, and back, added to the weight."""
    import torch
    from torch import nn

    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    bases = [torch.linalg.qr(torch.randn(min(w.shape), min(rank, *w.shape))).Q.contiguous() for w in weights]

    @torch.no_grad()
    def step() -> None:
        for W, Q in zip(weights, bases, strict=True):
            if W.shape[0] >= W.shape[1]:
                W.addmm_(W.grad @ Q, Q.t(), alpha=-1e-3)
            else:
                W.addmm_(Q, Q.t() @ W.grad, alpha=-1e-3)

    return step


def ours(name: str, model: Any, rank: int, settings: dict[str, Any]) -> Any:
    """A registered optimizer, at this rank and a refresh of 10 where it has them."""
    import rankworks as rw
    from rankworks.core.registry import build

    chosen = {**SPELT.get(name, {"optimizer": name}), **settings}
    fields = type(build("optimizer", chosen)).model_fields
    fixed = {k: v for k, v in {"rank": rank, "refresh": OFTEN, "scale": 0.25}.items() if k in fields}
    return rw.make_optimizer(model, {**fixed, **chosen}, lr=1e-3)


def package(name: str, model: Any, rank: int) -> Any:
    """An optimizer of torch or of a released package."""
    import torch
    from torch import nn

    parameters = list(model.parameters())
    if name.startswith("adamw"):
        return torch.optim.AdamW(parameters, lr=1e-3, fused=name == "adamw-fused", foreach=name == "adamw-foreach")
    if name == "bitsandbytes":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=1e-3)
    import galore_torch

    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    chosen = {id(p) for p in linear}
    galore = {"rank": rank, "update_proj_gap": OFTEN, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": linear, **galore}, {"params": [p for p in parameters if id(p) not in chosen]}]
    groups = [group for group in groups if group["params"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "galore-torch-adafactor":
            return galore_torch.GaLoreAdafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False)
        return galore_torch.GaLoreAdamW(groups, lr=1e-3, no_deprecation_warning=True)


if __name__ == "__main__":
    main()
