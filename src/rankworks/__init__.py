"""rankworks: one workbench for low-rank adaptation. `import rankworks as rw`."""

import importlib as _importlib
from typing import TYPE_CHECKING
from typing import Any as _Any

from rankworks import deltas as _deltas  # noqa: F401 - registers the methods
from rankworks import export as _export  # noqa: F401 - registers the reader of PEFT's folders
from rankworks import inits as _inits  # noqa: F401 - registers the initialisers
from rankworks import ranks as _ranks  # noqa: F401 - registers the rank schedules
from rankworks import select as _select  # noqa: F401 - registers the selections
from rankworks.compress.squeeze import squeeze
from rankworks.core import reproducible as _reproducible  # noqa: F401 - asks for equal bits before the first product
from rankworks.core.adapt import activate, active, adapt, adapters, detach, disabled
from rankworks.core.errors import RankworksError
from rankworks.core.forms.sparse import interference, sparse_entries
from rankworks.core.ghost import ghost_batch_norm
from rankworks.core.merge import is_merged, merge, unmerge
from rankworks.core.ranks.nested import set_rank
from rankworks.core.ranks.surgery import compact
from rankworks.core.rates import Regime, adapted_regime
from rankworks.core.registry import delta, init, methods
from rankworks.core.spec import AdaptSpec
from rankworks.core.store import load, save
from rankworks.core.summary import delta_weights, get_delta, summary, trainable_parameters
from rankworks.core.switch import switch
from rankworks.core.version import __version__ as __version__
from rankworks.optim import make_optimizer
from rankworks.optim.bo_rep import Bilevel
from rankworks.select.layra import model_arithmetic

if TYPE_CHECKING:
    from rankworks.calibrate.api import calibrate
    from rankworks.compare.api import compare
    from rankworks.core.hub import load_model
    from rankworks.export.api import export
    from rankworks.plan.make import plan
    from rankworks.quantize.api import quantise
    from rankworks.train.api import train
    from rankworks.train.meta import MetaLearner
    from rankworks.train.stream import Stream

# What needs transformers, datasets or accelerate is imported when it is first used: these take seconds.
_LATER = {
    "MetaLearner": "rankworks.train.meta",
    "Stream": "rankworks.train.stream",
    "load_model": "rankworks.core.hub",
    "quantise": "rankworks.quantize",
}
_VERBS = ("train", "plan", "export", "calibrate", "compare")  # packages that are called: rw.train(...), ...

__all__ = [
    "AdaptSpec",
    "Bilevel",
    "MetaLearner",
    "RankworksError",
    "Regime",
    "Stream",
    "activate",
    "active",
    "adapt",
    "adapted_regime",
    "adapters",
    "calibrate",
    "compact",
    "compare",
    "delta",
    "delta_weights",
    "detach",
    "disabled",
    "export",
    "get_delta",
    "ghost_batch_norm",
    "init",
    "interference",
    "is_merged",
    "load",
    "load_model",
    "make_optimizer",
    "merge",
    "methods",
    "model_arithmetic",
    "plan",
    "quantise",
    "save",
    "set_rank",
    "sparse_entries",
    "squeeze",
    "summary",
    "switch",
    "train",
    "trainable_parameters",
    "unmerge",
]


def __getattr__(name: str) -> _Any:
    """Import what is imported late, and give the spec of any method by its class name: `rw.LoRA(rank=16)`."""
    if name in _LATER:
        return getattr(_importlib.import_module(_LATER[name]), name)
    if name in _VERBS:
        return _importlib.import_module(f"rankworks.{name}")
    for method in methods():
        if method.cls.__name__ == name:
            return method.Spec
    raise AttributeError(f"module 'rankworks' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names for completion: the verbs and the specs."""
    return sorted([*__all__, *(m.cls.__name__ for m in methods())])
