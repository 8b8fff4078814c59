"""The processes of a run: one, or those that `accelerate launch` or `torchrun` started.

Connections are closed before the interpreter is (`leave`, or at the latest when it exits). What closes them waits for
the threads that serve them; where a wrapped model is the last to hold them, or the interpreter is going down already,
that happens with the interpreter locked, and a thread that waits for it then hangs the process or aborts it, now and
then.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os

import torch
import torch.distributed as dist
from accelerate import PartialState


def processes() -> PartialState:
    """Return what accelerate knows of the processes; joins them on the first call.

    accelerate joins processes on the CPU only when told so: they are there where no accelerator is, or where the
    launcher asked for the CPU.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    state = PartialState(cpu=asked or not torch.accelerator.is_available())
    if state.num_processes > 1:
        _close_at_exit()
    return state


def leave() -> None:
    """Take leave of the other processes at the end of a program, when no loop is alive any more.

    All wait for each other, so that no connection is closed under one that still speaks.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        close()


def close() -> None:
    """Close this process's connections. Raises nothing where there are none."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # wrapped models that nobody uses
        dist.destroy_process_group()


@functools.cache
def _close_at_exit() -> None:
    atexit.register(close)
