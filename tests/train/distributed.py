"""A few steps on a tiny model, started by `accelerate launch`; writes weights and losses to the file given."""

from __future__ import annotations

import sys

from safetensors.torch import save_file
from torch import tensor
from training import make_loop, weights

from rankworks.train.processes import leave


def main(path: str, accumulate: int, layerwise: bool) -> None:
    loop = make_loop(steps=5, batch_size=8 // accumulate, accumulate=accumulate, layerwise=layerwise)
    history = loop.run()
    if loop.main:
        save_file({**weights(loop.model), "losses": tensor(history.losses), "world": tensor(loop.world)}, path)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["layerwise"])
    leave()
