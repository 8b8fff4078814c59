"""Run one training step on the meta device and watch what memory it would take: every operation, no number.

torch's meta device computes the shape of each result and nothing else. `Watch` sees every operation of a forward and
backward pass, adds each new storage to what is alive, and takes it away when the last reference is gone, as the
eager allocator does; so whatever autograd saves (inputs of norms, of non-linearities and of attention, inputs of the
adapters, dropout masks, logits) and whatever is temporary is counted for any architecture and any method, with and
without gradient checkpointing. Three things are stood in for:

- attention: saves q, k, v, the output and one float32 per head and row, as the fused kernels do, not the matrix of
  scores. Where no fused kernel runs (on a CPU: with attention dropout, as GPT-2 and BERT have), ask for "plain". A
  model with an attention of its own (DeBERTa) is seen as it is in either case;
- the loss of a language model: rankworks' chunked cross-entropy over every position, or full logits on request;
- a question about values (`if mask.all():`), which a tensor without values cannot answer, is answered yes (or 1).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rankworks.core.errors import ConfigError
from rankworks.core.hooks import method_hooks
from rankworks.train.hooks import the_teacher
from rankworks.train.losses.loss import chunk_rows, chunked_cross_entropy, wide

_ITEM = torch.ops.aten._local_scalar_dense.default
_GROUPED = torch.ops.aten._grouped_mm.default


@dataclass(frozen=True)
class Trace:
    """What one step takes besides what is always there (weights, adapter, optimizer state); bytes.

    saved: alive between forward and backward. activations: the highest point, parameter gradients left out. peak: the
    highest point with them (the gradients come as the activations go, so it is below the sum). flops: multiply-adds
    counted twice, forward and backward.
    """

    saved: int
    activations: int
    peak: int
    flops: int


@cache
def _operations(packet: Any) -> Any:
    """Return the formula for an operation's floating-point operations, also for its in-place form; None for none."""
    name = packet.__name__
    return flop_registry.get(packet) or flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), None))


class Watch(TorchDispatchMode):
    """Counts the bytes alive in storages made while it is on. `known` storages (parameters, buffers) do not count."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live = self.gradients = self.top = self.top_all = self.flops = 0
        self._seen: dict[int, Any] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and take in its results."""
        if func is _ITEM and args[0].is_meta:
            return True if args[0].dtype == torch.bool else args[0].new_ones((), device="cpu").item()
        if func is _GROUPED and args[0].is_meta:  # a mixture's products; the meta device knows them in bfloat16 alone
            halves = (args[0].to(torch.bfloat16), args[1].to(torch.bfloat16))
            out = func(*halves, *args[2:], **(kwargs or {})).to(args[0].dtype)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._take(tensor)
        formula = _operations(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            if self._seen.pop(key, None) is not None:
                self.live -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.top = max(self.top, self.live)
        self.top_all = max(self.top_all, self.live + self.gradients)

    def keep_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's finished gradient as a gradient and no longer as an activation."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if isinstance(self._seen.get(storage._cdata), weakref.ref):
            self._seen[storage._cdata] = storage
            self.live -= storage.nbytes()
            self.gradients += storage.nbytes()


class _Attention(torch.autograd.Function):
    """The memory of a fused attention kernel: q (b, h, s, d), k and v (b, h_kv, t, d) to (b, h, s, d)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, watch: Watch) -> Tensor:
        b, h, s, d = q.shape
        ctx.watch, ctx.flops = watch, 2 * b * h * s * k.shape[-2] * (d + v.shape[-1])  # q k^T and p v
        watch.flops += ctx.flops
        out = q.new_empty(b, s, h, v.shape[-1]).transpose(1, 2)  # the kernels write heads side by side
        ctx.save_for_backward(q, k, v, out, q.new_empty(b, h, s, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        ctx.watch.flops += 5 * ctx.flops // 2  # the scores again, dv, dp, dq and dk
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class FusedAttention(TorchFunctionMode):
    """While it is on, `scaled_dot_product_attention` costs the memory and the operations of a fused kernel."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Stand in for attention; pass everything else on."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **kwargs)
        return _Attention.apply(*args[:3], self.watch)


