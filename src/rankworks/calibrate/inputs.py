"""What layers read, token by token: which tokens count, and which sites read the very same tensor.

A mask goes with an input whose leading sizes are the mask's, (rows, width, in), or their product, (rows * width, in).
Any other input counts whole: what a pooled head reads, images, or states that the loss has already picked.

Sites whose layers are called with one and the same tensor object, unchanged in between, read it once: the first leads,
the others follow and take its statistic. Who follows is seen in a site's first batch and checked at every use in every
batch; where a follower is found to read something else after all, `ApartError` says so and the pass begins again, with
that site alone.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankworks.calibrate.statistic import Statistic
from rankworks.core.evidence import Need
from rankworks.core.inputs import Patches
from rankworks.core.site import Site

IGNORE = -100  # the label of a token that is not learned


class Masks(NamedTuple):
    """Which tokens of a batch count, (rows, width) each, true where they do; None: all."""

    attended: Tensor | None = None
    labelled: Tensor | None = None


def masks_of(batch: Any) -> Masks:
    """Return the masks of a mapping batch: its `attention_mask` and, where `labels` are per token, those that count."""
    if not isinstance(batch, Mapping):
        return Masks()
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    attended = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return Masks(attended)
    return Masks(attended, labels != IGNORE)


def chosen(masks: Masks, tokens: str) -> Tensor | None:
    """Return the mask for a statistic that asks for these tokens, or None where all count."""
    attended, labelled = masks
    if tokens == "attended" or labelled is None:
        return attended
    return labelled if attended is None or attended.shape != labelled.shape else attended & labelled.to(attended.device)


def rows_of(site: Site, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what the site's weight multiplies at the tokens that count, (n, in), and each one's sample, (n,)."""
    tokens = Patches(x, site.module).tokens() if site.kind == "conv" else x  # (..., in)
    flat, lead = tokens.flatten(0, -2) if tokens.dim() > 1 else tokens.unsqueeze(0), tokens.shape[:-1]
    fits = mask is not None and (lead == mask.shape or (len(lead) == 1 and lead[0] == mask.numel()))
    if len(lead) == 1 and not fits:
        return flat, torch.arange(len(flat), device=x.device)  # each a sample
    samples = len(mask) if fits and mask is not None else lead[0] if lead else 1
    sample = torch.arange(samples, device=x.device).repeat_interleave(len(flat) // max(1, samples))
    if not fits or mask is None or bool(mask.all()):
        return flat, sample
    keep = mask.flatten().to(x.device)
    return flat[keep], sample[keep]


class ApartError(Exception):
    """A site that followed another reads something else."""

    def __init__(self, site: str):
        super().__init__(site)
        self.site = site


Kept = dict[str, dict[str, Statistic]]
Use = tuple[int, Any]  # a tensor of the batch by number, and how it is cut up


class Reader:
    """Hands inputs to the statistics of every site, each tensor once."""

    def __init__(self, kept: Kept, needs: Mapping[str, Sequence[Need]], alone: set[str]):
        self.kept, self.alone = kept, alone
        self.reading = {
            site: {n.name: n for n in wanted if type(kept[site][n.name]).read is not Statistic.read}
            for site, wanted in needs.items()
        }
        self.leader: dict[tuple[str, str], str] = {}  # (site, statistic) -> the site it follows
        self.known: set[str] = set()  # sites that earlier batches have used
        self.numbers = itertools.count()
        self.begin(Masks())

    def begin(self, masks: Masks) -> None:
        """Start a batch."""
        self.masks = masks
        self.tensors: dict[int, tuple[Any, int, int]] = {}  # id -> (weak reference, version, number)
        self.uses: dict[str, list[Use]] = {}
        self.first: dict[tuple[Any, ...], str] = {}  # what was read, and for which statistic -> the site that leads

    @torch.no_grad()
    def read(self, site: Site, x: Tensor) -> None:
        """Take the input of one use of a site's layer. Raises `ApartError`."""
        reading = self.reading[site.name]
        if all(self.kept[site.name][name].idle for name in reading):
            return
        uses = self.uses.setdefault(site.name, [])
        uses.append(self._use(site, x))
        for name, need in reading.items():
            leader = self._leader(site.name, name, need, uses)
            statistic = self.kept[site.name][name]
            if statistic.idle:
                continue
            if leader is None:
                statistic.read(*rows_of(site, x, chosen(self.masks, statistic.tokens)))
            elif self.uses.get(leader, [])[: len(uses)] != uses:
                raise ApartError(site.name)

    def end(self) -> None:
        """Finish a batch. Raises `ApartError`."""
        for (site, name), leader in self.leader.items():
            idle = self.kept[site][name].idle
            if not idle and len(self.uses.get(site, ())) != len(self.uses.get(leader, ())):
                raise ApartError(site)
        self.known |= set(self.uses)

    def _leader(self, site: str, name: str, need: Need, uses: list[Use]) -> str | None:
        """Return the site that this one follows in a statistic, deciding it at its first use."""
        if site not in self.known and len(uses) == 1 and site not in self.alone:
            key = (uses[0], name, repr(sorted(need.options.items())))
            found = self.first.setdefault(key, site)
            if found != site:
                self.leader[site, name] = found
                self.kept[site][name] = self.kept[found][name]
        return self.leader.get((site, name))

    def _use(self, site: Site, x: Tensor) -> Use:
        """Return a name for what is read: the tensor object in its present version, and a convolution's windows."""
        held = self.tensors.get(id(x))
        version = -1 if x.is_inference() else x._version
        if held is None or held[0]() is not x or held[1] != version or version < 0:
            held = self.tensors[id(x)] = (weakref.ref(x), version, next(self.numbers))
        layer = site.module
        if site.kind != "conv":
            return held[2], None
        return held[2], (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
