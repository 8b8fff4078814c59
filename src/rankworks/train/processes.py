"""The processes of a run: one, or those that `accelerate launch` or `torchrun` started."""

from __future__ import annotations

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
    return PartialState(cpu=asked or not torch.accelerator.is_available())


def leave() -> None:
    """Take leave of the other processes at the end of a program.

    All wait for each other, so that no connection is closed under one that still speaks, and none is left open for the
    interpreter to close on its way out.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
