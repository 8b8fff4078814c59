"""Pretraining a small LLaMA from nothing: what each optimizer reaches in a few hundred steps, and what it keeps.

    python benchmarks/pretrain.py                            # all optimizers, three seeds: about two hours on two cores
    python benchmarks/pretrain.py --only adamw,galore --steps 100

A LLaMA of 6 layers and width 256 (4.7 million numbers in its linear layers) reads the Python standard library byte by
byte, 8 rows of 256 bytes a step. Every optimizer runs at each rate of one grid with the first seed, and over all seeds
at its best; weights are float32, products bfloat16 (autocast). Projections have a quarter of the width, as in the
literature, and are found anew every 50 steps. The loss is that of modules nobody trained on, in nats per byte. Finished
runs are kept (convergence.py), so the command can be stopped and given again. Nothing here measures time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import convergence

WIDTH, LAYERS, CONTEXT, HELD_OUT_MODULES = 256, 6, 256, 40
RANK, REFRESH = WIDTH // 4, 50

CONTENDERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "galore": {"optimizer": "galore", "rank": RANK, "refresh": REFRESH},
    "fira": {"optimizer": "fira", "rank": RANK, "refresh": REFRESH},
    "apollo": {"optimizer": "apollo", "rank": RANK, "refresh": REFRESH},
    "frugal": {"optimizer": "frugal", "density": 0.25, "refresh": REFRESH},
    "dct-adamw": {"optimizer": "dct-adamw", "rank": RANK},
    "trion": {"optimizer": "trion", "rank": RANK},
}
"""Optimizers by name."""


@dataclass
class Text:
    """Rows of bytes to learn from, and rows of other modules to be measured by."""

    train: list[Any]
    held_out: list[Any]


class Pretraining(convergence.Bench):
    """A cell is a new model, its weights and the order of the text from the seed."""

    model = f"llama of {LAYERS} layers, width {WIDTH}"

    def _train(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        from torch import Tensor

        from rankworks.core.errors import TrainingError
        from rankworks.train.config import OptimConfig, TrainConfig
        from rankworks.train.evaluate import mean_loss
        from rankworks.train.loop import Loop

        model, text, setting = network(seed), self._load(), self.setting
        options = dict(self.contenders[name])
        optim = OptimConfig(name=options.pop("optimizer"), lr=rate, schedule="cosine", warmup=0.1, options=options)
        train = TrainConfig(
            steps=setting.steps,
            batch_size=setting.batch,
            seed=seed,
            precision="bf16",
            eval_every=setting.every,
            packing=False,
        )
        measure = lambda: mean_loss(model, text.held_out, pad=0, batch_tokens=16 * CONTEXT)  # noqa: E731
        start = measure()["loss"]
        loop = Loop(model, text.train, train, optim, evaluate=measure, progress=False)
        try:
            loop.run()
            end = measure()["loss"]
        except TrainingError:  # it diverged
            end = convergence.DIVERGED
        state = [v for kept in loop.optimizer.state.values() for k, v in kept.items() if k != "step"]
        return {
            "start": start,
            "valid": [[v["step"], v["loss"]] for v in loop.history.valid],
            "end": end,
            "trained": sum(p.numel() for p in model.parameters()),
            "state_bytes": sum(v.numel() * v.element_size() for v in state if isinstance(v, Tensor)),
        }

    def _load(self) -> Text:
        if self._loaded is None:
            self._loaded = text(self.setting.held_out)
        return self._loaded


def network(seed: int) -> Any:
    """Return the model with new weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def text(held_out: int) -> Text:
    """Return rows of bytes: modules joined by a zero byte and cut; every tenth of the first modules is held out."""
    from rankworks.train.batches import Example
    from rankworks.train.sources import load_task

    task = load_task({"name": "python-stdlib"})
    modules = [record["text"].encode() for record in task.train]
    others = modules[::10][:HELD_OUT_MODULES]
    kept = [m for i, m in enumerate(modules) if i % 10 or i >= 10 * HELD_OUT_MODULES]

    def rows(texts: list[bytes]) -> list[Any]:
        joined = b"\0".join(texts)
        cut = [tuple(joined[i : i + CONTEXT]) for i in range(0, len(joined) - CONTEXT, CONTEXT)]
        return [Example(row, row) for row in cut]

    measured = rows(others)
    return Text(rows(kept), measured[:: max(1, len(measured) // held_out)][:held_out])


if __name__ == "__main__":
    setting = convergence.Setting(steps=300, batch=8, every=50, held_out=64, rates=(1e-3, 3e-3, 1e-2, 3e-2))
    says = "Pretraining a small LLaMA with every optimizer."
    convergence.command("pretrain", says, CONTENDERS, "adamw", setting, ["stdlib"], Pretraining)
