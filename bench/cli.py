"""Command line of the bench, shared by `heterolora bench` and `python -m heterolora.bench`."""

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from heterolora.bench.cases.registry import Case
    from heterolora.bench.harness.record import BenchRun, CaseResult

__all__ = ["EPILOG", "RESULTS", "add_arguments", "run"]

EPILOG = """\
examples:
  heterolora bench --list
  heterolora bench --quick
  heterolora bench --case 'minilm-*' --rounds 15 --json minilm.json
  heterolora bench --compile --out bench/results
  heterolora bench report bench/results --html bench.html --png plots
  heterolora bench --explain --case 'linears-*'
  heterolora bench gpu --minutes 8 --out gpu
  heterolora bench gpu --tune --minutes 30 --out gpu
  heterolora bench evidence main --data data --out evidence
  heterolora bench evidence --report evidence
"""

RESULTS = Path(__file__).resolve().parent / "results"
_ROUNDS, _QUICK_ROUNDS = 15, 3
_MINUTES = 8.0
_OF_RUN = ("case", "quick", "compile", "explain", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Four programs: cases are run where no other is named."""
    _add_run(parser)
    programs = parser.add_subparsers(metavar="PROGRAM", help="run (default), or:")
    _add_run(programs.add_parser("run", help="run cases"), again=True)
    report = programs.add_parser("report", help="tables, pages and plots of result files")
    _add_report(report)
    gpu = programs.add_parser(
        "gpu",
        help="check and measure a GPU, cases in order of importance, going on where an earlier run "
        "stopped",
    )
    _add_gpu(gpu)
    evidence = programs.add_parser(
        "evidence", help="train arms of rank allocation on real tasks, likewise; in a checkout"
    )
    _add_evidence(evidence)


def _add_evidence(parser: argparse.ArgumentParser) -> None:
    if find_spec("heterolora.bench.evidence") is None:
        parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
        parser.set_defaults(program=_no_evidence)
        return
    # It stays out of the wheel: only a checkout has it.
    from heterolora.bench.evidence import command

    command.add_arguments(parser)
    parser.set_defaults(program=command.run)


def _no_evidence(args: argparse.Namespace, argv: list[str] | None) -> int:
    from heterolora.bench.harness.timing import BenchError

    raise BenchError(
        "`bench evidence` and its results are in the repository, not in the package: clone it, and "
        "run the command there after `make`"
    )


def _add_measuring(parser: argparse.ArgumentParser, *, again: bool) -> None:
    """Options of every program that measures.

    Args:
        again: the parser before this one has them too, so what it read is not to be overwritten.
    """

    def default(value: Any) -> Any:
        return argparse.SUPPRESS if again else value

    parser.add_argument(
        "--rounds",
        type=int,
        default=default(None),
        metavar="N",
        help=f"timed rounds a case (default: {_ROUNDS}, gpu: 10)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=default(1),
        metavar="N",
        help="CPU threads (default: 1)",
    )
    parser.add_argument(
        "--device", default=default("auto"), metavar="DEVICE", help="auto, cpu, cuda or cuda:N"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=default(None),
        metavar="DIR",
        help="folder of results: DIR/<device>/<case>.json, and what else a program keeps",
    )


def _add_run(parser: argparse.ArgumentParser, *, again: bool = False) -> None:
    def add(name: str, **options: Any) -> None:
        if again:
            options["default"] = argparse.SUPPRESS
        parser.add_argument(name, **options)

    parser.set_defaults(program=_run)
    add("--list", action="store_true", help="list the cases and stop")
    add(
        "--case",
        action="append",
        metavar="NAME",
        help="case to run, or a pattern such as 'minilm-*'; may be repeated (default: all that "
        "suit the device)",
    )
    add(
        "--quick",
        action="store_true",
        help=f"{_QUICK_ROUNDS} rounds, and only the small cases unless --case names others",
    )
    add("--compile", action="store_true", help="add torch.compile variants (about a minute each)")
    _add_measuring(parser, again=again)
    add("--json", type=Path, metavar="FILE", help="write all results to one file")
    add(
        "--explain",
        action="store_true",
        help="time nothing: print which path every group takes here, and what was measured",
    )


def _add_gpu(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(program=_gpu)
    _add_measuring(parser, again=True)
    parser.add_argument(
        "--minutes",
        type=float,
        default=_MINUTES,
        metavar="N",
        help=f"time to spend (default: {_MINUTES})",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="spend it on tiles, and on the times dispatch looks up",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(program=_report)
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="the folder of result files (default: those that come with heterolora)",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one HTML page")
    parser.add_argument("--png", type=Path, metavar="DIR", help="write the plots")
    parser.add_argument(
        "--dispatch",
        type=Path,
        metavar="DIR",
        help="write the tables that dispatch looks up, DIR/<device>.json",
    )
    parser.add_argument(
        "--readme",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="bring the numbers between the <!-- bench:... --> marks of FILE up to date; may be "
        "repeated",
    )


def run(args: argparse.Namespace, argv: list[str] | None = None) -> int:
    """0: every case green, every variant ran. 1: a red parity gate, or a variant that failed.

    Args:
        args: from a parser that `add_arguments` filled.
        argv: arguments for the record; default those of the process.

    Raises:
        BenchError: the request itself makes no sense (unknown case, no rounds, no such device,
            ...).
    """
    if args.program is not _run:
        # Options of `run` are read before the name of a program too.
        own = next((name for name in _OF_RUN if getattr(args, name, None)), None)
        if own is not None:
            from heterolora.bench.harness.timing import BenchError

            raise BenchError(f"--{own} is of `bench run`, and not of the program that was named")
    status: int = args.program(args, argv)
    return status


def _run(args: argparse.Namespace, argv: list[str] | None) -> int:
    from rich.console import Console

    from heterolora.bench.cases import registry as cases
    from heterolora.bench.report import tables as report

    out = Console()
    if args.list:
        width = max(map(len, cases.CASES))
        for case in cases.CASES.values():
            print(f"{case.name:<{width}}  {case.description}")
        return 0

    if args.explain:
        return _explain(args, out)

    import torch

    from heterolora.bench.harness import record
    from heterolora.bench.harness import timing as harness
    from heterolora.bench.harness.ceilings import ceilings

    rounds = args.rounds if args.rounds is not None else _QUICK_ROUNDS if args.quick else _ROUNDS
    if rounds < 1:
        raise harness.BenchError(f"--rounds must be at least 1, not {rounds}")
    device = _device(args.device)
    chosen = cases.select(args.case, quick=args.quick, device=device.type)
    for target in filter(None, (args.json, args.out)):
        _check_writable(target)

    with harness.cpu_threads(args.threads):
        found = record.environment(device, argv)
        found["ceilings"] = ceilings(device, scale=1 / 16 if args.quick else 1.0)
        measured = record.BenchRun(found, [])
        for result in _results(chosen, rounds, device, args.compile):
            measured.results.append(result)
            _print_result(out, result)
            if args.out is not None:
                folder = args.out / record.slug(measured.environment["device"])
                single = record.BenchRun(measured.environment, [result])
                record.write_run(single, folder / f"{result.case}.json")
            # After every case: an interrupted run keeps what it has measured.
            if args.json is not None:
                record.write_run(measured, args.json)
        out.print(report.environment_line(measured), style="dim", highlight=False)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _status(measured)


def _gpu(args: argparse.Namespace, argv: list[str] | None) -> int:
    from heterolora.bench.gpu import suite
    from heterolora.bench.harness import timing as harness

    if args.out is None:
        raise harness.BenchError("`bench gpu` keeps what it measures in a folder: --out DIR")
    device = _device(args.device)
    if device.type != "cuda" and args.device == "auto":
        raise harness.BenchError("no CUDA device here; --device cpu rehearses with tiny cases")
    rounds = suite.ROUNDS if args.rounds is None else args.rounds
    with harness.cpu_threads(args.threads):
        return suite.run(
            args.out, device, minutes=args.minutes, tune=args.tune, rounds=rounds, argv=argv
        )


def _report(args: argparse.Namespace, argv: list[str] | None) -> int:
    from heterolora.bench.gpu import calibrate
    from heterolora.bench.harness.timing import BenchError
    from heterolora.bench.report import page, plots, readme
    from heterolora.bench.report import tables as report
    from heterolora.bench.report.targets import targets_table
    from heterolora.kernels.tuned import measured

    runs = report.read_folder(args.folder)
    if args.html is not None:
        _check_writable(args.html)
        page.write_page(runs, args.html)
    if args.png is not None:
        _check_writable(args.png)
        plots.write_pngs(runs, args.png)
    if args.dispatch is not None:
        _check_writable(args.dispatch)
        for path, tuned in calibrate.path_tables(runs, args.dispatch).items():
            measured.write(tuned, path)
    for file in args.readme:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise BenchError(f"{file}: cannot be read ({error.strerror})") from error
        file.write_text(readme.update(text, runs), encoding="utf-8")
    if args.html is args.png is args.dispatch is None and not args.readme:
        # Not through the console: a Markdown table must not be wrapped to the terminal.
        print(report.markdown_table(runs), end="")
        print(f"\n## Targets on a GPU\n\n{targets_table(runs)}")
    return 0


def _explain(args: argparse.Namespace, out: "Console") -> int:
    from heterolora.bench.cases import registry as cases
    from heterolora.bench.gpu import explain
    from heterolora.bench.harness import timing as harness
    from heterolora.console import write_json

    chosen = cases.select(args.case, quick=args.quick)
    if not args.case:
        chosen = [case for case in chosen if case.described]
    device = _device(args.device)
    explained = []
    with harness.cpu_threads(args.threads):
        for case in chosen:
            explained.append(explain.explain_case(case, device))
            explain.print_explained(out, explained[-1])
    if args.json is not None:
        write_json(str(args.json), explain.as_json(explained))
    return 0


def _results(
    chosen: "list[Case]", rounds: int, device: Any, compiled: bool
) -> "Iterator[CaseResult]":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from heterolora.bench import runner

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
        # A redraw thread would run, and be timed, inside the steps.
        auto_refresh=False,
    ) as progress:
        for index, case in enumerate(chosen):
            task = progress.add_task("", total=rounds)

            def phase(text: str, task: Any = task, case: Any = case, index: int = index) -> None:
                label = f"[{index + 1}/{len(chosen)}] {case.name}: {text}".replace("[", "\\[")
                progress.update(task, description=label)
                progress.refresh()

            def done(count: int, task: Any = task) -> None:
                progress.update(task, completed=count)
                progress.refresh()

            result = runner.run_case(
                case,
                device=device,
                rounds=rounds,
                compiled=compiled,
                on_phase=phase,
                on_round=done,
            )
            progress.remove_task(task)
            yield result


def _print_result(out: "Console", result: "CaseResult") -> None:
    from rich.table import Table
    from rich.text import Text

    from heterolora.bench.report import tables as report

    if result.timing is None:
        out.print(Text(f"{result.case}: RED, not timed. {result.parity.reason}", style="red"))
        return
    out.print(Text(f"{result.case}: {result.description}", style="bold"))
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(report.HEADER):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in report.case_rows(result):
        table.add_row(*row)
    out.print(table)
    gate = result.parity
    out.print(
        Text(f"parity: output {gate.output:.2g}, worst gradient {gate.gradient:.2g} ({gate.rule})")
    )
    for name, why in result.failed.items():
        out.print(Text(f"{name} could not run: {why}", style="red"))


def _device(name: str) -> Any:
    import torch

    from heterolora.bench.harness.timing import BenchError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BenchError(f"--device {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise BenchError(f"--device {name!r}: only CPU and CUDA devices are measured")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BenchError(f"--device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _check_writable(target: Path) -> None:
    from heterolora.bench.harness.timing import BenchError

    folder = target if target.suffix == "" else target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"{folder}: cannot be written to ({error.strerror})") from error


def _status(measured: "BenchRun") -> int:
    return 0 if all(result.green and not result.failed for result in measured.results) else 1
