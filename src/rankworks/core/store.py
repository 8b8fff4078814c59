"""The store: an adapter is a folder with `adapter.safetensors` and `adapter.json`, against the original base.

Writing is atomic. Reading is strict: format, version, size, checksum, base fingerprint, every key and every shape are
checked before the model is touched. Nothing that could execute is ever read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankworks.core import full as full_modules
from rankworks.core import merge
from rankworks.core.adapt import attach
from rankworks.core.build import differences, make_adapter, with_differences
from rankworks.core.errors import ConfigError, StoreError, TargetError
from rankworks.core.files import atomic_folder, recover
from rankworks.core.fingerprint import compare, fingerprint
from rankworks.core.refuse import refuse_overlap
from rankworks.core.spec import AdaptSpec
from rankworks.core.state import NAME, Adapter, State, check_name, state_of
from rankworks.core.targets import find_named
from rankworks.core.version import __version__

FORMAT, VERSION = "rankworks-adapter", 1
TENSORS, META = "adapter.safetensors", "adapter.json"
META_LIMIT = 64 << 20  # bytes; an adapter.json larger than this is not one of ours
Reader = Callable[[nn.Module, Path, str, bool], nn.Module]
_READERS: list[tuple[Callable[[Path], bool], Reader]] = []


def register_reader(detect: Callable[[Path], bool], read: Reader) -> None:
    """Let `load` read another format: `detect(folder)` recognises it, `read(model, folder, name, check_base)` reads."""
    _READERS.append((detect, read))


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return the adapter's tensors by flat name (no adapter name in it), detached, sharing storage with the model."""
    return {k: t.detach() for k, t in state_of(model).adapter(name).tensors().items()}


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Copy tensors into an adapter on the model; keys and shapes must agree exactly. Raises `StoreError` if not."""
    own = state_of(model).adapter(name).tensors()
    _agree({k: tuple(t.shape) for k, t in state.items()}, {k: tuple(t.shape) for k, t in own.items()}, "the state")
    for key, tensor in own.items():
        tensor.data.copy_(state[key])


def save(model: nn.Module, path: str | Path, name: str = "default") -> Path:
    """Write one adapter to the folder `path`, atomically; returns it. Raises `StoreError` with the old one intact."""
    adapter = state_of(model).adapter(name)
    tensors = {k: t.detach().cpu().contiguous() for k, t in adapter.tensors().items()}
    bad = next((k for k, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)
    if bad is not None:
        raise StoreError(
            f"{bad} holds NaN or infinite values: the adapter has diverged; it was not saved. Load an earlier one."
        )
    _refuse_to_sweep(Path(path))
    with atomic_folder(path) as folder:
        try:
            save_file(tensors, folder / TENSORS, metadata={"format": FORMAT})
        except SafetensorError as error:  # it wraps the system's error, so look for the cause people can mend
            raise OSError(28 if "No space" in str(error) else 5, str(error)) from error
        meta = _describe(model, adapter, tensors, _sha256(folder / TENSORS))
        (folder / META).write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")
    return Path(path)


def _refuse_to_sweep(path: Path) -> None:
    """Raise where saving, which replaces the folder, would remove what is not an adapter's."""
    if path.is_file():
        raise StoreError(f"{path} is a file, and an adapter is a folder: choose another place.")
    foreign = sorted({f.name for f in path.iterdir()} - {META, TENSORS}) if path.is_dir() else []
    if foreign:
        raise StoreError(
            f"{path} holds {foreign[0]}"
            + (f" and {len(foreign) - 1} more" if foreign[1:] else "")
            + ", which saving an "
            "adapter there would remove: choose a folder of its own, that is new, empty or an adapter's."
        )


