"""What every initialiser costs on a whole model, beside peft where it has it.

    python benchmarks/inits.py                                      # all, about 20 minutes on two cores
    python benchmarks/inits.py --inits pissa,olora --rounds 3 --no-memory

SmolLM2-135M in float32, every projection, rank 16. Timed is all that a user waits for between a loaded model and one
that can train: what the start must measure on data (the same batches for both), the decompositions, and putting the
adapter on the model. EVA is measured at a tau that any batch meets, so that both see the same two batches.
One initialiser after the other; ours and peft's take turns in one process, each on a fresh copy of the model (copying
is not counted), ratios within a round; peak memory in a process of its own. A file that is there keeps its other rows.
Triples (lora-sb) start lora-xs.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
RANK = 16
LEAST = 2  # rounds, however slow
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OURS: dict[str, dict[str, Any]] = {
    "pissa-4": {"init": {"init": "pissa", "iterations": 4}},
    "eva": {"init": {"init": "eva", "tau": 1e-9}},
}
"""Settings of ours beside each initialiser's defaults, by the name they are reported under."""

PEFT: dict[str, str] = {
    "default": "true",
    "gaussian": "gaussian",
    "pissa": "pissa",
    "pissa-4": "pissa_niter_4",
    "olora": "olora",
    "eva": "eva",
    "corda": "corda",
    "lora-ga": "lora_ga",
}
"""Peft's names of the same starts. Its loftq needs an accelerator, so there is nothing to compare on a CPU; its corda
imports the package attrs without depending on it, and is left out where that is missing."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What every initialiser costs.")
    parser.add_argument("--inits", default="all", help="keys with commas; pissa-4 is the randomised form")
    parser.add_argument("--batches", type=int, default=4, help="of data, for the starts that need some")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=120, help="seconds after which no round of a start begins")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    parser.add_argument("--output", type=Path, help="default: results/inits.json when everything is measured")
    parser.add_argument("--only-memory-of", help=argparse.SUPPRESS)  # what the child processes are called with
    return parser.parse_args()


def known() -> list[str]:
    """Return the names that can be measured."""
    import rankworks as rw

    return sorted({*(m.key for m in rw.methods("init")), *OURS})


def base() -> Any:
    """Return the model, frozen."""
    import rankworks as rw

    model, _ = rw.load_model(MODEL, dtype="float32")
    return model.requires_grad_(False)  # type: ignore[union-attr]


def batches(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the same random tokens for everybody: the time does not depend on which."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.length)
    ids = [torch.randint(1000, 40000, shape, generator=generator) for _ in range(options.batches)]
    return [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t.clone()} for t in ids]


def start(name: str, data: list[dict[str, Any]]) -> Callable[[Any], Any]:
    """Return what puts a started adapter on a model: ours, or `peft-` and the name for peft's."""
    if name.startswith("peft-"):
        return lambda model: _peft(model, PEFT[name.removeprefix("peft-")], data)
    return lambda model: _ours(model, name, data)


def _ours(model: Any, name: str, data: list[dict[str, Any]]) -> Any:
    import rankworks as rw
    from rankworks.calibrate import needed

    settings = OURS.get(name, {"init": name})
    if name == "loftq":
        return rw.adapt(model, "lora", rank=RANK, alpha=RANK, evidence=rw.quantise(model, rank=RANK), **settings)
    pair = name in OURS or 2 in next(m for m in rw.methods("init") if m.key == name).cls.fills
    delta = "lora" if pair else "lora-xs"
    spec = rw.AdaptSpec.from_flat({"delta": delta, "rank": RANK, "alpha": RANK, **settings})
    evidence = rw.calibrate(model, data, spec, progress=False) if needed(model, spec) else None
    return rw.adapt(model, spec, evidence=evidence)


