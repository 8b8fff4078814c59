"""Statistics of inputs: padding never counts, and sites that read the very same tensor share one."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import rankworks as rw
from rankworks.calibrate import STATISTICS, Masks, Statistic
from rankworks.calibrate.inputs import masks_of, rows_of
from rankworks.core.errors import ConfigError
from rankworks.core.evidence import Need
from rankworks.core.site import Site
from rankworks.core.spec import AdaptSpec
from rankworks.train.batching.batches import Collator, Example
from rankworks.train.calibration import masks_of as masks_of_examples
from tiny import tiny_convnet, tiny_llama, tiny_moe, token_batch

MOMENT = ("input_second_moment",)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def padded(side: str, pad: int = 0) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Three texts of unequal length as a padded batch, and one by one."""
    texts = [token_batch(batch=1, length=n, seed=n)[0] for n in (5, 9, 7)]
    ids, mask = torch.full((3, 9), pad), torch.zeros(3, 9, dtype=torch.long)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(9 - len(text), 9)
        ids[row, where], mask[row, where] = text, 1
    labels = ids.masked_fill(mask == 0, -100)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": places}
    alone = [{"input_ids": text[None], "labels": text[None]} for text in texts]
    return [batch], alone


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_never_counts(side: str) -> None:
    model = tiny_llama()
    batch, alone = padded(side)
    found, wanted = (rw.calibrate(model, data, MOMENT) for data in (batch, alone))
    for name in wanted:
        torch.testing.assert_close(found[name][MOMENT[0]], wanted[name][MOMENT[0]], rtol=1e-4, atol=1e-6)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    model = tiny_llama()
    first, second = (rw.calibrate(model, padded("right", pad)[0], MOMENT) for pad in (0, 7))
    assert all(torch.equal(first[n][MOMENT[0]], second[n][MOMENT[0]]) for n in first)


def test_only_tokens_with_a_label_count_where_that_is_asked() -> None:
    model, ids = tiny_llama(), token_batch(batch=2, length=8)
    labels = ids.clone()
    labels[:, :5] = -100
    need = Need("input_second_moment", {"tokens": "labelled"})
    seen: list[Tensor] = []
    hook = model.get_submodule("model.layers.1.mlp.up_proj").register_forward_hook(
        lambda m, a, o: seen.append(a[0].detach())
    )
    found = rw.calibrate(model, [{"input_ids": ids, "labels": labels}], [need], targets="up_proj")
    hook.remove()
    x = seen[0][:, 5:].flatten(0, 1)
    torch.testing.assert_close(found["model.layers.1.mlp.up_proj"]["input_second_moment"], x.t() @ x / len(x))


def test_masks_are_read_from_a_mapping_and_nothing_else() -> None:
    assert masks_of(torch.ones(2)) == Masks()
    assert masks_of({"attention_mask": torch.ones(1, 1, 2, 2), "labels": torch.ones(2)}) == Masks()
    attended, labelled = masks_of({"attention_mask": torch.tensor([[1, 0]]), "labels": torch.tensor([[-100, 3]])})
    assert attended is not None
    assert labelled is not None
    assert attended.tolist() == [[True, False]]
    assert labelled.tolist() == [[False, True]]


def test_a_mask_fits_its_own_shape_and_its_flattened_form() -> None:
    site = Site("layer", "linear", nn.Linear(3, 2))
    x, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    for given in (x, x.flatten(0, 1)):  # the second: as a router of experts reads it
        rows, samples = rows_of(site, given, mask)
        assert torch.equal(rows, x[mask])
        assert samples.tolist() == [0, 0, 1, 1, 1]
    rows, samples = rows_of(site, x[:, 0], mask)  # a pooled state: one row per text
    assert torch.equal(rows, x[:, 0])
    assert samples.tolist() == [0, 1]
    rows, samples = rows_of(site, x, None)
    assert samples.tolist() == [0] * 4 + [1] * 4


def test_the_loops_batches_bring_their_masks() -> None:
    examples = [Example((5, 6, 7), (-100, 6, 7)), Example((8, 9), (-100, 9))]
    masks = masks_of_examples(examples, Collator(0).batch(examples))
    assert masks.attended is not None
    assert masks.labelled is not None
    assert masks.attended.tolist() == [[True, True, True], [True, True, False]]
    assert masks.labelled.tolist() == [[False, True, True], [False, True, False]]
    classes = [Example((5, 6, 7), label=1), Example((8,), label=0)]
    masks = masks_of_examples(classes, Collator(0).batch(classes))
    assert masks.attended is not None
    assert masks.attended.tolist() == [[True] * 3, [True, False, False]]
    assert masks.labelled is None


def test_samples_are_divided_by_the_size_of_their_largest_number() -> None:
    layer, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 5, 3)
    x[1] = -x[1].abs()
    need = Need("input_second_moment", {"normalise": "sample"})
    found = rw.calibrate(layer, [x[:3], x[3:]], [need], loss=squares)["0"]["input_second_moment"]
    scaled = torch.cat([sample / sample.max().abs() for sample in x])
    torch.testing.assert_close(found, scaled.t() @ scaled / 20)


def test_an_encoder_decoders_masks_are_not_guessed() -> None:
    model = tiny_llama()
    model.config.is_encoder_decoder = True
    batch = [{"input_ids": (ids := token_batch()), "labels": ids}]
    with pytest.raises(ConfigError, match=r"masks=lambda"):
        rw.calibrate(model, batch, MOMENT)
    assert rw.calibrate(model, batch, MOMENT, masks=lambda batch: Masks())