def read_meta(path: str | Path) -> dict[str, Any]:
    """Return an adapter folder's adapter.json, checked. Raises `StoreError` where it is not one of ours."""
    folder = Path(path)
    recover(folder)
    file = folder / META
    if not folder.exists():
        raise StoreError(f"{folder} does not exist: give the folder that rankworks.save wrote.")
    if folder.is_file() or not file.exists():
        raise StoreError(_not_ours(folder))
    if file.stat().st_size > META_LIMIT:
        raise StoreError(f"{file} has {file.stat().st_size:,} bytes, more than any adapter.json: it was not read.")
    try:
        meta = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise StoreError(f"{file} is not valid JSON ({error}): the folder is damaged; take it from a copy.") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise StoreError(f"{file} does not say format {FORMAT!r}: the folder is not a rankworks adapter.")
    if meta.get("version") != VERSION:
        raise StoreError(
            f"{file} has format version {meta.get('version')!r}; this rankworks reads {VERSION}. Update rankworks."
        )
    return meta


def load(model: nn.Module, path: str | Path, name: str = "default", check_base: bool = True) -> nn.Module:
    """Put a saved adapter on the model and let it act; returns the model.

    Raises `StoreError` (missing, truncated, tampered, other keys), `FingerprintError` (another base) or `ConfigError`
    (the name is taken), always with the model untouched.
    """
    path = Path(path)
    check_name(name)
    state: State | None = getattr(model, NAME, None)
    if state is not None and name in state.adapters_by_name:
        raise ConfigError(f"the model already has an adapter called {name!r}: load it under another name.")
    if state is not None:
        merge.refuse_merged(state, "add to")
    for detect, reader in _READERS:
        if path.is_dir() and detect(path):
            return reader(model, path, name, check_base)
    meta = read_meta(path)
    try:
        spec = AdaptSpec.from_flat(meta["adapt"], f"{path / META}")
        sites = find_named(model, meta["sites"], spec.delta.method.cls.kinds)
        resolved = [(s, with_differences(spec.delta, meta["sites"][s.name])) for s in sites]
        modules = {n: model.get_submodule(n) for n in meta.get("full", [])}
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path / META} lacks {error}: the folder is damaged; take it from a copy.") from None
    except AttributeError as error:
        raise TargetError(f"the adapter trains a module in full that this model does not have: {error}.") from None
    if check_base:
        compare(meta.get("base", {}), sites)
    state = state or State()
    refuse_overlap(sites, modules, state)
    with state.trial():
        adapter = make_adapter(model, state, name, resolved, spec, start=False)
        adapter.full = {n: full_modules.own_copy(m) for n, m in modules.items()}
        _fill(adapter, path, meta)
        _check_frozen(meta, state, adapter)
        attach(model, state, adapter, modules)
    return model


def _fill(adapter: Adapter, path: Path, meta: Mapping[str, Any]) -> None:
    """Read the tensors into a built adapter: checksum and every key and shape first, then the numbers."""
    file = path / TENSORS
    if not file.exists():
        raise StoreError(f"{file} is missing: the folder is incomplete; take it from a copy.")
    try:
        with safe_open(file, framework="pt") as data:
            shapes = {k: tuple(data.get_slice(k).get_shape()) for k in data.keys()}  # noqa: SIM118 - not a mapping
            for key, delta in adapter.deltas.items():
                delta.make_room({k.removeprefix(key + "."): s for k, s in shapes.items() if k.startswith(key + ".")})
            own = adapter.tensors()
            _agree(shapes, {k: tuple(t.shape) for k, t in own.items()}, str(file))
            if _sha256(file) != meta.get("sha256"):
                raise StoreError(
                    f"{file} is not the file that was saved (its checksum differs): it was changed or damaged; "
                    "take it from a copy."
                )
            with torch.no_grad():
                for key, tensor in own.items():
                    tensor.data.copy_(data.get_tensor(key))
    except SafetensorError as error:
        raise StoreError(f"{file} is truncated or not a safetensors file ({error}); take it from a copy.") from None


