"""A few steps of an optimizer on a whole tiny model in float64, in several processes; writes the weights to a file."""

from __future__ import annotations

import ast
import sys

from safetensors.torch import save_file
from training import make_loop

from rankworks.train.checkpoint import trained_tensors
from tiny import tiny_llama


def main(path: str, name: str, options: str) -> None:
    model = tiny_llama().double().requires_grad_(True)
    loop = make_loop(model, name=name, options=ast.literal_eval(options), steps=5, lr=1e-3)
    loop.run()
    if loop.main:
        save_file({n: t.detach().contiguous() for n, t in trained_tensors(loop.model).items()}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
