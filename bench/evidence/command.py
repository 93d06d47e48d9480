"""`heterolora bench evidence`: its options and what it does."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heterolora.bench.evidence.config import Config, Trial
    from heterolora.bench.evidence.store import Store

__all__ = ["BEGIN", "END", "add_arguments", "run", "tables", "updated"]

BEGIN, END = "<!-- evidence -->", "<!-- /evidence -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench evidence`."""
    parser.add_argument(
        "config", nargs="?", type=Path, help="the configuration: a JSON file, or main"
    )
    # These two are read before the name of the program too, and must not be overwritten.
    parser.add_argument(
        "--list", action="store_true", help="list the arms and stop", default=argparse.SUPPRESS
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the tasks' folders")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of results", default=argparse.SUPPRESS
    )
    parser.add_argument(
        "--model", metavar="NAME", help="minilm or a model folder, in place of the configuration's"
    )
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="runs at a time (default: 2)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="ARM", help="these arms of the configuration only"
    )
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="print the tables of folders of results; one with ablations is for its scores only",
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help=f"with --report: write the table here, between {BEGIN} and {END} if the file has them",
    )
    parser.add_argument("--png", type=Path, metavar="DIR", help="with --report: write the pictures")


def run(args: argparse.Namespace, argv: list[str] | None = None) -> int:
    """0: everything asked for is done. 1: a run failed. 130: stopped by Ctrl-C or SIGTERM.

    Args:
        args: from a parser with the options above.
        argv: not used: results name their configuration.

    Raises:
        BenchError: the request makes no sense, or a file is malformed.
        DataError: a task's data is missing or malformed.
        ModelError: the model is missing, or not of the kind that a task needs.
    """
    from heterolora.bench.evidence.config import read_config
    from heterolora.bench.evidence.store import Store
    from heterolora.bench.harness.interrupt import terminable
    from heterolora.bench.harness.timing import BenchError

    if args.report is not None:
        return _report(args)
    if args.config is None:
        raise BenchError("give a configuration: a JSON file, or main")
    config = read_config(args.config)
    if args.model is not None:
        config = replace(config, recipe=replace(config.recipe, model=args.model))
    arms = _selected(config, args.only)
    if args.list:
        return _list(config, arms)
    if args.data is None or args.out is None:
        raise BenchError("`bench evidence` needs --data (the tasks' folders) and --out (results)")
    if args.workers < 1:
        raise BenchError(f"--workers must be at least 1, not {args.workers}")
    _check(config, arms, args.data)
    store = Store(args.out)
    with terminable(), store.locked():
        try:
            command = f"evidence {args.config.stem}"
            failed = _work(config, arms, store, args.data, args.workers, command)
        except KeyboardInterrupt:
            _say("stopped; what is done is kept: run the same command again to go on")
            return 130
    for name in failed:
        _say(f"failed: {name}")
    return 1 if failed else 0


def _selected(config: Config, only: Sequence[str] | None) -> tuple[str, ...]:
    from heterolora.bench.harness.timing import BenchError

    unknown = [arm for arm in only or () if arm not in config.arms]
    if unknown:
        raise BenchError(f"--only {unknown[0]}: the configuration has {', '.join(config.arms)}")
    return tuple(arm for arm in config.arms if only is None or arm in only)


def _list(config: Config, arms: Sequence[str]) -> int:
    from heterolora.bench.evidence.arms.registry import ARMS
    from heterolora.bench.evidence.plan import choices

    width = max(map(len, arms))
    for name in arms:
        arm = ARMS[name]
        print(f"{name:<{width}}  {arm.about} (learning rate of {arm.family})")
    choosing = sum(len(choice.runs) for choice in choices(config, arms))
    final = len(arms) * len(config.epochs) * len(config.ranks) * len(config.seeds)
    print(f"\n{final} runs, and {choosing} to choose learning rates")
    return 0


