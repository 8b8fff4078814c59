"""`rankworks methods`: the registry as a table, and a page for one method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankworks.cli.output import Output, command, facts, output, plain, table

if TYPE_CHECKING:
    from rankworks.core.registry import Method


def methods(
    key: Annotated[str | None, typer.Argument(help="A method's key, for its own page.", show_default=False)] = None,
    axis: Annotated[
        str | None, typer.Option(help="Only the methods of one axis, e.g. delta or init.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON: a list of objects.")] = False,
) -> None:
    """List the methods, or show one: equation, settings, defaults, source.

    Examples:
      rankworks methods                 all of them, by axis
      rankworks methods --axis delta    how the change of a weight is formed
      rankworks methods vera            the page of one
      rankworks methods --json          key, axis, title, paper, year, summary,
                                        and the settings with their defaults

    Methods of different axes combine: adapt.delta=dora adapt.init=pissa
    """
    from rankworks import methods as registered
    from rankworks.core.errors import UnknownNameError, did_you_mean

    everything = registered()
    axes = sorted({method.axis for method in everything})
    if axis is not None and axis not in axes:
        raise UnknownNameError(f"no axis is called {axis!r}.{did_you_mean(axis, axes)}")
    chosen = [method for method in everything if axis in (None, method.axis)]
    if key is not None:
        known = [method.key for method in chosen]
        chosen = [method for method in chosen if method.key == key]
        if not chosen:
            raise UnknownNameError(f"no method is called {key!r}.{did_you_mean(key, known)}")
    with output(as_json) as out:
        if key is not None:
            for method in chosen:
                _page(out, method)
        else:
            _list(out, chosen)
        out.emit([_described(method) for method in chosen])


def _list(out: Output, chosen: list[Method]) -> None:
    """Print a table per axis."""
    for axis in dict.fromkeys(method.axis for method in chosen):
        rows = [method for method in chosen if method.axis == axis]
        out.head(f"{axis}  ({len(rows)})")
        listed = table("key", "title", "year", "paper", "what it does")
        for method in rows:
            listed.add_row(method.key, method.title, str(method.year), method.paper, method.summary)
        out.show(listed)
    out.show(f"\nThe page of one method, with its equation and settings:  {command('methods', chosen[0].key)}")


def _page(out: Output, method: Method) -> None:
    """Print everything about one method."""
    out.head(f"{method.title}  ({method.tag}={method.key})")
    kinds = getattr(method.cls, "kinds", None)
    shown = {"source": f"{method.paper} ({method.year})", "class": method.origin}
    if kinds:
        shown["sites"] = ", ".join(kinds)
    if hasattr(method.cls, "additive"):
        start = "starts as the base model" if method.cls.unchanged_at_init else "starts away from the base model"
        shown["nature"] = f"{'additive' if method.cls.additive else 'multiplies the weight'}; {start}"
    out.show(facts(shown))
    out.show()
    out.show(equation(method), style="cyan")
    rows = settings(method)
    out.head("settings" if rows else "no settings")
    if rows:
        listed = table("name", "default", "values", "meaning")
        for row in rows:
            listed.add_row(row["name"], _yaml(row["default"]), row["values"], row["help"])
        out.show(listed)
    out.head("try it")
    place = "optim.name" if method.axis == "optimizer" else f"adapt.{method.tag}"
    out.show("  " + command("train", "FILE.yaml", f"{place}={method.key}"))
    if method.axis == "delta":
        out.show("  " + command("plan", "--model", "smollm2-135m", "--delta", method.key))
    if method.axis == "optimizer":
        out.show("  " + command("plan", "--model", "smollm2-135m", "--optimizer", method.key))
    out.show("  " + command("check", method.key))


def equation(method: Method) -> str:
    """Return the text that opens the method's file: its equation, what it is for, and the source."""
    import inspect

    return inspect.getdoc(inspect.getmodule(method.cls)) or inspect.getdoc(method.cls) or method.title


def settings(method: Method) -> list[dict[str, Any]]:
    """Return the settings of a method: name, default, values (type and limits) and help."""
    rows = []
    for name, field in method.Spec.model_fields.items():
        if name == method.tag:
            continue
        default = field.get_default(call_default_factory=True)
        default = default.model_dump(mode="json") if hasattr(default, "model_dump") else default
        rows.append(
            {
                "name": name,
                "default": plain(default),
                "values": _values(field, method.axis),
                "help": field.description or "",
            }
        )
    return rows


def _values(field: Any, axis: str) -> str:
    """Return the type and the limits of a field in words: `int from 0 to 65536`, `standard | rslora`.

    axis: of the field's method, and of a method that it takes.
    """
    limits = {type(m).__name__.lower(): getattr(m, type(m).__name__.lower(), None) for m in field.metadata}
    words = [
        f"{word} {limits[limit]:g}"
        for limit, word in (("gt", "above"), ("ge", "from"), ("lt", "below"), ("le", "to"))
        if isinstance(limits.get(limit), int | float)
    ]
    kind, none = _kind(field.annotation), ""
    if kind.endswith(NONE):
        kind, none = kind.removesuffix(NONE), NONE
    kind = kind.replace("MethodSpec", f"{'an' if axis[0] in 'aeiou' else 'a'} {axis}")
    return " ".join([kind, *words]) + none


NONE = " or none"


def _kind(note: Any) -> str:
    """Return a type as it is written in YAML, in words."""
    from types import UnionType
    from typing import Annotated, Literal, Union, get_args, get_origin

    origin, inside = get_origin(note), get_args(note)
    if origin is Literal:
        return " | ".join(map(str, inside))
    if origin is Annotated:
        return _kind(inside[0])
    if origin in (Union, UnionType):
        kinds = [_kind(each) for each in inside if each is not type(None)]
        return " | ".join(kinds) + NONE * (type(None) in inside)
    if origin is list:
        return f"list of {_kind(inside[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_kind, inside))}]"
    if origin is dict:
        return f"mapping of {_kind(inside[0])} to {_kind(inside[1])}"
    return "text" if note is str else str(note.__name__)


def _described(method: Method) -> dict[str, Any]:
    return {
        "key": method.key,
        "axis": method.axis,
        "title": method.title,
        "paper": method.paper,
        "year": method.year,
        "summary": method.summary,
        "settings": settings(method),
    }


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("\n...").strip()
