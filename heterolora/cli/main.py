"""The ``heterolora`` command.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 2 a mistake of the user
(one line says which), 130 stopped by Ctrl-C; 1 a failed check, or a bug with its traceback.
"""

import argparse
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import heterolora
from heterolora.cli import options
from heterolora.errors import HeteroLoraError

__all__ = ["main"]

_Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; argparse's own errors exit with 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(arguments)
    args = parser.parse_args(arguments)
    args.line = shlex.join(["heterolora", *arguments])
    if args.command is None:
        parser.print_help()
        return 2
    try:
        with _messages():
            return int(args.run(args))
    except HeteroLoraError as error:
        print(f"heterolora: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"heterolora: {stop or 'interrupted'}", file=sys.stderr)
        return 130


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heterolora",
        description="Mixed-rank LoRA: search where the rank goes, and train it with fused kernels.",
        epilog="Each command explains itself: heterolora search --help",
    )
    parser.add_argument("--version", action="version", version=heterolora.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (summary, example, add, run) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  {line}" for line in example),
            formatter_class=options.Help,
        )
        command.set_defaults(run=run)
        # Only the command that was chosen loads what its options need.
        if next((word for word in arguments if not word.startswith("-")), None) == name:
            add(command)
    return parser


def _search(args: argparse.Namespace) -> int:
    from heterolora.report.figures import check_drawing
    from heterolora.report.page import rank_table, write_search_html
    from heterolora.search import Budget, SearchSpace, Variant, allocate, recommended

    if args.report is not None:
        check_drawing()
    params = args.budget_params
    budget = Budget(
        rank=args.budget_rank if params is None else None,
        params=params,
        step_time=args.step_time,
        measured=args.measure_steps,
    )
    rank = args.shortcut_budget_rank
    shortcut_budget = None if rank is None else Budget(rank=rank)
    space = SearchSpace(
        target_modules=options.targets(args.target_modules),
        ranks=options.ranks(args.ranks),
        shortcuts=options.shortcuts(args.shortcuts),
    )
    wishes = {
        name: getattr(args, name) for name in ("head_steps", "floor", "train_steps", "by_layer")
    }
    wished = {name: value for name, value in wishes.items() if value is not None}
    variant, proxy = Variant(**wished), args.proxy
    _quiet_libraries()
    data, model = _load(args)

    import torch

    from heterolora.data.text import batches

    if proxy is None:
        advice = recommended(model, budget, space, shortcut_budget)
        proxy = advice["proxy"]
        variant = replace(advice["variant"], **wished)
    feed = batches(data, count=args.batches, batch_size=args.batch_size, seed=args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    allocation = allocate(
        model.to(device),
        feed,
        budget=budget,
        shortcut_budget=shortcut_budget,
        proxy=proxy,
        space=space,
        seed=args.seed,
        variant=variant,
    )
    allocation.save(args.out)
    if args.report is not None:
        about = {"model": args.model, "data": args.data, "heterolora": heterolora.__version__}
        write_search_html(allocation, args.report, command=args.line, about=about)
    result = {
        "model": args.model,
        "data": args.data,
        "allocation": args.out,
        "proxy": allocation.proxy,
        "variant": asdict(allocation.variant),
        "seed": allocation.seed,
        "parameters": allocation.parameters,
        "budget_parameters": allocation.budget_parameters,
        "seconds": allocation.seconds,
        "step_seconds": allocation.step_seconds,
        "step_time": allocation.step_time,
        "step_time_error": allocation.step_time_error,
        "ranks": allocation.ranks,
        "shortcuts": allocation.shortcuts,
        "scores": allocation.scores,
    }
    used = f"{allocation.parameters:,} of {allocation.budget_parameters:,} parameters"
    cost = f"{allocation.seconds:.1f} s"
    if allocation.step_seconds:
        cost += f", as much as {allocation.seconds / allocation.step_seconds:.1f} training steps"
    lines = [f"{used}; scored with {allocation.proxy} in {cost}"]
    if allocation.step_time is not None:
        error = allocation.step_time_error
        by = "the cost model" if error is None else f"measured steps, error {error:.0%}"
        lines.append(f"a training step takes {allocation.step_time:.2f} of uniform's, by {by}")
    _emit(
        args,
        result,
        [
            rank_table({**allocation.ranks, **allocation.shortcuts}),
            *lines,
            f"wrote {args.out}; train it with: heterolora train --allocation {args.out} "
            "and the same options for model and data",
        ],
    )
    return 0


def _train(args: argparse.Namespace) -> int:
    from heterolora.search import Allocation, SearchSpace, adapt, uniform

    path = args.allocation
    allocation = Allocation.load(path) if path is not None else None
    space = SearchSpace(target_modules=options.targets(args.target_modules))
    _quiet_libraries()
    data, model = _load(args)
    if allocation is None:
        allocation = uniform(model, args.rank, space)

    import torch

    from heterolora.train.models import disable_dropout
    from heterolora.train.run import train

    if args.no_dropout:
        disable_dropout(model)
    # PEFT draws A from the global random state.
    torch.manual_seed(args.seed)
    result = train(
        adapt(model, allocation),
        data,
        output_dir=args.out,
        epochs=args.epochs,
        max_steps=args.max_steps,
        learning_rate=args.lr,
        batch_size=args.batch_size,
        seed=args.seed,
        fused=not args.no_fuse,
        resume=args.resume,
        overwrite=args.overwrite,
        save_steps=args.save_steps,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=args.bf16,
        cuda_graph=args.cuda_graph,
        progress=sys.stderr.isatty(),
    )
    report = result.report
    _emit(
        args,
        {
            "model": args.model,
            "data": args.data,
            "adapter": str(result.adapter),
            "parameters": allocation.parameters,
            "counts": asdict(allocation.counts),
            "metrics": result.metrics,
            "steps": result.steps,
            "seconds": result.seconds,
            "seconds_per_step": result.seconds_per_step,
            "tokens_per_second": result.tokens_per_second,
            "fused": report.fused if report else {},
            "left": report.left if report else {},
            "why": report.why if report else {},
            "declined": report.declined if report else {},
            "cuda_graph": result.cuda_graph,
            "log_history": result.log_history,
        },
        [
            *(f"{name.replace('_', ' ')}: {value:.4f}" for name, value in result.metrics.items()),
            f"{result.steps} steps in {result.seconds:.1f} s"
            + (f", {result.seconds_per_step:.3f} s a step" if result.seconds_per_step else ""),
            f"{allocation.parameters:,} LoRA parameters, enabled, trained and stored; "
            + (str(report) if report else "PEFT's own forward"),
            *([f"CUDA graphs: {result.cuda_graph}"] if result.cuda_graph else []),
            f"adapter: {result.adapter}",
        ],
    )
    return 0


def _demo(args: argparse.Namespace) -> int:
    from heterolora.demo import run

    _quiet_libraries()
    result = run(Path(args.out), quick=args.quick, seed=args.seed)
    _emit(args, result, [f"report: {Path(args.out) / 'report.html'}"])
    return 0


def _bench(args: argparse.Namespace) -> int:
    from heterolora.bench.cli import run

    return int(run(args))


def _verify(args: argparse.Namespace) -> int:
    from heterolora.verify import run

    return int(run(args))


def _doctor(args: argparse.Namespace) -> int:
    from heterolora.cli import doctor

    checks = doctor.examine()
    _emit(args, doctor.as_json(checks), [doctor.render(checks)])
    return 0 if doctor.is_healthy(checks) else 1


_COMMANDS: dict[
    str, tuple[str, tuple[str, ...], Callable[[argparse.ArgumentParser], None], _Run]
] = {
    "demo": (
        "search, train and compare on bundled film reviews, and write a report",
        ("heterolora demo", "heterolora demo --quick --out /tmp/demo"),
        options.add_demo,
        _demo,
    ),
    "search": (
        "decide which modules deserve which LoRA rank under a parameter budget",
        (
            "heterolora search --data reviews.csv --budget-rank 4",
            "heterolora search --model ./llama --data notes.jsonl --text body --proxy snip",
            "heterolora search --data glue:mrpc --budget-params 100000 --out mrpc.json",
            "heterolora search --data reviews.csv --budget-rank 4 --shortcuts all",
        ),
        options.add_search,
        _search,
    ),
    "train": (
        "train a searched or a uniform adapter with transformers' Trainer",
        (
            "heterolora train --data reviews.csv --rank 8 --out runs/uniform",
            "heterolora train --data reviews.csv --allocation allocation.json --out runs/searched",
            "heterolora train --data reviews.csv --rank 8 --out runs/uniform --resume",
        ),
        options.add_train,
        _train,
    ),
    "bench": (
        "time the fused path against PEFT in one interleaved run",
        ("heterolora bench", "heterolora bench --help"),
        options.add_bench,
        _bench,
    ),
    "verify": (
        "prove the kernels on this machine, as far as it allows",
        ("heterolora verify",),
        options.add_verify,
        _verify,
    ),
    "doctor": (
        "check the environment and say how to mend it",
        ("heterolora doctor", "heterolora doctor --json -"),
        options.add_json,
        _doctor,
    ),
}


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Tokenised data and the model for its task."""
    from heterolora.data.text import load_text_data, tokenize
    from heterolora.train.models import load_model

    data = load_text_data(
        args.data,
        text=args.text,
        pair=args.pair,
        label=args.label,
        task=args.task,
        validation=args.validation,
        test=args.test,
        limit=args.limit,
        seed=args.seed,
    )
    rows = ", ".join(f"{name} {len(split):,}" for name, split in data.splits.items())
    chosen = ", ".join(f"{role} {name!r}" for role, name in data.columns.items())
    logging.getLogger("heterolora").info("%s: %s; %s rows", data.task, chosen, rows)
    for note in data.notes:
        logging.getLogger("heterolora").info("%s", note)
    model, tokenizer = load_model(
        args.model,
        task=data.task,
        num_labels=len(data.label_names) or None,
        label_names=data.label_names,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        seed=args.seed,
    )
    return tokenize(data, tokenizer, max_length=args.max_length), model


def _emit(args: argparse.Namespace, result: Any, lines: Sequence[Any]) -> None:
    """Text to stdout, JSON to its file; with ``--json -`` JSON to stdout and text to stderr."""
    from rich.console import Console

    target = args.json
    stream = sys.stderr if target == "-" else sys.stdout
    # Without a terminal rich takes 80 columns, too few for the rank table.
    width = None if stream.isatty() else 120
    console = Console(file=stream, width=width, soft_wrap=True, highlight=False, markup=False)
    for line in lines:
        console.print(line)
    if target is not None:
        options.write_json(target, result)


@contextmanager
def _messages() -> Iterator[None]:
    """heterolora's log lines on stderr while a command runs; a terminal has a bar instead."""
    log = logging.getLogger("heterolora")
    handler = logging.StreamHandler(sys.stderr)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.WARNING if sys.stderr.isatty() else logging.INFO)
    try:
        with warnings.catch_warnings():
            # Deprecations inside transformers that PEFT runs into: nothing a user can act on.
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _quiet_libraries() -> None:
    """Errors come as one line here, so the libraries' own reports of the same are turned off."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()


if __name__ == "__main__":
    sys.exit(main())
