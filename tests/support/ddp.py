"""Runs ddp_worker.py as one process and as two."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch


def train_twice(folder: Path, *arguments: str) -> tuple[dict[str, torch.Tensor], ...]:
    """The trained weights of one process that takes whole batches, and of two with half each."""
    script = str(Path(__file__).parent / "ddp_worker.py")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # By address and on the loopback interface: in a container the host's own name may lead nowhere.
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    for command in (["-m", *torchrun, f"--master-port={port}", script], [script]):
        done = subprocess.run(
            [sys.executable, *command, str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=240,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return tuple(torch.load(folder / f"{processes}.pt") for processes in (1, 2))
