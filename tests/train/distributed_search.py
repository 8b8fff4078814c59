"""A search on a tiny model, started by `accelerate launch`; writes the scores to the file given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate import PartialState
from training import make_examples

from rankworks.core.spec import AdaptSpec
from rankworks.train.config import RunConfig
from rankworks.train.processes import leave
from rankworks.train.searching.search import search
from tiny import tiny_llama

SELECT = {"select": "diffora", "every": 1}


def scores() -> dict[str, float]:
    spec = AdaptSpec.from_flat({"delta": "lora", "rank": 4, "targets": ["q_proj", "down_proj"], "select": SELECT})
    config = RunConfig.model_validate({"train": {"steps": 4, "batch_size": 4}, "optim": {"lr": 1e-2}})
    return search(tiny_llama(), make_examples(), spec, config, progress=False).scores


if __name__ == "__main__":
    found = scores()
    state = PartialState()
    Path(f"{sys.argv[1]}.{state.process_index}").write_text(json.dumps(found))
    assert state.num_processes == 2
    leave()
