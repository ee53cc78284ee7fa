"""Training on several processes: starting them, what they agree on, and what if one is lost.

PyTorch's elastic agent starts the processes of one machine and ends them all when one fails; its
`torchrun` does the same on several machines. Lightning Fabric connects them.
"""

import ctypes
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import numpy as np
import torch
import torch.distributed
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy

from dropserve.models.errors import ConfigError, ProcessLost

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another that neither answers nor closes its connection."""
_PR_SET_PDEATHSIG = 1
_LOST = re.compile("gloo|nccl|socket|connection|timed out|broken pipe", re.IGNORECASE)
"""In messages of a lost connection."""
REMEDY = "all finished epochs are kept: start it again with --resume"


def is_started() -> bool:
    """Say if this is one of several processes that `torchrun`, or `run`, has started."""
    return torch.distributed.is_torchelastic_launched()


def run(command: Sequence[str], count: int) -> int:
    """Run a Python command in so many processes of this machine, and return their exit status.

    If one fails, or this process is told to end, all are ended. ProcessLost: one was killed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="dropserve",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(os.devnull),
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        status = max(f.exitcode for f in error.failures.values())
        ended = {rank: f.signal_name() for rank, f in error.failures.items() if f.exitcode < 0}
        first = {rank: name for rank, name in ended.items() if name != "SIGTERM"}
        if ended := first or ({} if status > 0 else ended):  # the agent ends the others by SIGTERM
            which = ", ".join(f"{rank} was ended by {name}" for rank, name in ended.items())
            reason = f"of the processes 0 to {count - 1}, {which}"
            raise ProcessLost(f"{reason}; {REMEDY}") from error
        return status
    return 0


def is_further() -> bool:
    """Say if another process of this machine has the same files, options and errors as this one."""
    return is_started() and os.environ["LOCAL_RANK"] != "0"


def launch(
    device: str = "auto", precision: Precision = "32-true", devices: int | None = None
) -> Fabric:
    """Choose where to train, and connect to the other processes if this is one of several.

    ConfigError: these are not `devices` on a machine.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    machines = int(os.environ["GROUP_WORLD_SIZE"]) if is_started() else 1
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if is_started() else 1
    if devices not in (None, here):
        raise ConfigError(f"torchrun has started {here} processes here, not {devices} devices")
    several = DDPStrategy(timeout=TIMEOUT) if machines * here > 1 else "auto"
    if is_started() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # end if the agent is killed
    fabric = Fabric(
        accelerator=device, devices=here, num_nodes=machines, strategy=several, precision=precision
    )
    fabric.launch()
    return fabric


def broadcast_bytes(fabric: Fabric, data: bytes) -> bytes:
    """Return the bytes of the first process, in each of them; nothing is pickled."""
    if not torch.distributed.is_initialized():
        return data
    size = torch.tensor([len(data)], device=fabric.device)
    torch.distributed.broadcast(size, 0)
    here = data if fabric.is_global_zero else bytes(int(size))
    content = torch.tensor(np.frombuffer(here, np.uint8), device=fabric.device)
    torch.distributed.broadcast(content, 0)
    return content.cpu().numpy().tobytes()


def check_all(fabric: Fabric, wrong: str) -> None:
    """Raise ConfigError in each process if something is wrong in one: there with its reason."""
    count = torch.tensor(float(bool(wrong)), device=fabric.device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
    if count:
        own = f"this process differs from the first: {wrong}" if wrong else ""
        raise ConfigError(own or "a process differs from the first: its output says in what")


@contextmanager
def losses_named(fabric: Fabric, when: str) -> Iterator[None]:
    """Turn an error of the connection to the other processes into ProcessLost."""
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own
        of_connection = isinstance(error, torch.distributed.DistError) or _LOST.search(str(error))
        if fabric.world_size == 1 or not of_connection:
            raise
        reason = f"{when}: another process was lost"
        raise ProcessLost(f"{reason} ({error}); {REMEDY}") from error