def _check(config: Config, arms: Sequence[str], data: Path) -> None:
    """Before a worker is started, and all of it: a task may come hours later."""
    from heterolora.bench.evidence.arms.registry import ARMS
    from heterolora.bench.evidence.tasks.registry import TASKS
    from heterolora.bench.harness.timing import BenchError

    for task in config.epochs:
        unfit = [arm for arm in arms if ARMS[arm].encoder and not TASKS[task].encoder]
        if unfit:
            raise BenchError(
                f"task {task} has a model without task head and BERT's layers, which these arms "
                f"need: {', '.join(unfit)}; leave them out, or the task"
            )
        TASKS[task].load(data)
    with _quiet():
        for task in config.epochs:
            TASKS[task].check(config.recipe.model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of the weights of a new head."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _work(
    config: Config, arms: Sequence[str], store: Store, data: Path, workers: int, command: str
) -> list[str]:
    """Learning rates first, then the runs. Returns the names of what failed."""
    import torch

    from heterolora.bench.evidence.plan import choices, final_runs
    from heterolora.bench.harness import record
    from heterolora.bench.harness.timing import BenchError

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = {**record.environment(device, [command]), "workers": workers, "threads": 1}
    questions = choices(config, arms)
    preliminary = [run for choice in questions for run in choice.runs]
    failed = _all(preliminary, "learning rates", store, data, workers, environment)
    rates = {}
    for choice in questions:
        try:
            rate, why = choice.settle(store.result)
        except BenchError as error:
            failed.append(str(error))
            continue
        store.save_choice(choice.name, why)
        rates[choice.task, choice.rank, choice.family] = rate
    final = final_runs(config, arms, rates)
    return failed + _all(final, "runs", store, data, workers, environment)


def _all(
    runs: Sequence[Trial],
    what: str,
    store: Store,
    data: Path,
    workers: int,
    environment: dict[str, Any],
) -> list[str]:
    from heterolora.bench.evidence.pool import work_off

    todo = [run for run in runs if store.result(run) is None]
    failed = []
    with (
        _progress(what, len(runs), len(runs) - len(todo)) as advance,
        closing(work_off(todo, data, workers)) as outcomes,
    ):
        for outcome in outcomes:
            name = outcome.run.name
            if outcome.result is None:
                failed.append(f"{name}: {outcome.error}")
                advance(f"{name}: failed, {outcome.error}\n{outcome.trace}".rstrip())
            else:
                store.save(outcome.run, outcome.result, environment)
                advance(f"{name}: {_figures(outcome.result)}")
    return failed


def _figures(result: dict[str, Any]) -> str:
    if result["diverged"]:
        return "diverged"
    metrics = [
        f"{name} {result[name]:.4f}" for name in ("loss", "accuracy", "pearson") if name in result
    ]
    return ", ".join([*metrics, f"{result['seconds']['wall']:.0f} s"])


@contextmanager
def _progress(what: str, total: int, done: int) -> Iterator[Any]:
    """Gives a function that takes a line for each run that has ended."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        start, count = time.monotonic(), 0

        def line(text: str) -> None:
            nonlocal count
            count += 1
            left = (time.monotonic() - start) / count * (total - done - count)
            _say(f"[{done + count}/{total}, {left / 60:.0f} min left] {text}")

        yield line
        return
    with Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        task = bar.add_task(what, total=total, completed=done)

        def advance(text: str) -> None:
            bar.console.print(text, markup=False, highlight=False)
            bar.advance(task)

        yield advance


def _report(args: argparse.Namespace) -> int:
    from heterolora.bench.evidence.report.ablation import is_ablation, predictions
    from heterolora.bench.evidence.store import Store
    from heterolora.bench.harness.timing import BenchError

    if find_spec("scipy") is None:
        raise BenchError(
            "the report needs scipy, which is missing: pip install 'heterolora[bench]'"
        )
    folders = [list(Store(folder).tests()) for folder in args.report]
    text = tables(folders)
    if args.png is not None:
        from heterolora.bench.evidence.report.pictures import write_pngs, write_predictions

        for entries in folders:
            if any(map(is_ablation, entries)):
                written = write_predictions(predictions(entries), args.png)
            else:
                written = write_pngs(entries, args.png)
            for path in written:
                _say(f"wrote {path}")
    if args.markdown is None:
        if args.png is None:
            print(text, end="")
        return 0
    try:
        page = args.markdown.read_text(encoding="utf-8") if args.markdown.exists() else ""
        args.markdown.write_text(updated(page, text), encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{args.markdown}: cannot be written ({error.strerror})") from error
    return 0


def tables(folders: Sequence[Sequence[dict[str, Any]]]) -> str:
    """All that is said of the results in some folders, as Markdown.

    Where modules were ablated the other arms are there for their scores, after a shorter training.

    Raises:
        BenchError: there is nothing to report, or an arm has two results for one seed.
    """
    from heterolora.bench.evidence.report import ablation, table

    return "\n".join(
        (ablation if any(map(ablation.is_ablation, entries)) else table).markdown(entries)
        for entries in folders
    )


def updated(page: str, table: str) -> str:
    """A page with its block written anew, or the table alone where it has none."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    return f"{head}{begin}\n\n{table}\n{end}{tail}" if begin and end else table


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
