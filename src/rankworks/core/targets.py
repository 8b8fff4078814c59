"""One pattern language for every per-module setting: which weights of a model are meant.

    all-linear              every linear layer but the output head
    q_proj                  names that end in it (whole path components)
    model.layers.*.mlp.*    a glob over the whole name
    re:layers\\.[0-3]\\.     a regular expression, searched in the name
    q_proj@0:12  @-4:       only in these layers (the first number in the name; a Python slice)
    c_attn[0:768]           a row range of a fused projection
    down_proj#0:4           a range of experts of a stacked parameter (all of them without `#`)

A pattern that matches nothing raises and lists near names.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rankworks.core.block import BLOCKS, blocks_of
from rankworks.core.errors import ConfigError, TargetError, nearest
from rankworks.core.select import layer_of
from rankworks.core.site import Site, kind_of, stacked_parameters

ALL_LINEAR = "all-linear"
_ROWS = re.compile(r"\[(\d*):(\d*)\]$")
_EXPERTS = re.compile(r"#(\d+)?(:)?(\d+)?$")
_LAYERS = re.compile(r"@(-?\d+)?(:)?(-?\d+)?$")


@dataclass(frozen=True)
class Pattern:
    """One parsed pattern: a name test, a layer range, and a part of the weight."""

    text: str
    name: str
    layers: slice | None = None
    rows: tuple[int | None, int | None] | None = None
    experts: slice | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse a pattern; raises `ConfigError` where a regular expression is not one."""
        if text.startswith("re:"):
            try:
                re.compile(text[3:])
            except re.error as error:
                raise ConfigError(f"the target pattern {text!r} is not a regular expression: {error}.") from None
            return cls(text, text)
        name, rows, experts, layers = text, None, None, None
        while True:  # the suffixes may stand in any order
            if rows is None and (found := _ROWS.search(name)):
                rows = (int(found[1]) if found[1] else None, int(found[2]) if found[2] else None)
            elif experts is None and (found := _EXPERTS.search(name)):
                experts = _slice(found)
            elif layers is None and (found := _LAYERS.search(name)):
                layers = _slice(found)
            else:
                return cls(text, name or ALL_LINEAR, layers, rows, experts)
            name = name[: found.start()]

    def names(self, name: str) -> bool:
        """Whether the module or parameter name `name` is meant (layers and parts aside)."""
        if self.name == ALL_LINEAR:
            return True
        if self.name.startswith("re:"):
            return re.search(self.name[3:], name) is not None
        if any(c in self.name for c in "*?"):
            return fnmatch.fnmatchcase(name, self.name)
        return name == self.name or name.endswith("." + self.name)

    def in_layers(self, name: str, depth: int) -> bool:
        """Whether the name lies in the pattern's layer range, of `depth` layers in all."""
        if self.layers is None:
            return True
        number = layer_number(name)
        return number is not None and number in range(depth)[self.layers]


def _slice(found: re.Match[str]) -> slice:
    start, stop = (int(found[1]) if found[1] else None), (int(found[3]) if found[3] else None)
    if found[2] is None and start is not None:
        return slice(start, start + 1 if start != -1 else None)
    return slice(start, stop)


