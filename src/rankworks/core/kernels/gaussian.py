"""Matrices of independent Gaussians whose means and spreads are given by factors, without any matrix of their size.

    mean = B A      spread = c exp(D C)  (form "log"),  or max(D C + c, 1e-6)  (form "additive")       B, D (out, r)

What is asked of them is a sum over entries, or a product with a sample, mean + spread * eps; both go row block by row
block, so that whatever has the size of a block is all there is at a time, in the backward pass too:

    noise_linear       y = x (spread * eps)^T;      dL/dS = dL/dN * N  for N = spread * eps, S = D C  ("log")
    divergence         sum of log(st/sp) + (sp^2 + M^2)/(2 st^2) - 1/2,   M the difference of the means
                       = sum of (e^{2R} - 1 - 2R)/2 + (M/st)^2/2,         R = log(sp/st): no cancellation where sp = st
                       d/dM = M/st^2,  d/dlog sp = e^{2R} - 1,  d/dlog st = -(e^{2R} - 1) - (M/st)^2
    log_prior          sum of -(mean/w)^2/2 + (a - 1) log t - b t,        t = (c/spread)^2

eps is drawn on the input's own device from a seed, one generator for a matrix, and drawn again in the backward pass.
Everything is computed in float32 or wider. Sums are of the entries' terms in the order of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rankworks.core.kernels.mode import compute_dtype, no_autocast, sees_through

Form = Literal["log", "additive"]
LEAST = 1e-6  # of an additive spread
BLOCK = 1 << 20  # entries of a block


class Spread(NamedTuple):
    """Factors of a spread: D (out, r), C (r, in), the spread c where D C is zero, and what they mean."""

    D: Tensor
    C: Tensor
    c: Tensor | float
    form: Form

    def of(self, S: Tensor) -> Tensor:
        """The spread of S = D C."""
        return self.c * S.exp() if self.form == "log" else (S + self.c).clamp_min(LEAST)

    def by_log(self, spread: Tensor) -> Tensor:
        """d log(spread) / dS."""
        return torch.ones_like(spread) if self.form == "log" else (spread > LEAST).to(spread.dtype) / spread


class Gaussian(NamedTuple):
    """Factors of means, B (out, r) and A (r, in), and of spreads."""

    B: Tensor
    A: Tensor
    spread: Spread


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _blocks(out: int, in_: int) -> Iterator[slice]:
    rows = max(1, BLOCK // max(in_, 1))
    for start in range(0, out, rows):
        yield slice(start, min(start + rows, out))


# ---- samples -----------------------------------------------------------------------------------------------------


def noise_matrix(spread: Spread, seed: int) -> Tensor:
    """Return spread * eps (out, in) as plain operations; the eps of `noise_linear` for the same seed."""
    D, C = _wide(spread.D), _wide(spread.C)
    generator = torch.Generator(D.device).manual_seed(seed)
    parts = [spread.of(D[rows] @ C) * _eps(rows, C, generator) for rows in _blocks(len(D), C.shape[1])]
    return torch.cat(parts)


def _eps(rows: slice, C: Tensor, generator: torch.Generator) -> Tensor:
    shape = (rows.stop - rows.start, C.shape[1])
    return torch.randn(shape, generator=generator, device=C.device, dtype=C.dtype)


def noise_linear(x: Tensor, spread: Spread, seed: int) -> Tensor:
    """Return x (spread * eps)^T: (..., in) -> (..., out)."""
    cast = x.to(compute_dtype(x))
    with no_autocast(x):
        if sees_through():
            return torch.nn.functional.linear(cast, noise_matrix(spread, seed).to(cast.dtype))
        return _Noise.apply(cast, spread.D, spread.C, spread.c, spread.form, seed)  # type: ignore[return-value]


class _Noise(torch.autograd.Function):
    """x (..., in), D (out, r), C (r, in), c, form, seed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, D: Tensor, C: Tensor, c: Tensor | float, form: Form, seed: int) -> Tensor:
        ctx.save_for_backward(x, D, C)
        ctx.rest = c, form, seed
        y = x.new_empty(*x.shape[:-1], len(D))
        for rows, noise, _, _ in _noises(D, C, *ctx.rest):
            y[..., rows] = x @ noise.to(x.dtype).t()
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients  # (..., out)
        x, D, C = ctx.saved_tensors
        of_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        of_D, of_C = torch.empty_like(_wide(D)), torch.zeros_like(_wide(C))
        flat = x.reshape(-1, x.shape[-1])
        with no_autocast(x):
            for rows, noise, eps, spread in _noises(D, C, *ctx.rest):
                mine = g[..., rows]
                if of_x is not None:
                    of_x += mine @ noise.to(x.dtype)
                if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                    of_S = (mine.reshape(-1, mine.shape[-1]).t() @ flat).to(noise.dtype)  # of the noise, then of S
                    of_S.mul_(noise if ctx.rest[1] == "log" else eps.mul_(spread > LEAST))
                    of_D[rows] = of_S @ _wide(C).t()
                    of_C.addmm_(_wide(D[rows]).t(), of_S)
        return of_x, of_D.to(D.dtype), of_C.to(C.dtype), None, None, None


