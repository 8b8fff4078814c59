"""Groupwise integers: codes, rounding to the nearest and at random, two codes in a byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankworks.core.codes.groups import Groups, dequantise_groups, group_bytes, quantise_groups, write_groups


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, number by number: codes, and per group the scale and the code of zero."""
    top = 2**bits - 1
    codes, scales, zeros = [], [], []
    flat = x.flatten().tolist()
    for start in range(0, len(flat), group):
        part = flat[start : start + group]
        low, high = min([0.0, *part]), max([0.0, *part])
        scale = max(high - low, 1e-5) / top
        zero = min(max(round(-low / scale), 0), top)
        codes += [min(max(round(w / scale) + zero, 0), top) for w in part]
        scales.append(scale)
        zeros.append(zero)
    return torch.tensor(codes), torch.tensor(scales), torch.tensor(zeros)


@pytest.mark.parametrize(("bits", "group"), [(8, 256), (8, 16), (4, 256), (4, 7)])
def test_the_nearest_codes_are_the_definition(bits: int, group: int) -> None:
    """Also with a last group that is shorter, and with an odd count of 4-bit codes."""
    x = draw(17, 31)
    found = quantise_groups(x, bits, group)
    codes, scales, zeros = by_hand(x, bits, group)
    torch.testing.assert_close(found.scales, scales, rtol=1e-6, atol=0)
    assert torch.equal(found.zeros.long(), zeros)
    spread = zeros.repeat_interleave(group)[: x.numel()]
    values = scales.repeat_interleave(group)[: x.numel()] * (codes - spread)
    torch.testing.assert_close(dequantise_groups(found), values.view_as(x), rtol=1e-5, atol=1e-6)
    held = sum(t.numel() * t.element_size() for t in found.tensors.values())
    assert held == group_bytes(x.numel(), bits, group)
    assert dequantise_groups(found, torch.bfloat16).dtype == torch.bfloat16


def test_zero_is_exact_and_within_every_group() -> None:
    """Groups of numbers of one sign keep them: without zero in the range their code of zero would be cut to 0."""
    x = torch.cat([torch.linspace(5, 6, 16), -torch.linspace(5, 6, 16), torch.zeros(16)]).view(3, 16)
    found = dequantise_groups(quantise_groups(x, 8, 16))
    assert (found - x).abs().max() <= 6 / 255 / 2 + 1e-6
    assert torch.equal(found[2], torch.zeros(16))
    mixed = draw(64)
    mixed[3] = 0.0
    assert dequantise_groups(quantise_groups(mixed, 4, 64))[3] == 0.0


def test_rounding_at_random_is_right_on_average_and_off_by_less_than_a_step() -> None:
    """10,000 draws of 62 numbers between the ends of a group: the deviations of their means are those of a mean."""
    x = draw(64)
    x[0], x[1] = -3.0, 3.0  # the ends, which the rounded code of zero may push beyond the last code
    copies = x.expand(10_000, 64)
    found = quantise_groups(copies, 8, 64, torch.Generator().manual_seed(1))
    scale = float(found.scales[0])
    errors = (dequantise_groups(found) - copies)[:, 2:].double()
    assert errors.abs().max() <= scale * (1 + 1e-4)
    share = (x[2:].double() / scale) % 1
    deviation = scale * (share * (1 - share) / 10_000).sqrt()
    z = errors.mean(0) / deviation.clamp_min(1e-9)
    assert z.abs().max() < 4, "the largest of 62"
    assert z.square().mean().sqrt() < 1.3
    assert (z.abs() < 3).float().mean() > 0.95


def test_small_updates_are_lost_to_the_nearest_and_kept_on_average_at_random() -> None:
    """A change of 0.3 steps with the scale fixed by the ends: nothing, or a step with the probability 0.3."""
    scale = 2 / 255
    grid = scale * torch.arange(-100, 100, 8)
    ends = torch.tensor([-127 * scale, 128 * scale])
    x = torch.cat([ends, grid])
    moved = torch.cat([ends, grid + 0.3 * scale])
    before = quantise_groups(x, 8, len(x))
    assert torch.equal(quantise_groups(moved, 8, len(x)).codes, before.codes)
    many = moved.expand(4000, len(x))
    codes = quantise_groups(many, 8, len(x), torch.Generator().manual_seed(0)).codes.view(4000, -1)
    step = codes[:, 2:].int() - before.codes[2:].int()
    assert set(step.unique().tolist()) == {0, 1}
    assert step.float().mean() == pytest.approx(0.3, abs=4 * (0.21 / step.numel()) ** 0.5)


def test_the_same_generator_gives_the_same_codes() -> None:
    x = draw(300, 1000)  # more than is rounded at one time
    runs = [quantise_groups(x, 8, 256, torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(runs[0].codes, runs[1].codes)
    assert not torch.equal(runs[0].codes, runs[2].codes)


def test_codes_can_be_written_into_memory_that_is_there() -> None:
    x, y = draw(8, 40), draw(8, 40, seed=1)
    for bits in (4, 8):
        found = quantise_groups(x, bits, 64)
        places = [t.data_ptr() for t in found.tensors.values()]
        write_groups(found, y)
        again = quantise_groups(y, bits, 64)
        assert all(torch.equal(a, b) for a, b in zip(found.tensors.values(), again.tensors.values(), strict=True))
        assert places == [t.data_ptr() for t in found.tensors.values()]
        assert isinstance(found, Groups)