def _agree(given: Mapping[str, tuple], wanted: Mapping[str, tuple], where: str) -> None:
    """Raise `StoreError` naming the first five keys that are missing, extra or of another shape."""
    missing, extra = [k for k in wanted if k not in given], [k for k in given if k not in wanted]
    if missing or extra:
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:5])})"
            for what, keys in (("missing", missing), ("not expected", extra))
            if keys
        ]
        raise StoreError(
            f"{where} does not fit the adapter: keys {' and '.join(parts)}. It was saved for another spec or model."
        )
    other = [f"{k} {given[k]} instead of {wanted[k]}" for k in wanted if given[k] != wanted[k]]
    if other:
        raise StoreError(
            f"{where} does not fit the adapter: {len(other)} tensors of another shape ({'; '.join(other[:5])})."
        )


def _describe(model: nn.Module, adapter: Adapter, tensors: Mapping[str, Tensor], sha256: str) -> dict[str, Any]:
    state = state_of(model)
    config = getattr(model, "config", None)
    return {
        "format": FORMAT,
        "version": VERSION,
        "rankworks": __version__,
        "adapt": adapter.spec.flat(),
        "sites": {key: differences(d.current_spec(), adapter.spec.delta) for key, d in adapter.deltas.items()},
        "full": list(adapter.full),
        "model": getattr(config, "_name_or_path", "") or type(model).__name__,
        "base": fingerprint(merge.original(state, site) for site in adapter.sites.values()),
        "banks": _checksums(state, adapter),
        "frozen": {key: sketch for key, d in adapter.deltas.items() if (sketch := _sketch(d))},
        "parameters": sum(p.numel() for p in adapter.parameters()),
        "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "sha256": sha256,
    }


def _checksums(state: State, adapter: Adapter) -> dict[str, str]:
    """Return {bank: checksum} of the banks with frozen tensors; one with trained ones too has the adapter's name."""
    frozen = [key for key in adapter.banks if any(True for _ in state.bank(key).buffers())]
    return {key.removesuffix(f"_{adapter.name}"): state.bank(key).checksum() for key in frozen}


def _sketch(delta: nn.Module) -> dict[str, float]:
    """Return a number per rebuilt (unsaved) tensor that tells it from others: its product with a fixed wave."""
    saved = set(delta.state_dict())
    sketches = {}
    for key, tensor in delta.named_buffers():
        if key not in saved and tensor.is_floating_point() and tensor.numel():
            flat = tensor.detach().to("cpu", torch.float64).flatten()
            wave = torch.cos(torch.arange(len(flat), dtype=torch.float64) * 1.6180339887498949)
            sketches[key] = float(flat @ wave) / float(flat.norm().clamp_min(1e-30))
    return sketches


def _check_frozen(meta: Mapping[str, Any], state: State, adapter: Adapter) -> None:
    """Raise where a bank or a tensor rebuilt from the base is not the one the adapter was trained with."""
    drawn = _checksums(state, adapter)
    for key, checksum in meta.get("banks", {}).items():
        if drawn.get(key) != checksum:
            raise StoreError(
                "the frozen random tensors rebuilt from the adapter's seed are not those it was trained with (their "
                "checksum differs): it was made by a version with another random generator. Merge it there and use the "
                "merged model."
            )
    for key, known in meta.get("frozen", {}).items():
        for name, value in _sketch(adapter.deltas[key]).items():
            if abs(value - known.get(name, 0.0)) > 1e-2:
                raise StoreError(
                    f"{key}.{name}, rebuilt from the base weight, is not what the adapter was trained with: the base "
                    "differs, or this machine's linear algebra chose otherwise. Merge it where it was trained and use "
                    "the merged model."
                )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _not_ours(path: Path) -> str:
    """Say what the path is, if not an adapter of ours."""
    files = [path] if path.is_file() else list(path.iterdir())
    pickles = [f.name for f in files if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    if pickles:
        return (
            f"{path} holds {pickles[0]}, a pickle: reading it could execute code, so rankworks never does. Convert it "
            "to safetensors where you trust it (peft: save_pretrained(..., safe_serialization=True))."
        )
    return f"{path} has no {META}: give the folder that rankworks.save wrote (it holds {TENSORS} and {META})."
