"""Dynamic search under DDP: every process decides alike, and as one process would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import ddp_search_worker
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["shortcuts"]], ids=["LoRA", "LoRA and shortcuts"])
def test_two_processes_decide_as_one(tmp_path, options):
    """On gloo. What the processes check themselves is in the script."""
    script = str(Path(__file__).parents[2] / "support" / "ddp_search_worker.py")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, f"--master-port={port}", script, str(tmp_path), *options],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ddp_search_worker.main(str(tmp_path), *options)
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert [step for step, _, _ in one] == [0, 4, 8, 10, 14, 18]
    assert [step for step, _, _ in two] == [0, 4, 8, 10, 14, 18]
    assert len({tuple(ranks.values()) for _, _, ranks in one}) > 1
    assert {len(ranks) for _, _, ranks in one} == {17 if options else 6}
    # Before anything has trained, only the order of the sums differs.
    for name, score in one[0][1].items():
        assert two[0][1][name] == pytest.approx(score, rel=1e-5), name
    assert [ranks for _, _, ranks in two] == [ranks for _, _, ranks in one]