# ---- sharing ----


class Counted(Statistic):
    """Which statistic objects were made and read, how often."""

    reads: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def read(self, x: Tensor, samples: Tensor) -> None:
        Counted.reads.append(id(self))
        self.seen.append(x.clone())

    def result(self) -> Tensor:
        return torch.cat(self.seen)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setitem(STATISTICS, "counted", Counted)
    Counted.reads = []
    return Counted.reads


def test_q_k_v_and_gate_up_share_one_statistic(counted: list[int]) -> None:
    ids = token_batch()
    found = rw.calibrate(tiny_llama(), [{"input_ids": ids, "labels": ids}] * 3, ["counted"])
    assert len(counted) == 3 * 2 * 4  # batches, layers, and q k v | o | gate up | down
    layer = "model.layers.1."
    q, k, o = (found[f"{layer}self_attn.{n}_proj"]["counted"] for n in "qko")
    assert q is k
    assert q.shape == o.shape
    assert not torch.equal(q, o)
    assert found[f"{layer}mlp.gate_proj"]["counted"] is found[f"{layer}mlp.up_proj"]["counted"]


def test_sharing_changes_no_number() -> None:
    model, ids = tiny_llama(), token_batch()
    together = rw.calibrate(model, [{"input_ids": ids, "labels": ids}], MOMENT)
    for name, found in together.items():
        alone = rw.calibrate(model, [{"input_ids": ids, "labels": ids}], MOMENT, targets=[name])
        assert torch.equal(alone[name][MOMENT[0]], found[MOMENT[0]])


class Forked(nn.Module):
    """Two layers that read the same tensor until batch `fork`, whose number stands in x[0, 0], and then not."""

    def __init__(self, fork: int, how: str) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.fork, self.how = fork, how

    def forward(self, x: Tensor) -> Tensor:
        h = x + 0
        first = self.one(h)
        if x[0, 0] < self.fork:
            return first + self.two(h)
        if self.how == "in place":
            return first + self.two(h.mul_(2))
        if self.how == "again":
            return first + self.two(h) + self.two(first)
        return first + self.two(h + 1) if self.how == "other" else first


@pytest.mark.parametrize("how", ["other", "in place", "again", "never"])
@pytest.mark.parametrize("fork", [1, 2])
def test_sites_that_part_in_a_later_batch_are_measured_apart(fork: int, how: str, counted: list[int]) -> None:
    torch.manual_seed(0)
    model, data = Forked(fork, how), [torch.randn(2, 4) for _ in range(3)]
    for number, x in enumerate(data):
        x[0, 0] = number
    together = rw.calibrate(model, data, ["counted"], targets=["one", "two"], loss=squares)
    for name in ("one", "two"):
        alone = rw.calibrate(model, data, ["counted"], targets=[name], loss=squares)
        assert torch.equal(together[name]["counted"], alone[name]["counted"])


@pytest.mark.parametrize("how", ["other", "in place", "again"])
def test_sites_that_part_in_the_first_batch_are_measured_apart(how: str, counted: list[int]) -> None:
    model, x = Forked(0, how), torch.rand(2, 4)
    found = rw.calibrate(model, [x], ["counted"], loss=squares)
    second = {"other": x + 1, "in place": 2 * x, "again": torch.cat([x, model.one(x)])}[how]
    assert torch.equal(found["one"]["counted"], x)
    torch.testing.assert_close(found["two"]["counted"], second)


def test_equal_numbers_in_another_tensor_are_not_shared(counted: list[int]) -> None:
    class Copied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x.clone())

    rw.calibrate(Copied(), [torch.randn(2, 4)], ["counted"], loss=squares)
    assert len(set(counted)) == 2


def test_sites_that_ask_for_different_things_do_not_share() -> None:
    spec = AdaptSpec.from_flat({"delta": "lora", "rank": 2, "init": "eva", "overrides": {"k_proj": {"rank": 3}}})
    ids = token_batch(batch=4)
    found = rw.calibrate(tiny_llama(), [{"input_ids": ids, "labels": ids}], spec)
    q, k, v = (found[f"model.layers.0.self_attn.{n}_proj"]["input_svd.components"] for n in "qkv")
    assert (len(q), len(k)) == (4, 6)
    assert q is v


def test_convolutions_share_an_image_only_where_they_cut_it_alike(counted: list[int]) -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 3, 3, padding=1), nn.Conv1d(2, 3, 3, padding=1)
            self.c = nn.Conv1d(2, 3, 3, padding=2, dilation=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + self.c(x)

    rw.calibrate(Parallel(), [torch.randn(2, 2, 6)], ["counted"], targets=["a", "b", "c"], loss=squares)
    assert len(set(counted)) == 2
    assert len(counted) == 2


def test_where_inputs_are_no_vectors_of_the_layers_own_it_says_so() -> None:
    ids = token_batch()
    with pytest.raises(ConfigError, match="not defined at"):
        rw.calibrate(tiny_moe(), [{"input_ids": ids, "labels": ids}], MOMENT, targets="gate_up_proj")
    with pytest.raises(ConfigError, match="not defined at"):
        rw.calibrate(tiny_convnet(), [torch.randn(2, 3, 16, 16)], MOMENT, targets="grouped", loss=squares)
