"""The store: strict reading, atomic writing, one base and no other, and nothing that could execute."""

from __future__ import annotations

import errno
import json
import os
import pickle
import stat

import pytest
import torch
from adapters import bits, logits, same, shaken

import rankworks as rw
from rankworks.conformance.case import Snapshot
from rankworks.core import files, store
from rankworks.core.errors import (
    ConfigError,
    FingerprintError,
    MergeError,
    RankworksError,
    StoreError,
    UnknownNameError,
)
from rankworks.core.state import state_of
from rankworks.core.store import META, TENSORS, adapter_state, load_adapter_state
from tiny import tiny_bert_classifier, tiny_gpt2, tiny_llama, token_batch

IDS = token_batch()


def adapted(**settings):
    return shaken(rw.adapt(tiny_llama(), **{"delta": "lora", "rank": 2, "targets": ["q_proj", "up_proj"], **settings}))


@pytest.fixture
def saved(tmp_path):
    return rw.save(adapted(), tmp_path / "adapter")


def refuses(folder, error, said, model=None, **options):
    """Loading raises, and the model is as it was."""
    model = model if model is not None else tiny_llama()
    before = Snapshot.of(model)
    with pytest.raises(error, match=said):
        rw.load(model, folder, **options)
    assert before.differences(model) == []


def test_the_folder_holds_two_files_that_anybody_may_read(saved):
    assert sorted(os.listdir(saved)) == [META, TENSORS]
    assert stat.S_IMODE(os.stat(saved).st_mode) == 0o755
    meta = json.loads((saved / META).read_text())
    assert meta["adapt"]["delta"] == "lora"
    assert meta["parameters"] == rw.trainable_parameters(adapted())
    assert set(meta["sites"]) == {f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")}


def test_no_adapter_name_is_in_the_file(tmp_path):
    first = rw.save(adapted(name="first"), tmp_path / "a", "first")
    second = rw.save(adapted(name="second"), tmp_path / "b", "second")
    assert (first / TENSORS).read_bytes() == (second / TENSORS).read_bytes()
    model = rw.load(rw.load(tiny_llama(), first, "x"), second, "y")
    assert rw.adapters(model) == ["x", "y"]
    assert rw.active(model) == ["y"]


def test_everything_of_the_spec_comes_back(tmp_path):
    overrides = {"q_proj@1": {"rank": 5, "alpha": 2.0}}
    model = adapted(
        overrides=overrides, scaling="rslora", seed=3, init="pissa", full=["lm_head"], exclude=["up_proj@0"]
    )
    rw.save(model, tmp_path / "a")
    fresh = rw.load(tiny_llama(), tmp_path / "a")
    assert state_of(fresh).adapter("default").spec == state_of(model).adapter("default").spec
    assert same(adapter_state(fresh), adapter_state(model))
    assert torch.equal(logits(fresh, IDS), logits(model, IDS))
    assert rw.get_delta(fresh, "model.layers.1.self_attn.q_proj").rank == 5
    assert str(rw.summary(fresh)) == str(rw.summary(model))


def test_a_loaded_adapter_can_be_trained_on(saved):
    model = rw.load(tiny_llama(), saved)
    assert rw.trainable_parameters(model) == rw.trainable_parameters(adapted())
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in state_of(model).adapter("default").parameters())


def test_another_base_of_the_same_architecture_is_refused(saved):
    refuses(saved, FingerprintError, "another base model", tiny_llama(seed=1))
    model = rw.load(tiny_llama(seed=1), saved, check_base=False)
    assert rw.adapters(model) == ["default"]


def test_another_shape_of_base_is_refused(saved):
    refuses(saved, FingerprintError, "another base model", tiny_llama(hidden=64))
    refuses(saved, RankworksError, "another base model: there is no site called", tiny_gpt2())
    refuses(saved, RankworksError, "another base model: there is no site called", tiny_llama(layers=1))


