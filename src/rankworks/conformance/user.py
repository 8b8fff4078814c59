"""Finding a method in a user's own file or module, at the user's explicit wish: this runs the file's code."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from rankworks.core.errors import ConfigError, did_you_mean
from rankworks.core.registry import Method, methods


def load_user_method(text: str) -> Method:
    """Return the method in `path/to/file.py`, `path/to/file.py:Class`, `package.module` or `package.module:Class`.

    Importing runs the file's code. Raises `ConfigError` where there is no such file or class, where it registers no
    method, or where it registers several and the class is not named.
    """
    where, _, name = text.rpartition(":") if _names_a_class(text) else (text, "", "")
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    found = [m for m in methods() if m.cls.__module__ == module.__name__]
    if not found:
        raise ConfigError(f"{where} registers no method: put @delta(...) or @init(...) of rankworks above its class.")
    by_name = {m.cls.__name__: m for m in found}
    if name:
        if name not in by_name:
            raise ConfigError(f"{where} registers no method class called {name!r}.{did_you_mean(name, by_name)}")
        return by_name[name]
    if len(found) > 1:
        raise ConfigError(
            f"{where} registers several methods ({', '.join(by_name)}): say which, as {where}:{found[0].cls.__name__}."
        )
    return found[0]


def _names_a_class(text: str) -> bool:
    """Whether what follows the last colon is a name (and not a path on a drive)."""
    return ":" in text and text.rpartition(":")[2].isidentifier()


def _import_file(path: Path) -> ModuleType:
    """Import a file under a name of its own; a second call reads it anew."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: give the Python file that defines the method.")
    name = f"rankworks_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: annotations of its classes are read from here
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        sys.modules.pop(name, None)
        raise
    except Exception as error:  # it is the user's code that runs here
        sys.modules.pop(name, None)
        raise ConfigError(f"{path} could not be imported: {type(error).__name__}: {error}.") from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name} could not be imported ({error}): give a Python file (path/to/file.py) or an importable module."
        ) from error