def trace_step(
    model: nn.Module,
    inputs: Mapping[str, Tensor] | Tensor,
    loss: str = "chunked",
    checkpointing: bool = False,
    fused: bool = True,
    layerwise: bool = False,
) -> Trace:
    """Run a forward and a backward pass of `model`, on the meta device, and return what it takes.

    Where no parameter is trained there is the forward pass alone, as for a measurement of the loss. Where the model
    teaches itself (`Hook.teacher`) there are two of each, the second as wide as the first, which is the most it can be.

    inputs: keyword arguments or the one positional tensor; loss: "chunked" or "full" logits of a language model;
    checkpointing: recompute each layer's activations in the backward pass; fused: attention by a fused kernel;
    layerwise: each gradient is freed as soon as it is complete.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    taught = the_teacher(method_hooks(model), checkpointing) is not None
    given = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    watch = Watch([*model.parameters(), *model.buffers(), *given])
    done = _free if layerwise else watch.keep_gradient
    hooks = [p.register_post_accumulate_grad_hook(done) for p in trained]
    model.train()
    _set_checkpointing(model, checkpointing, (lambda: FusedAttention(watch)) if fused else contextlib.nullcontext)
    try:
        with FusedAttention(watch) if fused else contextlib.nullcontext(), watch:
            with torch.set_grad_enabled(bool(trained)):
                value = _loss(model, inputs, loss)
                if taught:
                    value = value + _loss(model, inputs, loss, taught)
            saved = watch.live
            if trained:
                value.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
        model.eval()
    return Trace(saved, watch.top, watch.top_all, watch.flops)


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def _set_checkpointing(model: nn.Module, on: bool, context: Callable[[], Any]) -> None:
    """Let the model recompute its layers' activations in the backward pass, in the given context, or keep them."""
    switch: Any = None
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        switch = switch or getattr(model, f"{name}_{'enable' if on else 'disable'}", None)
    if on and switch is None:
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing: leave it off.")
    if on:  # autograd leaves function modes behind, so the recomputation enters its own
        switch({"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), context())})
    elif any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        switch()


def _loss(model: nn.Module, inputs: Mapping[str, Tensor] | Tensor, loss: str, taught: bool = False) -> Tensor:
    """Return a scalar: cross-entropy of a language model or classifier, a sum for anything else.

    taught: against probabilities in place of ids.
    """
    if not isinstance(inputs, Mapping):
        return _first(model(inputs)).float().sum()
    head, ids = _head(model), inputs.get("input_ids")
    if head is None or ids is None:
        keep: dict[str, Any] = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
        return _first(model(**inputs, **keep)).float().sum()
    if loss == "chunked":
        hidden = _first(_backbone(model)(**inputs, use_cache=False)).flatten(0, 1)  # (tokens, width)
        rows = chunk_rows(int(getattr(head, "out_features", 0)) or head.weight.shape[0])
        parameters = list(head.parameters())
        if not taught:
            return chunked_cross_entropy(hidden, ids.flatten(), head, parameters, rows)
        answers = torch.no_grad()(lambda states: wide(head(states)).softmax(-1))
        return chunked_cross_entropy(hidden, hidden.detach(), head, parameters, rows, answers)
    logits = wide(model(**inputs, use_cache=False).logits.flatten(0, 1))
    return F.cross_entropy(logits, logits.detach().softmax(-1) if taught else ids.flatten())


def _head(model: nn.Module) -> Any:
    getter: Any = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) and _backbone(model) is not None else None


def _backbone(model: nn.Module) -> Any:
    getter: Any = getattr(model, "get_decoder", None)
    body = getter() if callable(getter) else getattr(model, "base_model", None)
    return None if body is model else body


def _first(output: Any) -> Tensor:
    """Return the logits or hidden states of an output object, a tuple or a tensor."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    return output if isinstance(output, Tensor) else output[0]


def step_inputs(model: nn.Module, batch: int, sequence: int, example: Any = None) -> dict[str, Tensor] | Tensor | None:
    """Return inputs of that many rows on the meta device, or None for a model that does not say what it takes.

    example: a tensor or a mapping of tensors with the batch as first dimension, for models outside transformers.
    """
    if example is not None:
        if isinstance(example, Tensor):
            return _rows(example, batch)
        if isinstance(example, Mapping) and all(isinstance(t, Tensor) for t in example.values()):
            return {name: _rows(tensor, batch) for name, tensor in example.items()}
        raise ConfigError("example must be a tensor or a mapping of tensors, the batch as their first dimension.")
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main not in ("input_ids", "pixel_values"):
        return None
    if main == "input_ids":
        return {"input_ids": torch.empty(batch, sequence, dtype=torch.long, device="meta")}
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    dtype = next(p.dtype for p in model.parameters())
    return {"pixel_values": torch.empty(batch, config.num_channels, size, size, dtype=dtype, device="meta")}


def _rows(tensor: Tensor, batch: int) -> Tensor:
    return torch.empty(batch, *tensor.shape[1:], dtype=tensor.dtype, device="meta")
