"""One file per optimizer: how gradients become steps. Importing the package registers them all."""

from rankworks.core.discover import import_all

import_all(__name__, __path__)

from rankworks.optim.make import make_optimizer  # noqa: E402 - a name of the package, not of the registry

__all__ = ["make_optimizer"]
