"""Locas' starts from data: which hidden units to clone, and which tokens to remember.

    activations   alpha_j = mean_t |m_tj|, the mean size of every hidden unit of every feed-forward block over tokens
    memorise      gated blocks: the memory is cloned again from the r units of largest alpha
                  plain blocks: one slot per token t, k = a_t / ||a_t||, v = eps g_t / tau with g_t = d log p(x_t) / dy,
                  jointly of unit norm over hidden size and layers; more slots than r are compressed by `nl_svd`

A slot changes the block's output at its own token by act(||a_t||) eps g_t, along the gradient of that token's log
probability, so for a small enough eps the token becomes likelier: eps is 0.1 times the mean norm of the block's value
vectors (or what keeps rows within norm 1), halved up to 8 times until it is.
`nl_svd` is the paper's compression: unit probes p_j are the leading directions of the keys weighed by ||k|| ||v||, new
keys are the probes, new values what the memory answers to them.
Source: arXiv:2602.05085.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.adapt import disabled
from rankworks.core.block import Block
from rankworks.core.errors import ConfigError
from rankworks.core.evidence import Evidence
from rankworks.core.state import NAME, state_of
from rankworks.core.targets import find_sites
from rankworks.deltas.locas import Locas

HALVINGS = 8


@torch.no_grad()
def activations(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], targets: str | list[str] = "all-linear"
) -> Evidence:
    """Return {block: {"activation": (m,)}}, float32, over the tokens of all batches: `adapt(..., evidence=...)`.

    A batch is a mapping of the model's arguments. Adapters on the model do not act meanwhile.
    """
    blocks = [s for s in find_sites(model, targets, (), ("ffn",)) if isinstance(s, Block)]
    if not blocks:
        raise ConfigError("the model has no feed-forward block that could be read: name other targets.")
    sums: dict[str, Tensor] = {}
    seen = 0
    with _base(model), _watched({b.name: b.ffn.down for b in blocks}) as taken:
        for batch in batches:
            model(**batch)
            for name, (hidden, _) in taken.items():  # hidden (..., m) is what the down projection reads
                flat = hidden.detach().flatten(0, -2).float().abs()
                sums[name] = sums.get(name, 0.0) + flat.sum(0)
                seen += len(flat)
    if not seen:
        raise ConfigError("there were no tokens to measure on: give at least one batch.")
    tokens = seen / len(sums)
    return {name: {"activation": total / tokens} for name, total in sums.items()}


def memorise(model: nn.Module, input_ids: Tensor, name: str = "default") -> int:
    """Start the memories of the Locas adapter `name` from one chunk of tokens (1, T); returns how often eps was halved.

    Gated blocks are cloned again, with V = 0. Plain blocks get a slot per token. Raises `ConfigError` for another
    adapter or shape.
    """
    adapter = state_of(model).adapter(name)
    if adapter.spec.delta.key != "locas":
        raise ConfigError(f"{name} is a {adapter.spec.delta.key} adapter: only locas memorises.")
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ConfigError(f"memorise takes one chunk of at least 2 tokens, (1, T), not {tuple(input_ids.shape)}.")
    pairs = [(site, delta) for key, site in adapter.sites.items() if isinstance(delta := adapter.deltas[key], Locas)]
    gated = [(s, d) for s, d in pairs if d.G is not None]
    if gated:
        found = activations(model, [{"input_ids": input_ids}], [site.name for site, _ in gated])
        for site, delta in gated:
            alpha = found[site.name]["activation"]
            delta.clone(site.weight, alpha.topk(delta.rank).indices.sort().values)
    plain = [(s, d) for s, d in pairs if d.G is None]
    return _write_slots(model, input_ids, plain) if plain else 0


def _write_slots(model: nn.Module, ids: Tensor, pairs: list[tuple[Any, Locas]]) -> int:
    keys, gradients = _slots(model, ids, [site for site, _ in pairs])
    before = _log_likelihood(model, ids)
    values = []
    for (site, delta), k, g in zip(pairs, keys, gradients, strict=True):
        value_norm = float(delta.tau) * delta.rank  # the mean norm of the block's value vectors
        v = 0.1 * value_norm / float(delta.tau) * g
        values.append((k, v) if len(k) <= delta.rank else nl_svd(k, v, site.ffn.act, delta.rank))
    longest = max(float(torch.linalg.vector_norm(v, dim=1).max()) for _, v in values)
    scale = min(1.0, 1.0 / max(longest, 1e-30))
    for halved in range(HALVINGS + 1):
        with torch.no_grad():
            for (_, delta), (k, v) in zip(pairs, values, strict=True):
                delta.K[: len(k)].copy_(k)
                delta.V.zero_()
                delta.V[: len(v)].copy_(scale * 0.5**halved * v)
        if _log_likelihood(model, ids) > before:
            return halved
    return HALVINGS


def _slots(model: Any, ids: Tensor, sites: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return per block the keys (T - 1, d) and the gradients (T - 1, d), of joint unit norm over blocks per token."""
    with _base(model), _watched({s.name: s.module for s in sites}) as taken, torch.enable_grad():
        table = model.get_input_embeddings()(ids).detach().requires_grad_()  # so that there is a graph
        logp = model(inputs_embeds=table).logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        outputs = [taken[s.name][1] for s in sites]
        rows = [[g[0, t] for g in torch.autograd.grad(p, outputs, retain_graph=True)] for t, p in enumerate(logp)]
        inputs = [taken[s.name][0][0, :-1].detach().float() for s in sites]
    keys = [a / torch.linalg.vector_norm(a, dim=1, keepdim=True).clamp_min(1e-12) for a in inputs]
    stacked = torch.stack([torch.stack(list(row)) for row in rows]).float()  # (T - 1, blocks, d)
    stacked = stacked / torch.linalg.vector_norm(stacked, dim=(1, 2), keepdim=True).clamp_min(1e-30)
    return keys, list(stacked.unbind(1))


@torch.no_grad()
def nl_svd(
    keys: Tensor, values: Tensor, act: Callable[[Tensor], Tensor], size: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Compress a memory V^T act(K a) of keys and values (n, d) to at most `size` slots; float32 or wider.

    Probes below `eps` times the largest weight are dropped. A probe's sign is that in which the keys' sum points.
    """
    weights = torch.linalg.vector_norm(keys, dim=1) * torch.linalg.vector_norm(values, dim=1)
    unit = keys / torch.linalg.vector_norm(keys, dim=1, keepdim=True).clamp_min(1e-12)
    _, s, vh = torch.linalg.svd(weights.unsqueeze(1) * unit, full_matrices=False)
    probes = vh[:size][s[:size] > eps * s[0]]  # (n', d)
    signs = (probes @ (weights.unsqueeze(1) * unit).sum(0)).sign()
    probes = probes * torch.where(signs == 0, 1.0, signs).unsqueeze(1)
    return probes, act(probes @ keys.t()) @ values


@torch.no_grad()
def _log_likelihood(model: nn.Module, ids: Tensor) -> float:
    logp = model(input_ids=ids).logits.float().log_softmax(-1)
    return float(logp[0, :-1].gather(1, ids[0, 1:, None]).sum())


@contextmanager
def _base(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base, in eval mode."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with disabled(model) if hasattr(model, NAME) else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within the block keep every module's last (input, output)."""
    taken: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: taken.__setitem__(name, (args[0], output))

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()
