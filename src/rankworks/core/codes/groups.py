"""Groupwise asymmetric integers: consecutive numbers of a tensor share a scale and the code of zero.

    scale = max(hi - lo, 1e-5) / (2^bits - 1)      zero = round(-lo / scale)      lo <= 0 <= hi, the group's ends
    nearest      q = clamp(round(x / scale) + zero)
    stochastic   q = clamp(floor(x / scale + u) + zero),   u uniform over the multiples of 2^-16 in [0, 1)
    x^ = scale (q - zero)

Stochastic rounding is right on average, E[x^] = x, and off by less than one step; nearest rounding leaves a number
that moves by less than half a step where it is. The code of zero is itself rounded, so a group's largest number can lie
up to half a step beyond the last code and is then cut to it.

As in the released code of Q-GaLore, but that 0 is always within a group's range: there a group without it has the code
of zero cut to 0, and its numbers beyond 2^bits - 1 steps with it. Scales are float32 and codes of zero bytes, 5 bytes a
group; 4-bit codes lie two in a byte, the earlier one in the low half. The last group may be shorter.
Source: arXiv:2407.08296, section 3 and its released code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 18  # numbers at a time on a CPU, so that the passes over them stay in its caches
SMALLEST = 1e-5  # range of a group


class Groups(NamedTuple):
    """A quantised tensor."""

    codes: Tensor  # (n,) uint8, row-major; (ceil(n / 2),) in 4 bits
    scales: Tensor  # (groups,) float32
    zeros: Tensor  # (groups,) uint8
    bits: int
    group: int
    shape: torch.Size

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What has to be kept, by name."""
        return {"codes": self.codes, "scales": self.scales, "zeros": self.zeros}

    def to(self, device: torch.device) -> Groups:
        """Return the same on a device."""
        return Groups(
            self.codes.to(device), self.scales.to(device), self.zeros.to(device), self.bits, self.group, self.shape
        )


def empty_groups(shape: torch.Size, bits: int, group: int, device: torch.device) -> Groups:
    """Return the memory for a quantised tensor, not filled."""
    n = shape.numel()
    codes = torch.empty(n if bits > 4 else -(-n // 2), dtype=torch.uint8, device=device)
    scales = torch.empty(-(-n // group), dtype=torch.float32, device=device)
    return Groups(codes, scales, torch.empty_like(scales, dtype=torch.uint8), bits, group, shape)


def quantise_groups(x: Tensor, bits: int = 8, group: int = 256, generator: torch.Generator | None = None) -> Groups:
    """Return the codes of a tensor of any shape, in at most 8 bits; with a generator (of its device) stochastic."""
    found = empty_groups(x.shape, bits, group, x.device)
    write_groups(found, x, generator)
    return found


def write_groups(into: Groups, x: Tensor, generator: torch.Generator | None = None) -> None:
    """Quantise a tensor into memory that is there, with new scales; as `quantise_groups`."""
    flat, top = x.detach().reshape(-1), 2**into.bits - 1
    codes = into.codes if into.bits > 4 else torch.empty(len(flat), dtype=torch.uint8, device=x.device)
    for numbers, which, width in _parts(len(flat), into.group, x.device):
        rows = flat[numbers].float().view(-1, width)  # (groups, numbers)
        low, high = rows.amin(1).clamp_(max=0), rows.amax(1).clamp_(min=0)
        scale = (high - low).clamp_(min=SMALLEST).div_(top)
        zero = low.neg_().div_(scale).round_().clamp_(0, top)
        if generator is None:
            rounded = (rows / scale.unsqueeze(1)).round_().add_(zero.unsqueeze(1))
        else:
            rounded = torch.addcmul((zero + 0.5).unsqueeze(1), rows, scale.reciprocal().unsqueeze(1))
            rounded.view(-1).add_(_noise(rounded, generator), alpha=2.0**-16)
            rounded.floor_()
        codes[numbers] = rounded.clamp_(0, top).view(-1).to(torch.uint8)
        into.scales[which], into.zeros[which] = scale, zero.to(torch.uint8)
    if into.bits <= 4:
        into.codes.copy_(_packed(codes))


def dequantise_groups(found: Groups, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the tensor that the codes stand for, computed in float32."""
    n = found.shape.numel()
    codes = found.codes if found.bits > 4 else _unpacked(found.codes, n)
    flat = torch.empty(n, dtype=dtype, device=codes.device)
    for numbers, which, width in _parts(n, found.group, codes.device):
        rows = codes[numbers].view(-1, width).float()
        rows.sub_(found.zeros[which].float().unsqueeze(1)).mul_(found.scales[which].unsqueeze(1))
        flat[numbers] = rows.view(-1)
    return flat.view(found.shape)


def group_bytes(numbers: int, bits: int, group: int = 256) -> int:
    """Return the bytes of so many numbers: their codes, and 5 bytes a group."""
    return (numbers if bits > 4 else -(-numbers // 2)) + 5 * -(-numbers // group)


def _parts(n: int, group: int, device: torch.device) -> Iterator[tuple[slice, slice, int]]:
    """Yield ranges of numbers, the groups they are, and how long these are: whole groups first, then a shorter one."""
    whole = n // group * group
    step = max(1, (CHUNK if device.type == "cpu" else max(n, 1)) // group) * group
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        yield slice(start, stop), slice(start // group, stop // group), group
    if whole < n:
        yield slice(whole, n), slice(whole // group, whole // group + 1), n - whole


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform integers from -2^15 to 2^15 - 1, one per number of `like`, four from each draw of 64 bits."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    return words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()]


def _packed(codes: Tensor) -> Tensor:
    """Two codes below 16 in a byte: (n,) -> (ceil(n / 2),)."""
    if len(codes) % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[0::2] | (codes[1::2] << 4)


def _unpacked(packed: Tensor, n: int) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=1).view(-1)[:n]