def _noises(
    D: Tensor, C: Tensor, c: Tensor | float, form: Form, seed: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Every block's rows, noise, eps and spread; in the form "log" the last two have become the noise."""
    wide, law = _wide(C), Spread(D, C, c, form)
    generator = torch.Generator(D.device).manual_seed(seed)
    for rows in _blocks(len(D), C.shape[1]):
        spread, eps = law.of(_wide(D[rows]) @ wide), _eps(rows, wide, generator)
        noise = spread.mul_(eps) if form == "log" else spread * eps
        yield rows, noise, eps, spread


# ---- sums --------------------------------------------------------------------------------------------------------

Term = Callable[[Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]


def divergence(phi: Gaussian, theta: Gaussian) -> Tensor:
    """Return KL(phi || theta), a scalar in float32 or wider. One law for both spreads: their c and form are equal."""
    law = phi.spread

    def term(fields: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        M, Sp, St = fields  # differences of means, and what the spreads are made of
        sp, st = law.of(Sp), law.of(St)
        R = Sp - St if law.form == "log" else ((sp - st) / st).log1p()
        bent, far = (2 * R).expm1(), (M / st).square()
        value = ((bent - 2 * R).clamp_min(0) + far).sum() / 2
        return value, (M / st.square(), bent * law.by_log(sp), -(bent + far) * law.by_log(st))

    # One product for the difference, of differences, so that it keeps its digits and is zero where there is none.
    (B, A), (B0, A0) = ((_wide(p.B), _wide(p.A)) for p in (phi, theta))
    means = (torch.cat([B - B0, B0], dim=1), torch.cat([A, A - A0]))
    return _sum([means, phi.spread[:2], theta.spread[:2]], term)


class HyperPrior(NamedTuple):
    """N(0, width^2) of means and Gamma(concentration, rate) of the precisions (unit/spread)^2, entry by entry."""

    width: Tensor | float
    unit: Tensor | float
    concentration: float = 1.0
    rate: float = 0.01


def log_prior(theta: Gaussian, prior: HyperPrior) -> Tensor:
    """Return log p(theta) without its constants, a scalar in float32 or wider."""
    law = theta.spread
    more = prior.concentration - 1

    def term(fields: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        M, S = fields
        st = law.of(S)
        precision = (prior.unit / st).square()
        value = -M.square().sum() / (2 * prior.width**2) + (more * precision.log() - prior.rate * precision).sum()
        return value, (-M / prior.width**2, 2 * (prior.rate * precision - more) * law.by_log(st))

    return _sum([(theta.B, theta.A), theta.spread[:2]], term)


def _sum(pairs: Sequence[tuple[Tensor, ...]], term: Term) -> Tensor:
    return _Sum.apply(term, *(tensor for pair in pairs for tensor in pair))  # type: ignore[return-value]


class _Sum(torch.autograd.Function):
    """A sum over entries of products L_i R_i, given term(products) -> (value, gradients by the products).

    The gradients by the factors are made in the forward pass, which has the products, and multiplied in the backward
    pass by what flows in.
    """

    @staticmethod
    def forward(ctx: Any, term: Term, *factors: Tensor) -> Tensor:
        lefts, rights = [_wide(t) for t in factors[::2]], [_wide(t) for t in factors[1::2]]
        wanted = any(ctx.needs_input_grad)
        of_left, of_right = ([torch.zeros_like(t) for t in side] if wanted else [] for side in (lefts, rights))
        total = lefts[0].new_zeros(())
        for rows in _blocks(len(lefts[0]), rights[0].shape[1]):
            value, slopes = term([left[rows] @ right for left, right in zip(lefts, rights, strict=True)])
            total += value
            if wanted:
                for i, slope in enumerate(slopes):
                    of_left[i][rows] = slope @ rights[i].t()
                    of_right[i].addmm_(lefts[i][rows].t(), slope)
        ctx.found = [g for pair in zip(of_left, of_right, strict=True) for g in pair]
        ctx.kinds = [t.dtype for t in factors]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = upstream
        return None, *((each * g).to(kind) for each, kind in zip(ctx.found, ctx.kinds, strict=True))
