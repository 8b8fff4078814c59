"""Several processes of one script on this machine, as torchrun or another launcher starts them.

They talk over the loopback device, whatever this machine calls itself and whoever answers to that name. Should they not
come to an end, each is told to print where it stands before it dies, and the test shows that.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

TORCHRUN = ("torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")


def launched(
    script: Path | str, *arguments: object, processes: int = 2, start: Sequence[str] = TORCHRUN, seconds: float = 300
) -> str:
    """Run a script of a tests' folder, or a module, in so many processes; return what they said.

    start: the launcher's module and what else it needs; seconds: how long before it counts as hung.
    """
    own = [script.parent] if isinstance(script, Path) else []
    paths = dict.fromkeys(map(str, (*own, Path(__file__).parent, Path(__file__).parent / "train")))
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": loopback, "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip
    program = [str(script)] if isinstance(script, Path) else ["-m", script]
    command = [sys.executable, "-m", *start, f"--{_count(start)}={processes}", *program, *map(str, arguments)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        try:
            said, _ = run.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for process in psutil.Process(run.pid).children(recursive=True):
                process.send_signal(signal.SIGABRT)  # on which faulthandler prints every thread's stack
            said, _ = run.communicate(timeout=60)
            raise AssertionError(f"hung for {seconds:g} s:\n{said[-20000:]}") from None
    assert run.returncode == 0, said[-20000:]
    return said


def _count(start: Sequence[str]) -> str:
    """What the launcher calls the number of processes."""
    return "num_processes" if start[0].startswith("accelerate") else "nproc_per_node"