def test_a_full_module_the_model_lacks_is_refused(tmp_path):
    rw.save(adapted(full=["lm_head"]), tmp_path / "a")
    headless = tiny_llama()
    headless.get_output_embeddings = lambda: None
    del headless.lm_head
    refuses(tmp_path / "a", RankworksError, "lm_head", headless)
    model = tiny_bert_classifier(num_labels=3)
    rw.save(rw.adapt(model, "lora", rank=2, targets="query", full=["classifier"]), tmp_path / "b")
    refuses(tmp_path / "b", StoreError, "full.classifier", tiny_bert_classifier(num_labels=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_type_is_accepted(saved, dtype):
    model = rw.load(tiny_llama().to(dtype), saved)
    assert torch.allclose(logits(model, IDS).float(), logits(adapted(), IDS), atol=0.1)


def test_an_adapter_trained_on_a_16_bit_base_fits_the_wide_one(tmp_path):
    for delta in ("lora", "dora", "vera", "bone"):
        model = shaken(rw.adapt(tiny_llama().bfloat16(), delta, rank=2))
        rw.save(model, tmp_path / delta)
        wide = rw.load(tiny_llama(), tmp_path / delta)
        assert torch.allclose(logits(wide, IDS), logits(model, IDS).float(), atol=0.2), delta


def test_factors_rebuilt_from_another_rounding_of_the_base_are_noticed(tmp_path):
    # A random matrix has singular values so near each other that rounding turns its singular vectors.
    rw.save(shaken(rw.adapt(tiny_llama().bfloat16(), "lora-xs", rank=2)), tmp_path / "a")
    refuses(tmp_path / "a", StoreError, "rebuilt from the base weight")


def test_a_taken_name_and_a_bad_one(saved):
    model = rw.load(tiny_llama(), saved)
    refuses(saved, ConfigError, "already has an adapter", model)
    refuses(saved, ConfigError, "letters", model, name="a/b")


def test_loading_onto_a_merged_model_is_refused(saved):
    model = rw.merge(adapted())
    refuses(saved, MergeError, "unmerge", model, name="second")
    assert rw.is_merged(model)


# ---- damaged folders ---------------------------------------------------------------------------------------------


def test_a_missing_folder_and_an_empty_one(tmp_path):
    refuses(tmp_path / "nowhere", StoreError, "does not exist")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", StoreError, META)
    file = tmp_path / "file.txt"
    file.write_text("no adapter")
    refuses(file, StoreError, META)


@pytest.mark.parametrize("name", [META, TENSORS])
def test_a_missing_file(saved, name):
    (saved / name).unlink()
    refuses(saved, StoreError, name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "does not say format"),
        ('{"format": "something"}', "does not say format"),
        ('{"format": "rankworks-adapter", "version": 99}', "version 99"),
        ('{"format": "rankworks-adapter", "version": 1}', "damaged"),
        ('{"format": "rankworks-adapter", "version": 1, "adapt": 3, "sites": {}}', ""),
        ('{"format": "rankworks-adapter", "version": 1, "adapt": {"delta": "lora"}, "sites": [1]}', ""),
        ('{"format": "rankworks-adapter", "version": 1, "adapt": {"delta": "lora"}, "sites": {"lm_head": 3}}', ""),
    ],
)
def test_a_broken_description(saved, text, said):
    (saved / META).write_text(text)
    refuses(saved, RankworksError, said)


def _edit(saved, **changes):
    meta = json.loads((saved / META).read_text())
    meta.update(changes)
    (saved / META).write_text(json.dumps(meta))


def test_a_method_that_does_not_exist_here(saved):
    meta = json.loads((saved / META).read_text())
    _edit(saved, adapt={**meta["adapt"], "delta": "lora-of-tomorrow"})
    refuses(saved, UnknownNameError, "lora-of-tomorrow")


def test_a_setting_that_does_not_exist_here(saved):
    meta = json.loads((saved / META).read_text())
    _edit(saved, adapt={**meta["adapt"], "tomorrow": 1})
    refuses(saved, ConfigError, "tomorrow")


def test_a_description_too_large_to_be_one(saved, monkeypatch):
    monkeypatch.setattr(store, "META_LIMIT", 10)
    refuses(saved, StoreError, "bytes")


def test_another_checksum_and_a_truncated_file(saved):
    whole = (saved / TENSORS).read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 9, 4, 0):
        (saved / TENSORS).write_bytes(whole[:cut])
        refuses(saved, StoreError, "adapter.safetensors")
    (saved / TENSORS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refuses(saved, StoreError, "checksum")
    (saved / TENSORS).write_bytes(b"\xff" * 8 + whole[8:])  # a header said to be larger than the file
    refuses(saved, StoreError, "adapter.safetensors")
    (saved / TENSORS).write_bytes(whole)
    rw.load(tiny_llama(), saved)


class Trap:
    """Unpickling this leaves a trace."""

    def __reduce__(self):
        return os.mkdir, ("trap-was-sprung",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "model.pt", "adapter.pkl", "last.ckpt"])
def test_a_pickle_is_never_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "offered"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Trap()))
    refuses(folder, StoreError, "pickle")
    refuses(folder / name, StoreError, "pickle")
    assert not (tmp_path / "trap-was-sprung").exists()


