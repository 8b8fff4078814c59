"""Every error a user can cause: one clear paragraph that names the remedy.

The command line prints the message of a `RankworksError` and exits with status 2; anything else is a bug and shows
its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankworksError(Exception):
    """Base of all errors whose cause lies in what the user gave; the message says what to do instead."""


class ConfigError(RankworksError, ValueError):
    """A setting is unknown, out of range, or cannot be combined with another. Lists every problem at once."""


class UnknownNameError(ConfigError):
    """A name (method, model, data set, adapter, key) that does not exist; the message lists near names."""


class TargetError(ConfigError):
    """A target pattern that matches nothing, or a site a method cannot take."""


class StoreError(RankworksError):
    """An adapter folder that is missing, truncated, tampered with, of another format or another version."""


class FingerprintError(StoreError):
    """An adapter that was made for another base model."""


class MergeError(RankworksError):
    """A merge that would be wrong: non-finite values, a tied weight, a holder that cannot be written."""


class ExportError(RankworksError):
    """An adapter that cannot be expressed in the requested format."""


class DataError(RankworksError, ValueError):
    """Training data that is empty, malformed, or at odds with the model (too long, a label outside the classes)."""


class TrainingError(RankworksError):
    """Training stopped: the loss is not finite, the device ran out of memory, a checkpoint does not fit."""


class DivergedError(TrainingError):
    """A loss or its gradient is no longer finite: the steps were too large, or the numbers too coarse."""


class DownloadError(RankworksError):
    """A sample model or data set could not be fetched, or its checksum is wrong."""


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return the known names closest to `name`, best first (may be empty)."""
    known = list(known)
    folded = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), folded, n=limit, cutoff=0.5)
    return [folded[k] for k in close]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` with the nearest names, or the list of all names when none is near."""
    known = sorted(set(known))
    close = nearest(name, known)
    if close:
        return " Did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f" Known: {shown}." if known else ""
