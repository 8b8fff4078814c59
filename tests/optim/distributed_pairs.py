"""A few steps of an optimizer of pairs on a tiny model, in several processes; writes weights and losses to a file."""

from __future__ import annotations

import sys

from safetensors.torch import save_file
from torch import tensor
from training import adapted, make_loop, weights


def main(path: str, name: str) -> None:
    loop = make_loop(adapted().double(), steps=5, name=name, lr=1e-2)
    history = loop.run()
    if loop.main:
        save_file({**weights(loop.model), "losses": tensor(history.losses)}, path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