def test_a_pickle_under_our_own_name_is_not_read(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (saved / TENSORS).write_bytes(pickle.dumps(Trap()))
    refuses(saved, StoreError, "not a safetensors file")
    assert not (tmp_path / "trap-was-sprung").exists()


# ---- writing -----------------------------------------------------------------------------------------------------


def test_saving_again_replaces_the_old_one(saved):
    other = shaken(adapted(), seed=5)
    rw.save(other, saved)
    assert torch.equal(logits(rw.load(tiny_llama(), saved), IDS), logits(other, IDS))
    assert sorted(os.listdir(saved.parent)) == [saved.name]


def test_a_full_disk_leaves_the_old_adapter(saved, monkeypatch):
    before = {f: (saved / f).read_bytes() for f in os.listdir(saved)}

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half of i")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(StoreError, match="disk is full"):
        rw.save(shaken(adapted(), seed=5), saved)
    assert {f: (saved / f).read_bytes() for f in os.listdir(saved)} == before
    assert os.listdir(saved.parent) == [saved.name], "no half-written folder stays behind"


@pytest.mark.parametrize("step", range(4))
def test_an_error_at_any_step_of_writing_leaves_the_old_adapter(saved, monkeypatch, step):
    before = {f: (saved / f).read_bytes() for f in os.listdir(saved)}
    calls = []

    def failing(real):
        def call(*args):
            calls.append(args)
            if len(calls) == step + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args)

        return call

    monkeypatch.setattr(files, "sync", failing(files.sync))
    monkeypatch.setattr(files.os, "replace", failing(os.replace))
    with pytest.raises(StoreError, match="could not be written"):
        rw.save(shaken(adapted(), seed=5), saved)
    monkeypatch.undo()
    assert {f: (saved / f).read_bytes() for f in os.listdir(saved)} == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_crash_between_the_two_renames_is_mended(saved):
    os.replace(saved, saved.parent / f".{saved.name}.previous")
    assert rw.adapters(rw.load(tiny_llama(), saved)) == ["default"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="could not be written"):
        rw.save(adapted(), tmp_path / "file" / "adapter")
    assert (tmp_path / "file").read_text() == "in the way"


def test_other_peoples_files_are_not_swept_away(tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"chapter1\.tex"):
        rw.save(adapted(), folder)
    assert (folder / "chapter1.tex").read_text() == "years of work"
    assert os.listdir(folder) == ["chapter1.tex"]
    (folder / "empty").mkdir()
    rw.save(adapted(), folder / "empty")
    with pytest.raises(StoreError, match="is a file"):
        rw.save(adapted(), folder / "chapter1.tex")
    assert (folder / "chapter1.tex").read_text() == "years of work"


def test_a_diverged_adapter_is_not_saved(saved):
    model = adapted()
    before = (saved / TENSORS).read_bytes()
    with torch.no_grad():
        state_of(model).adapter("default").parameters()[0][0, 0] = float("inf")
    with pytest.raises(StoreError, match="NaN or infinite"):
        rw.save(model, saved)
    assert (saved / TENSORS).read_bytes() == before


def test_an_adapter_that_does_not_exist(tmp_path):
    with pytest.raises(UnknownNameError, match="default"):
        rw.save(adapted(), tmp_path / "a", "other")
    assert not (tmp_path / "a").exists()


# ---- states in memory --------------------------------------------------------------------------------------------


def test_a_state_in_memory_goes_back_exactly():
    model = adapted()
    kept = {k: t.clone() for k, t in adapter_state(model).items()}
    wanted = logits(model, IDS)
    shaken(model, seed=4)
    load_adapter_state(model, kept)
    assert torch.equal(logits(model, IDS), wanted)


def test_a_state_that_does_not_fit_changes_nothing():
    model = adapted()
    before = bits(model)
    good = {k: t.clone() + 1 for k, t in adapter_state(model).items()}
    key = next(iter(good))
    for bad, said in (
        ({k: t for k, t in good.items() if k != key}, key),
        ({**good, "stranger": torch.zeros(1)}, "stranger"),
        ({**good, key: good[key][:1]}, key),
    ):
        with pytest.raises(StoreError, match=said):
            load_adapter_state(model, bad)
        assert same(bits(model), before)


def test_the_banks_of_another_generator_are_noticed(tmp_path):
    rw.save(shaken(rw.adapt(tiny_llama(), "vera", rank=2)), tmp_path / "a")
    meta = json.loads((tmp_path / "a" / META).read_text())
    _edit(tmp_path / "a", banks=dict.fromkeys(meta["banks"], "0" * 32))
    refuses(tmp_path / "a", StoreError, "checksum")


def test_banks_are_not_in_the_file(tmp_path):
    rw.save(rw.adapt(tiny_llama(), "vera", rank=64), tmp_path / "a")
    numbers = rw.trainable_parameters(rw.adapt(tiny_llama(), "vera", rank=64))
    assert (tmp_path / "a" / TENSORS).stat().st_size < 4 * numbers + 8192
