"""The checks, by what they look at. Importing the package gathers them, in the order a report shows them."""

from rankworks.conformance.suite import (  # noqa: I001 - the order is the report's
    settings,
    start,
    change,
    initialiser,
    weights,
    files,
    exporting,
    gradients,
    training,
    schedule,
    optimizer,
    models,
    several,
)

__all__ = [
    "change",
    "exporting",
    "files",
    "gradients",
    "initialiser",
    "models",
    "optimizer",
    "schedule",
    "settings",
    "several",
    "start",
    "training",
    "weights",
]
