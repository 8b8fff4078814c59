"""The whole model with its adapters folded in, for any program that loads models: verified before it is final.

The files are written to a folder beside the target, loaded again from the disk, and the loaded model's outputs compared
with the adapted model's; only then does the folder take its place. The model in memory is not touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankworks.core.errors import ConfigError, ExportError
from rankworks.core.files import atomic_folder
from rankworks.core.hub.quiet import quiet
from rankworks.core.state import Adapter, state_of
from rankworks.export.merged_state import base_state, merged_state
from rankworks.export.parts import chosen
from rankworks.export.place import check_folder, check_room, folder_bytes, system_errors
from rankworks.export.report import ExportReport, SiteExport, write_report

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
TOKENS = (2, 16)  # batch and length of the seeded token numbers
PLAIN_WEIGHTS = "model.safetensors"


@torch.no_grad()
def export_merged(
    model: nn.Module,
    path: Path,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    inputs: Any = None,
    tolerance: float | None = None,
) -> ExportReport:
    """Write the merged model: transformers' folder for its models, else `model.safetensors` (a state dict).

    Raises `ExportError` where the disk is too small, a change is not finite, or the outputs of the model loaded back
    differ by more than the dtype explains; then nothing is left behind.
    """
    adapters = _adapters(model, name)
    check_folder(path)
    arguments = _arguments(model, inputs)
    base = base_state(model)
    own = _usual_dtype(base)
    kind = dtype or own
    check_room(path, sum(t.numel() * (kind if t.is_floating_point() else t.dtype).itemsize for t in base.values()))
    tensors, untied = merged_state(model, adapters, dtype)
    with _evaluated(model, adapters):
        wanted = _outputs(_call(model, arguments))
    limit = max(TOLERANCE.get(d, 1e-1) for d in (kind, own)) if tolerance is None else tolerance
    with atomic_folder(path) as folder:
        if hasattr(model, "save_pretrained"):
            with quiet(), system_errors():
                _save_transformers(model, folder, tensors, untied, kind, tokenizer)
                given = _reloaded(model, folder, kind, arguments)
        else:
            with system_errors():
                save_file({k: t.clone() for k, t in tensors.items()}, folder / PLAIN_WEIGHTS, metadata={"format": "pt"})
            given = _rerun(model, load_file(folder / PLAIN_WEIGHTS), arguments)
        figure = _apart(given, wanted)
        if not figure <= limit:
            raise ExportError(
                "the merged model, loaded back from the disk, gives outputs that differ from the adapted model's by "
                f"{figure:.2g} (up to {limit:g} is rounding in {kind}), so nothing was written. Export in a wider "
                "dtype; where the dtype is wide already, the model holds something that its files do not."
            )
        report = _report(path, folder, adapters, figure, kind == own, untied)
        write_report(report, folder)
    return report


def _adapters(model: nn.Module, name: str | None) -> list[Adapter]:
    """Return the adapters to fold in: the one named, or all that act."""
    state = state_of(model)
    names = list(state.active) if name is None else [name]
    if not names:
        raise ConfigError("no adapter acts now: activate(model, ...) first, or give name=...")
    return [chosen(model, each)[1] for each in names]


@contextmanager
def _evaluated(model: nn.Module, adapters: list[Adapter]) -> Iterator[None]:
    """Let exactly these adapters act, in eval mode, and put everything back."""
    state = state_of(model)
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        state.show([a.name for a in adapters])
        yield
    finally:
        state.show(state.active)
        for module in training:
            module.training = True


def _arguments(model: nn.Module, inputs: Any) -> Any:
    """Return the arguments of a forward call: those given, or seeded token numbers for a model that reads tokens."""
    if isinstance(inputs, Mapping):
        return inputs
    if inputs is not None:
        return tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)
    getter: Any = getattr(model, "get_input_embeddings", None)
    table = getter() if callable(getter) else None
    if not isinstance(table, nn.Embedding) or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ConfigError(
            "kind='merged' compares outputs before the files are final, and this model does not read token numbers: "
            "give inputs=... (a tensor, or keyword arguments as a mapping)."
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(table.num_embeddings, TOKENS, generator=generator).to(table.weight.device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _outputs(result: Any) -> Tensor:
    """Return the tensor to compare: the logits, or the first tensor there is."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping):
        return result["logits"] if "logits" in result else next(v for v in result.values() if isinstance(v, Tensor))
    return next(v for v in result if isinstance(v, Tensor))