def _peft(model: Any, start: str, data: list[dict[str, Any]]) -> Any:
    import peft
    import torch

    settings: dict[str, Any] = {}
    if start == "eva":
        settings = {"eva_config": peft.EvaConfig()}
        settings["eva_config"].tau = -1.0  # components may come back with the other sign: 0 is not met by any batch
    if start == "corda":
        settings = {"corda_config": peft.tuners.lora.config.CordaConfig()}
    if start == "lora_ga":
        settings = {"lora_ga_config": peft.LoraGAConfig()}
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=PROJECTIONS,  # its gradient pass does not know "all-linear"
        init_lora_weights=True if start == "true" else start,  # type: ignore[arg-type]
        **settings,
    )
    if start == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        @torch.no_grad()
        def run() -> None:
            for batch in data:  # its hook takes one sequence at a time
                for i in range(len(batch["input_ids"])):
                    model(**{name: tensor[i : i + 1] for name, tensor in batch.items()})

        preprocess_corda(model, config, run_model=run)
    if start == "lora_ga":

        def train_step() -> None:
            for batch in data:
                model(**batch).loss.backward()

        peft.preprocess_loraga(model, config, train_step)
    adapted = peft.get_peft_model(model, config)
    if start == "eva":
        peft.initialize_lora_eva_weights(adapted, data, show_progress_bar=False)
    return adapted


def measure(options: argparse.Namespace) -> None:
    """Measure what was chosen, one initialiser after the other, write each as it comes, and print the result."""
    import common

    chosen = known() if options.inits == "all" else options.inits.split(",")
    if unknown := set(chosen) - set(known()):
        sys.exit(f"unknown initialisers: {', '.join(sorted(unknown))}; there are {', '.join(known())}")
    output = options.output or (common.RESULTS / "inits.json" if options.inits == "all" and options.memory else None)
    result: dict[str, Any] = {
        "benchmark": "inits",
        "environment": common.environment(options.clock),
        "setting": {
            "model": MODEL,
            "dtype": "float32",
            "targets": "every projection",
            "rank": RANK,
            "data": f"{options.batches} batches of {options.batch} x {options.length} tokens, where a start needs some",
            "rounds": options.rounds,
            "patience": options.patience,
        },
        "inits": {},
    }
    if output is not None and output.exists() and options.inits != "all":
        result["inits"] = json.loads(output.read_text())["inits"]
    model, data = base(), batches(options)
    theirs = {key for key in PEFT if key != "corda" or importlib.util.find_spec("attr")}
    for name in chosen:
        for old in (name, f"peft-{name}"):
            result["inits"].pop(old, None)
        both = [name, *([f"peft-{name}"] if name in theirs else [])]
        seconds = alternate(both, model, data, options)
        for each in both:
            rival = f"peft-{name}"
            against = {"peft": seconds[rival]} if each == name and rival in seconds else {}
            row = {**common.summarise(seconds[each], against), "rounds": len(seconds[each])}
            result["inits"][each] = row | (memory_of(each, options) if options.memory else {})
        common.write(result, output)
    common.finish(result, output)


def alternate(
    names: list[str], model: Any, data: list[dict[str, Any]], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Time starts in turns after one round that is not counted, each on a copy of the model of its own.

    Slow ones get fewer rounds, two at least: no round begins when `patience` seconds are over.
    """
    import common

    now, opened = common.CLOCKS[options.clock], time.monotonic()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(options.rounds + 1):
        if round_ > LEAST and time.monotonic() - opened > options.patience:
            break
        for name in names:
            fresh, act = copy.deepcopy(model), start(name, data)
            begun = now()
            act(fresh)
            if round_:
                seconds[name].append(now() - begun)
            del fresh
            gc.collect()
        common.note(f"{names[0]}: {f'round {round_}' if round_ else 'warm-up'}")
    return seconds


def memory_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start one variant in a process of its own, and return what memory that took."""
    import common

    common.note(f"peak memory: {name}")
    arguments = [f"--only-memory-of={name}"]
    arguments += [f"--{key}={getattr(options, key)}" for key in ("batches", "batch", "length", "threads")]
    return common.in_child(__file__, arguments)


def child(options: argparse.Namespace) -> None:
    """Start one variant and print what memory that took."""
    import common

    model, data = base(), batches(options)
    act = start(options.only_memory_of, data)
    before = common.resident_bytes()
    act(model)
    common.finish({"peak_bytes": common.peak_bytes(), "before_start_bytes": before}, None)


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)  # before torch is imported
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(options.threads)
    child(options) if options.only_memory_of else measure(options)


if __name__ == "__main__":
    main()
