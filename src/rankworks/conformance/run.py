"""Running checks: which cases a check runs on, what came of it, and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import wraps
from typing import Any, Literal

from rankworks.conformance.case import Case, base_case, kind_cases, kinds_of, variant_cases
from rankworks.conformance.errors import ConformanceError, NotApplicable
from rankworks.conformance.optimizer_case import optimizer_cases
from rankworks.core.errors import ConfigError, RankworksError
from rankworks.core.registry import Method, get

Scope = Literal["once", "kinds", "variants", "all"]
Function = Callable[[Method, Any], None]  # the case is of the axis: a Case, an OptimizerCase


@dataclass(frozen=True)
class Check:
    """One named check. `scope` says on which cases it runs:

    `once` on the first kind of site, `kinds` on every kind the method claims, `variants` on the first kind with every
    choice of settings, `all` on both.
    """

    name: str
    axes: tuple[str, ...]
    scope: Scope
    run: Function
    says: str

    def cases(self, method: Method) -> list[Case]:
        """Return the cases this check runs on for a method."""
        if method.axis == "optimizer":
            return optimizer_cases(method, self.scope != "once")
        first = [base_case(method, kinds_of(method)[0])]
        kinds = kind_cases(method) if self.scope in ("kinds", "all") else first
        return kinds + (variant_cases(method) if self.scope in ("variants", "all") else [])


_CHECKS: dict[str, Check] = {}


def check(scope: Scope, *axes: str, weight: bool = False, merges: bool = False) -> Callable[[Function], Function]:
    """Make a function a check, named as the function; its failures carry the name and the case.

    `weight` says that it is about a changed weight, which a method that stands beside a block has not, `merges` that it
    merges.
    """

    def decorate(function: Function) -> Function:
        name = function.__name__

        @wraps(function)
        def named(method: Method, case: Case) -> None:
            if weight and getattr(method.cls, "weightless", False):
                raise NotApplicable("it stands beside a block and changes no weight")
            if merges and not getattr(method.cls, "mergeable", True):
                raise NotApplicable("there is nothing to merge it into: refused")
            try:
                function(method, case)
            except ConformanceError as error:
                error.check, error.case = name, str(case)
                raise

        says = (function.__doc__ or name).splitlines()[0].rstrip(".")
        _CHECKS[name] = Check(name, axes or ("delta", "init", "rank"), scope, named, says)
        return named

    return decorate


def checks(axis: str | None = None) -> list[Check]:
    """Return the checks (of one axis), in the order in which a report shows them."""
    return [c for c in _CHECKS.values() if axis is None or axis in c.axes]


@dataclass(frozen=True)
class Row:
    """What came of one check: `pass`, `fail` or `not applicable`, in how many seconds, and why."""

    check: str
    verdict: str
    seconds: float
    detail: str


@dataclass(frozen=True)
class Report:
    """What came of all checks of one method. `str()` is a table; `ok` says that none failed."""

    key: str
    axis: str
    title: str
    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no check failed (and some check passed)."""
        verdicts = {row.verdict for row in self.rows}
        return "fail" not in verdicts and "pass" in verdicts

    @property
    def seconds(self) -> float:
        """How long all checks took."""
        return sum(row.seconds for row in self.rows)

    def failures(self) -> list[Row]:
        """Return the rows that failed."""
        return [row for row in self.rows if row.verdict == "fail"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "ok": self.ok, "seconds": self.seconds}

    def __str__(self) -> str:
        width = max([len(row.check) for row in self.rows], default=5)
        lines = [
            f"{self.axis} {self.key!r}: {self.title}",
            f"{'check':<{width}}  {'verdict':<14} {'seconds':>7}  detail",
        ]
        lines.append("-" * (width + 34))
        lines += [f"{r.check:<{width}}  {r.verdict:<14} {r.seconds:>7.2f}  {r.detail}" for r in self.rows]
        count = {v: sum(r.verdict == v for r in self.rows) for v in ("pass", "fail", "not applicable")}
        lines.append(", ".join(f"{n} {verdict}" for verdict, n in count.items()) + f", in {self.seconds:.1f} s")
        return "\n".join(lines)


def run_check(one: Check, method: Method) -> Row:
    """Run one check on all its cases. Any failure is the verdict; without one, any case that applied makes a pass."""
    begun = time.perf_counter()
    passed, reasons, failure = [], {}, ""
    for case in one.cases(method):
        try:
            targets = case.targets()
            if not targets:
                raise NotApplicable(f"takes none of the tiny {case.kind} layers")
            one.run(method, case)
            passed.append(str(case))
        except NotApplicable as reason:
            reasons.setdefault(str(reason), []).append(str(case))
        except ConformanceError as error:
            failure = str(error)
        except RankworksError as error:
            failure = f"[{case}] was refused: {error}"
        except Exception as error:  # a broken method may raise anything, and the other checks still tell something
            failure = f"[{case}] raised {type(error).__name__}: {error}"
        if failure:
            return Row(one.name, "fail", time.perf_counter() - begun, " ".join(failure.split()))
    why = "; ".join(f"{reason} ({', '.join(where)})" for reason, where in reasons.items())
    seconds = time.perf_counter() - begun
    if not passed:
        return Row(one.name, "not applicable", seconds, why)
    detail = ", ".join(passed) if len(passed) <= 3 else f"{len(passed)} cases"
    return Row(one.name, "pass", seconds, detail + (f"; not: {why}" if why else ""))


def check_method(method: str | type | Method, axis: str = "delta", only: Sequence[str] = ()) -> Report:
    """Run every check of the axis (or those named in `only`) on a method: a key, a registered class, or an entry.

    Raises `UnknownNameError` for a key that does not exist and `ConfigError` for a class that is not registered.
    """
    method = find_method(method, axis)
    known = checks(method.axis)
    unknown = [name for name in only if name not in {c.name for c in known}]
    if unknown:
        raise ConfigError(f"no check of a {method.axis} is called {unknown[0]!r}: see rankworks.conformance.checks().")
    rows = [run_check(one, method) for one in known if not only or one.name in only]
    return Report(method.key, method.axis, method.title, rows)


def find_method(method: str | type | Method, axis: str = "delta") -> Method:
    """Return the registry's entry for a key, a class or an entry."""
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        return get(axis, method)
    spec = vars(method).get("Spec")
    if spec is None:
        raise ConfigError(
            f"{method.__name__} is not registered: put @delta(key, title=..., year=..., paper=...) (or @init) above it."
        )
    return spec.method