def _apart(given: Tensor, wanted: Tensor) -> float:
    """Return ||given - wanted||_F / ||wanted||_F in float64."""
    given, wanted = given.double().cpu(), wanted.double().cpu()
    if given.shape != wanted.shape:
        return float("inf")
    return float((given - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _save_transformers(
    model: Any, folder: Path, tensors: dict[str, Tensor], untied: list[str], dtype: torch.dtype, tokenizer: Any
) -> None:
    """Save as transformers does, with the merged tensors, and a configuration that says their type and what is tied."""
    from transformers import PreTrainedConfig

    parts = [model.config, *(v for v in vars(model.config).values() if isinstance(v, PreTrainedConfig))]
    kept = [dict(vars(part)) for part in parts]  # save_pretrained notes the type and the architecture in them
    try:
        model.save_pretrained(folder, state_dict=dict(tensors))
    finally:
        for part, values in zip(parts, kept, strict=True):
            vars(part).clear()
            vars(part).update(values)
    file = folder / "config.json"
    said = json.loads(file.read_text())
    said["dtype"] = str(dtype).removeprefix("torch.")
    said.pop("torch_dtype", None)
    if untied and _is_embedding(model, untied):
        for part in (said, said.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    file.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _is_embedding(model: Any, names: list[str]) -> bool:
    """Whether the input embedding is among the named tensors."""
    table = model.get_input_embeddings()
    return any(p is table.weight for n, p in model.named_parameters(remove_duplicate=False) if n in names)


def _reloaded(model: Any, folder: Path, dtype: torch.dtype, arguments: Any) -> Tensor:
    """Return the outputs of the model as a new reader of the folder gets it."""
    fresh = type(model).from_pretrained(folder, dtype=dtype, local_files_only=True)
    return _outputs(_call(fresh.to(model.device).eval(), arguments, dtype))


def _rerun(model: nn.Module, tensors: dict[str, Tensor], arguments: Any) -> Tensor:
    """Return the outputs of a plain torch module run with the tensors read back, its own left as they are."""
    values = {key: tensors[key].to(own) for key, own in base_state(model).items()}

    def run(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, values, args, kwargs, tie_weights=False)

    with _evaluated(model, []):
        return _outputs(_call(run, arguments))


def _call(function: Any, arguments: Any, dtype: torch.dtype | None = None) -> Any:
    """Call with keyword or positional arguments, floating ones cast to `dtype` where it is given."""

    def fit(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating and dtype is not None else value

    if isinstance(arguments, Mapping):
        return function(**{k: fit(v) for k, v in arguments.items()})
    return function(*(fit(v) for v in arguments))


def _usual_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the type most of the floating numbers have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda d: counts[d])


def _report(
    path: Path, folder: Path, adapters: list[Adapter], figure: float, exact: bool, untied: list[str]
) -> ExportReport:
    notes = []
    if untied:
        shown = ", ".join(untied)
        notes.append(f"these shared one tensor and no longer do, as their changes differ: {shown}")
    full = [name for adapter in adapters for name in adapter.full]
    if full:
        notes.append(f"trained in full: {', '.join(full)}")
    return ExportReport(
        kind="merged",
        path=path,
        adapter=", ".join(a.name for a in adapters),
        method=" + ".join(dict.fromkeys(a.spec.asked.method.title for a in adapters)),
        sites=[SiteExport(key, None) for a in adapters for key in a.sites],
        bytes=folder_bytes(folder),
        verified=figure,
        exact=exact,
        notes=notes,
    )
