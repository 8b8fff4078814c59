"""Initialisers that each break one promise, and the good one they were made from."""

from __future__ import annotations

from typing import ClassVar

import torch

from rankworks.core.start import Init, Place, Start


class GoodStart(Init):
    """A random start of B, zero A."""

    def start(self, place: Place) -> Start:
        out, in_ = place.weight.shape
        return Start(A=place.weight.new_zeros(place.rank, in_), B=place.draw.normal(out, place.rank, std=0.3))


class StartsElsewhere(GoodStart):  # output_is_unchanged_at_the_start
    def start(self, place: Place) -> Start:
        good = super().start(place)
        return Start(A=good.A + 1e-3, B=good.B)


class StartsNowhere(GoodStart):  # start_is_finite_and_used, gradients_reach_every_tensor, training
    def start(self, place: Place) -> Start:
        good = super().start(place)
        return Start(A=good.A, B=torch.zeros_like(good.B))


class StartsInfinite(GoodStart):  # start_fits_every_shape: it divides by a singular value, which may be zero
    def start(self, place: Place) -> Start:
        good = super().start(place)
        values = torch.linalg.svdvals(place.weight)
        spread = (values[0] / values[-1]).log() if values[-1] > 1e-9 * values[0] else values[0] / 0
        return Start(A=good.A, B=good.B * spread)


class StartsUnseeded(GoodStart):  # seed_alone_decides, global_random_state_is_untouched
    def start(self, place: Place) -> Start:
        good = super().start(place)
        return Start(A=good.A, B=torch.randn(good.B.shape).to(good.B))


class StartsTallOnly(GoodStart):  # every check with a wide layer: it builds factors of the wrong size
    def start(self, place: Place) -> Start:
        good = super().start(place)
        return Start(A=good.A[:, : place.weight.shape[0]], B=good.B)


class ClaimsToIgnoreAlpha(GoodStart):  # start_product_ignores_alpha_where_claimed
    from_base: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    def start(self, place: Place) -> Start:
        good = super().start(place)
        return Start(A=place.weight[: place.rank] * 1.0, B=good.B, from_base=True)
