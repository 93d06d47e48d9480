"""Runs in worker processes of one thread each."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from heterolora.bench.evidence.config import Trial

__all__ = ["Outcome", "work_off"]


@dataclass(frozen=True)
class Outcome:
    """What became of a run: a result, or why there is none.

    Attributes:
        result: as of `heterolora.bench.evidence.trial.Trials.run`; None after a failure.
        error: empty, or the error's message.
        trace: empty, or where an error came from that no one raised on purpose.
    """

    run: Trial
    result: dict[str, Any] | None
    error: str = ""
    trace: str = ""


def work_off(runs: Sequence[Trial], data: Path, workers: int) -> Generator[Outcome, None, None]:
    """The outcomes as they come. A worker does run after run, for importing takes seconds.

    The workers end when the iterator is closed, also in the middle of their runs. One that dies
    (killed for its memory, say) is reported with its run and is not replaced.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(runs))
    busy: dict[Connection, tuple[Any, Trial]] = {}
    started = []
    try:
        for _ in range(min(workers, len(runs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, data), daemon=True)
            process.start()
            # Ours would keep the pipe open when the worker dies.
            theirs.close()
            started.append(process)
            run = waiting.pop()
            ours.send(run)
            busy[ours] = process, run
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                process, run = busy.pop(ready)
                try:
                    outcome: Outcome = ready.recv()
                # Which of them depends on whether it died with the run still unread.
                except (EOFError, ConnectionError):
                    process.join()
                    yield Outcome(run, None, f"its process ended with {process.exitcode}")
                    continue
                # Before the caller gets the outcome, who may take long to save it. A worker that
                # died in between leaves the next run to the others.
                with contextlib.suppress(OSError):
                    if waiting:
                        ready.send(waiting[-1])
                        busy[ready] = process, waiting.pop()
                yield outcome
        for run in reversed(waiting):
            yield Outcome(run, None, "no worker process is left")
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()


def _work(connection: Connection, data: Path) -> None:
    # Ctrl-C reaches the whole process group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import torch
    from transformers.utils import logging

    from heterolora.bench.evidence.trial import Trials
    from heterolora.errors import HeteroLoraError

    # Of libraries, about themselves, in every run.
    warnings.filterwarnings("ignore", module="peft|transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    trials = Trials(data)
    while True:
        try:
            run = connection.recv()
        except EOFError:
            return
        try:
            outcome = Outcome(run, trials.run(run))
        except HeteroLoraError as error:
            outcome = Outcome(run, None, str(error))
        except Exception as error:
            outcome = Outcome(run, None, repr(error), traceback.format_exc())
        connection.send(outcome)
