"""EPT: a short prompt in front of the model, enriched by the low-rank matrices that shift the input embeddings.

    model input = [P_out ; E + c A B],   c = alpha / sqrt(r)        P (m, d),  A (n, r),  B (r, d) = 0
    P_f = P + softmax(P W_q (A B W_k)^T / sqrt(d_k)) A B W_v        prompt fusion;  W_v = U_v D_v, of rank d_k
    P_out = P_f + sum_k g_k phi_k(P_f)                              K spaces;  phi_k(x) = gelu(x S_k) T_k,  T_k = 0
    g = softmax(W_g mean(P_f)),  W_g = 0                            the gate, uniform at the start

The base is decomposed prompt tuning (DePT, arXiv:2309.05173), with fusion=False and spaces=0: a prompt of length l is
split into one of m < l tokens and a low-rank shift; r = (l - m) d / (n + d) costs what the long prompt did. The paper
confirms the parts and their order and gives no sizes or code. Choices: one head and d_k = 64; keys and values are the
rows of A B, never formed (A (B W)); the spaces are d -> 64 -> d with a last layer of zeros, kept beside a residual, so
that the model starts as the decomposed prompt; P starts at words of the vocabulary, drawn by the seed. `tie_spaces`
shares the T_k (with one S for all, spaces that start equal would stay equal). Fusion, spaces and gate need a prompt:
with m = 0 only the embeddings are shifted.

Row t of A B shifts position t of the text, and positions from n on are not shifted. Nothing can be merged; since P_out
and c A B do not depend on the input, `cached` gives them as two constants. DePT's code trains P at 0.3 or 0.4 and A, B
at 5e-4 to 3e-1: `shift_rate` is the factor between the two (the released 0.3 and 5e-3 are lr=0.3, shift_rate=1/60).
Source: arXiv:2405.11464; ZhengxiangShi/DePT for the base.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rankworks.core.delta import Delta
from rankworks.core.fields import Positive, Rank, Setting
from rankworks.core.registry import delta
from rankworks.core.site import Shape


@delta("ept", title="Efficient Prompt Tuning", year=2024, paper="arXiv:2405.11464")
class EPT(Delta):
    """A prompt and a low-rank shift of the input embeddings."""

    weightless: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    unchanged_at_init: ClassVar[bool] = False  # a prompt of real words changes the output
    kinds: ClassVar[tuple[str, ...]] = ("front",)

    rank: int = Rank(45, "rank r of the shift A B")
    prompt_length: int = Setting(40, "tokens m of the prompt; 0 leaves the shift alone", ge=0)
    max_length: int = Setting(256, "positions n that are shifted", ge=1)
    alpha: float = Positive(8.0, "numerator of the scale c = alpha / sqrt(rank)")
    fusion: bool = Setting(True, "let the prompt attend to the shift")
    spaces: int = Setting(4, "projections K of the prompt; 0 for none", ge=0)
    width: int = Setting(64, "d_k of the fusion and inner width of the spaces", ge=1)
    tie_spaces: bool = Setting(False, "share the spaces' last layers")

    shift_rate: float = Positive(1.0, "learning rate of A and B, as a factor on that of the prompt")

    def setup(self, weight: Tensor) -> None:
        """P from the vocabulary (columns of the weight), A random, B = 0; the parts of fusion and spaces."""
        d, m, r, n, w = self.shape.out, self.prompt_length, self.rank, self.max_length, self.width
        self.P = self.trainable(m, d)
        self.A, self.B = self.trainable(n, r, bound=r**-0.5), self.trainable(r, d)
        if m:
            words = torch.arange(m) % self.shape.in_
            picked = self.draw.choice(self.shape.in_, min(m, self.shape.in_))
            with torch.no_grad():
                self.P.copy_(weight[:, picked[words.to(picked.device) % len(picked)]].t())
        if m and self.fusion:
            self.W_q, self.W_k = self.trainable(d, w, bound=d**-0.5), self.trainable(d, w, bound=d**-0.5)
            self.U_v, self.D_v = self.trainable(d, w, bound=d**-0.5), self.trainable(w, d, bound=w**-0.5)
        if m and self.spaces:
            self.S = self.trainable(self.spaces, d, w, bound=d**-0.5)
            self.T = self.trainable(1 if self.tie_spaces else self.spaces, w, d)
            self.W_g = self.trainable(self.spaces, d)

    def rates(self) -> dict[str, float]:
        """A and B at their own."""
        return {"A": self.shift_rate, "B": self.shift_rate}

    @property
    def scale(self) -> float:
        """c."""
        return self.alpha / self.rank**0.5

    @property
    def length(self) -> int:
        """m."""
        return self.prompt_length

    def fused_prompt(self) -> Tensor:
        """P_f (m, d)."""
        if not (self.length and self.fusion):
            return self.P
        keys = self.A @ (self.B @ self.W_k)  # (n, d_k)
        weights = ((self.P @ self.W_q) @ keys.t() / self.width**0.5).softmax(dim=-1)  # (m, n)
        return self.P + ((weights @ self.A) @ (self.B @ self.U_v)) @ self.D_v

    def gate(self, fused: Tensor) -> Tensor:
        """g (K,)."""
        return (self.W_g @ fused.mean(dim=0)).softmax(dim=0)

    def prompt(self) -> Tensor:
        """P_out (m, d)."""
        fused = self.fused_prompt()
        if not (self.length and self.spaces):
            return fused
        projected = F.gelu(fused @ self.S) @ self.T  # (K, m, d)
        return fused + torch.einsum("k,kmd->md", self.gate(fused), projected)

    def shift(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of c A B at `positions` (..., t): (..., t, d); zero from position n on."""
        inside = (positions >= 0) & (positions < self.max_length)
        rows = F.embedding(positions.clamp(0, self.max_length - 1), self.A) * inside.unsqueeze(-1)
        return (rows @ (self.scale * self.B)).to(dtype)

    @torch.no_grad()
    def cached(self) -> dict[str, Tensor]:
        """Return {"prompt": P_out (m, d), "shift": c A B (n, d)}, which is all that inference needs."""
        return {"prompt": self.prompt().clone(), "shift": self.scale * self.A @ self.B}

    @classmethod
    def count(cls, spec: Any, shape: Shape) -> int:
        """m d + r (n + d); fusion adds 4 d d_k, spaces 2 K d w (one T if tied) and the gate K d."""
        d, m, w, K = shape.out, spec.prompt_length, spec.width, spec.spaces
        base = m * d + spec.rank * (spec.max_length + d)
        fusion = 4 * d * w if m and spec.fusion else 0
        return base + fusion + (K * d * w + (1 if spec.tie_spaces else K) * w * d + K * d if m and K else 0)