def layer_number(name: str) -> int | None:
    """Return the first whole number among a name's components: its layer."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def as_patterns(targets: str | Iterable[str]) -> list[Pattern]:
    """Parse a pattern, a comma-separated list or a list of patterns."""
    if isinstance(targets, str):
        targets = [targets] if targets.startswith("re:") else [t.strip() for t in targets.split(",")]
    patterns = [Pattern.parse(text) for text in targets if text]
    if not patterns:
        raise ConfigError(
            "targets is empty: name the modules to adapt, for example 'all-linear' or ['q_proj', 'v_proj']."
        )
    return patterns


def find_sites(
    model: nn.Module, targets: str | Iterable[str], exclude: Sequence[str] = (), kinds: Sequence[str] = ()
) -> list[Site]:
    """Return the sites of `model` that `targets` names and `exclude` does not, in the model's order.

    `kinds` are those the method takes: where blocks are among them, a pattern means blocks if it matches any.
    Raises `TargetError` naming every pattern that matches nothing, with near names.
    """
    candidates = list(_candidates(model, kinds))
    depth = _depth(candidates)
    unwanted = as_patterns(exclude) if exclude else []
    heads = output_heads(model)
    chosen: dict[str, Site] = {}
    problems = []
    for pattern in as_patterns(targets):
        meant = [c for c in candidates if _meant(pattern, c, depth, heads)]
        blocks = [c for c in meant if c.own_parameter is None]
        hits = [s for c in blocks or meant for s in _parts(pattern, c)]
        if not hits:
            problems.append(_nothing(pattern, candidates))
        chosen |= {s.name: s for s in hits if not any(_covers(p, s, depth) for p in unwanted)}
    problems += [_nothing(p, candidates) for p in unwanted if not any(_meant(p, c, depth, set()) for c in candidates)]
    if problems:
        raise TargetError("\n".join(problems))
    if not chosen:
        raise TargetError("every site that targets names is also excluded: nothing is left to adapt.")
    return _ordered(chosen.values(), candidates)


def find_modules(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules with parameters that `patterns` name, for training in full."""
    ours = {"adapters", "copies"}
    named = {n: m for n, m in model.named_modules() if n and next(m.parameters(), None) is not None}
    named = {n: m for n, m in named.items() if not ours & set(n.split("."))}
    found: dict[str, nn.Module] = {}
    problems = []
    for pattern in as_patterns(patterns) if patterns else []:
        hits = {n: m for n, m in named.items() if pattern.name != ALL_LINEAR and pattern.names(n)}
        if not hits:
            problems.append(f"no module matches {pattern.text!r}.{_near(pattern.name, named)}")
        found |= hits
    if problems:
        raise TargetError("\n".join(problems))
    return {n: m for n, m in found.items() if not any(n.startswith(other + ".") for other in found)}


def find_named(model: nn.Module, names: Iterable[str], kinds: Sequence[str] = ()) -> list[Site]:
    """Return the sites with exactly these full names, as an adapter file lists them, in the model's order."""
    candidates = list(_candidates(model, kinds))
    by_name = {s.name: s for c in candidates for s in _parts(Pattern("", c.name), c)}
    sites, missing = [], []
    for name in names:
        found = _ROWS.search(name)
        whole = by_name.get(name[: found.start()] if found else name)
        if whole is None:
            missing.append(name)
        else:
            sites.append(_parts(Pattern.parse(name), whole)[0] if found else whole)
    if missing:
        raise TargetError(
            f"the adapter was made for another base model: there is no site called {missing[0]!r} here"
            + (f" (nor {len(missing) - 1} more)" if missing[1:] else "")
            + ". Load the base that the adapter's folder names."
        )
    return _ordered(sites, candidates)


def _ordered(sites: Iterable[Site], candidates: Sequence[Site]) -> list[Site]:
    """Return the sites in the model's order, parts of a weight by their place in it."""
    order = {c.path: i for i, c in enumerate(candidates)}
    return sorted(sites, key=lambda s: (order[s.path], s.rows or (0, 0), s.param, s.expert or 0))


def override_for(site: Site, overrides: dict[str, dict[str, Any]], depth: int) -> dict[str, Any]:
    """Return the settings that `overrides` gives this site; later patterns win."""
    settings: dict[str, Any] = {}
    for text, values in overrides.items():
        if _covers(Pattern.parse(text), site, depth):
            settings |= values
    return settings


def check_overrides(model: nn.Module, sites: Sequence[Site], overrides: dict[str, dict[str, Any]]) -> int:
    """Raise where an override pattern names none of the sites; returns the model's depth."""
    depth = _depth([*_candidates(model), *sites])
    unmatched = [
        _nothing(p, sites) for p in map(Pattern.parse, overrides) if not any(_covers(p, s, depth) for s in sites)
    ]
    if unmatched:
        raise TargetError("overrides: " + "\n".join(unmatched))
    return depth


def stacks_of(model: nn.Module) -> dict[str, int]:
    """Return how many layers each stack of the model has, by its name: one more than the largest number in it."""
    found: dict[str, int] = {}
    for site in _candidates(model):
        layer = layer_of(site.path)
        if layer is not None:
            found[layer.stack] = max(found.get(layer.stack, 0), layer.number + 1)
    return found


def _candidates(model: nn.Module, kinds: Sequence[str] = ()) -> Iterable[Site]:
    """Every weight a pattern can name, whole: one site per layer and one per stacked parameter (expert -1).

    Also the blocks whose kind is among `kinds`.
    """
    for path, module in model.named_modules():
        if set(path.split(".")) & {"adapters", "copies"}:
            continue
        yield from blocks_of(path, module, tuple(kinds), model)
        kind = kind_of(module)
        if kind is not None and path:
            yield Site(path, kind, module)
        elif kind is None:
            for param in stacked_parameters(module):
                yield Site(path, "expert", module, param, expert=-1)


def _depth(sites: Iterable[Site]) -> int:
    """The number of layers: negative layer numbers count from here."""
    return 1 + max((n for s in sites if (n := layer_number(s.path)) is not None), default=-1)


def _meant(pattern: Pattern, site: Site, depth: int, heads: set[int]) -> bool:
    name = site.path if site.expert is None else f"{site.path}.{site.param}"
    name = name or site.name  # a model that is itself the backbone
    if not pattern.in_layers(name, depth):
        return False
    if pattern.name == ALL_LINEAR:
        return site.kind in ("linear", "conv1d_hf", "rows", *BLOCKS) and id(site.module) not in heads
    return pattern.names(name)


def _covers(pattern: Pattern, site: Site, depth: int) -> bool:
    """Whether the pattern means this site, its part of the weight included: rows in rows, an expert among experts."""
    if not _meant(pattern, site, depth, set()):
        return False
    if pattern.experts is not None:
        return site.expert is not None and site.expert in range(len(site.tensor))[pattern.experts]
    if pattern.rows is None:
        return True
    if site.rows is None:
        return False
    start, stop = pattern.rows
    return (start or 0) <= site.rows[0] and (stop is None or site.rows[1] <= stop)


def _parts(pattern: Pattern, site: Site) -> list[Site]:
    """Narrow a whole candidate to the rows or experts the pattern names."""
    if site.expert is not None:
        count = site.tensor.shape[0]
        chosen = range(count)[pattern.experts] if pattern.experts else range(count)
        return [Site(site.path, "expert", site.module, site.param, expert=e) for e in chosen]
    if pattern.rows is None or site.own_parameter is None:
        return [site]
    out = site.shape.out
    start, stop = pattern.rows[0] or 0, out if pattern.rows[1] is None else pattern.rows[1]
    if site.kind not in ("linear", "conv1d_hf"):
        raise TargetError(
            f"{pattern.text!r}: a row range needs a linear layer, and {site.path} is of kind {site.kind}."
        )
    if not 0 <= start < stop <= out:
        raise TargetError(f"{pattern.text!r}: {site.path} has rows 0 to {out}, so the range must lie within them.")
    return [Site(site.path, "rows", site.module, rows=(start, stop))]


def output_heads(model: nn.Module) -> set[int]:
    """Return the identities of the modules of the output heads, which `all-linear` leaves out."""
    heads = set()
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if head is not None:
        heads.add(id(head))
    children = dict(model.named_children())
    for name in ("lm_head", "score", "classifier", "classification_head", "qa_outputs", "head", "fc"):
        if name in children and hasattr(model, "config"):
            heads |= {id(m) for m in children[name].modules()}
    return heads


def _nothing(pattern: Pattern, sites: Sequence[Site]) -> str:
    if pattern.name == ALL_LINEAR:
        return f"no linear layer matches {pattern.text!r} in this model."
    return f"no site matches {pattern.text!r}.{_near(pattern.name, [s.path or s.name for s in sites])}"


def _near(name: str, known: Iterable[str]) -> str:
    """Name the nearest endings, else a few that exist, so that a typing error is seen at a glance."""
    known = list(known)
    endings = list(dict.fromkeys(part for path in known for part in (path.rsplit(".", 1)[-1], path)))
    close = nearest(name.removeprefix("re:").rsplit(".", 1)[-1], endings)
    if close:
        return " Near names: " + ", ".join(close) + "."
    some = [e for e in endings if "." not in e][:8]
    return " The model has: " + ", ".join(some) + "." if some else " The model has no module that can be adapted."
