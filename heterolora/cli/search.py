"""`heterolora search`: decides ranks under a budget, and writes them as an allocation."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import heterolora
from heterolora.cli import inputs
from heterolora.console import add_json, emit
from heterolora.errors import SearchSpaceError

if TYPE_CHECKING:
    from heterolora.search import Allocation, Budget, SearchSpace, Variant

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """\
examples:
  heterolora search --data reviews.csv --budget-rank 4
  heterolora search --model ./llama --data notes.jsonl --text body --proxy snip
  heterolora search --data glue:mrpc --budget-params 100000 --out mrpc.json
  heterolora search --data reviews.csv --budget-rank 4 --shortcuts all
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from heterolora.search import PROXIES
    from heterolora.shortcuts.model import KINDS

    inputs.add_arguments(parser)
    search = parser.add_argument_group("search")
    budget = search.add_mutually_exclusive_group()
    budget.add_argument("--budget-rank", type=int, default=8, help="as many as uniform rank R")
    budget.add_argument("--budget-params", type=int, help="LoRA parameters to spend")
    search.add_argument(
        "--proxy",
        help=f"score: {', '.join(PROXIES)}; default: spectral in the variant that "
        "docs/evidence.md supports",
    )
    _add_variant(search)
    search.add_argument(
        "--shortcuts",
        default="none",
        metavar="KINDS",
        help=f"kinds of shortcuts to search too: all, or some of {', '.join(KINDS)} with commas "
        "between",
    )
    search.add_argument(
        "--shortcut-budget-rank",
        type=int,
        metavar="R",
        help="a budget of their own, as many as rank R on every one; otherwise they share one",
    )
    search.add_argument("--ranks", default="0,1,2,4,8,16,32", help="ranks to choose from")
    search.add_argument("--batches", type=int, default=16, help="batches to score with")
    search.add_argument("--batch-size", type=int, default=32, help="rows a batch")
    search.add_argument("--out", default="allocation.json", help="where the allocation goes")
    search.add_argument(
        "--report", type=Path, metavar="FILE", help="also write a page of ranks and scores (HTML)"
    )
    add_json(parser)


def _add_variant(group: "argparse._ArgumentGroup") -> None:
    """The options that are fields of `Variant`; None, their default, leaves a field to --proxy."""
    group.add_argument(
        "--head-steps",
        type=int,
        metavar="N",
        help="train the classification head N steps before scoring; undone afterwards "
        "(default: 70 without --proxy where there is one, else 0)",
    )
    group.add_argument(
        "--train-steps",
        type=int,
        metavar="N",
        help="score over N steps of training a uniform adapter, likewise undone",
    )
    group.add_argument(
        "--floor",
        type=int,
        metavar="R",
        help="least rank of a module or shortcut (default without --proxy: the smallest above 0 "
        "where the budget pays for that everywhere; else 0)",
    )
    group.add_argument(
        "--by-layer",
        action=argparse.BooleanOptionalAction,
        help="every layer's scores add up to the same (default: without --proxy where the budget "
        "does not pay for that floor)",
    )


def run(args: argparse.Namespace) -> int:
    """Search, and write the allocation and what else was asked for.

    Returns:
        0.

    Raises:
        HeteroLoraError: what was asked for cannot be done, or a file cannot be written.
    """
    from heterolora.report.page import check_installed, write_search_html

    if args.report is not None:
        check_installed()
    wishes = _wishes(args)
    inputs.quiet_libraries()
    data, model = inputs.load(args)
    allocation = _allocate(args, wishes, data, model)
    allocation.save(args.out)
    if args.report is not None:
        about = {"model": args.model, "data": args.data, "heterolora": heterolora.__version__}
        write_search_html(allocation, args.report, command=args.line, about=about)
    emit(args.json, _result(args, allocation), _lines(args, allocation))
    return 0


@dataclass(frozen=True)
class _Wishes:
    """What the options ask of the search.

    Attributes:
        variant: the fields of `Variant` that were named.
    """

    budget: "Budget"
    shortcut_budget: "Budget | None"
    space: "SearchSpace"
    variant: dict[str, Any]


def _wishes(args: argparse.Namespace) -> _Wishes:
    """Read the options before anything is loaded, so that a mistake in them costs no time."""
    from heterolora.search import Budget, SearchSpace, Variant

    params, shortcut_rank = args.budget_params, args.shortcut_budget_rank
    fields = {
        name: getattr(args, name) for name in ("head_steps", "floor", "train_steps", "by_layer")
    }
    variant = {name: value for name, value in fields.items() if value is not None}
    Variant(**variant)  # refuses what is out of range
    return _Wishes(
        budget=Budget(rank=args.budget_rank if params is None else None, params=params),
        shortcut_budget=None if shortcut_rank is None else Budget(rank=shortcut_rank),
        space=SearchSpace(
            target_modules=inputs.targets(args.target_modules),
            ranks=_ranks(args.ranks),
            shortcuts=_shortcuts(args.shortcuts),
        ),
        variant=variant,
    )


def _ranks(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SearchSpaceError(
            f"--ranks {text!r}: numbers with commas between, as in 0,2,8"
        ) from error


def _shortcuts(text: str) -> tuple[str, ...]:
    from heterolora.shortcuts.model import KINDS

    if text == "none":
        return ()
    return KINDS if text == "all" else tuple(name.strip() for name in text.split(","))


def _method(args: argparse.Namespace, wishes: _Wishes, model: Any) -> tuple[str, "Variant"]:
    """The proxy and its variant: what was named, and else what is recommended for the model."""
    from heterolora.search import Variant, recommended

    if args.proxy is not None:
        return args.proxy, Variant(**wishes.variant)
    advice = recommended(model, wishes.budget, wishes.space, wishes.shortcut_budget)
    return advice["proxy"], replace(advice["variant"], **wishes.variant)


def _allocate(args: argparse.Namespace, wishes: _Wishes, data: Any, model: Any) -> "Allocation":
    import torch

    from heterolora.data.text import batches
    from heterolora.search import allocate

    proxy, variant = _method(args, wishes, model)
    feed = batches(data, count=args.batches, batch_size=args.batch_size, seed=args.seed)
    return allocate(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        feed,
        budget=wishes.budget,
        shortcut_budget=wishes.shortcut_budget,
        proxy=proxy,
        space=wishes.space,
        seed=args.seed,
        variant=variant,
    )


def _result(args: argparse.Namespace, allocation: "Allocation") -> dict[str, Any]:
    return {
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
        "ranks": allocation.ranks,
        "shortcuts": allocation.shortcuts,
        "scores": allocation.scores,
    }


def _lines(args: argparse.Namespace, allocation: "Allocation") -> list[Any]:
    used = f"{allocation.parameters:,} of {allocation.budget_parameters:,} parameters"
    cost = f"{allocation.seconds:.1f} s"
    if allocation.ratio:
        cost += f", as much as {allocation.ratio:.1f} training steps"
    return [
        _rank_table({**allocation.ranks, **allocation.shortcuts}),
        f"{used}; scored with {allocation.proxy} in {cost}",
        f"wrote {args.out}; train it with: heterolora train --allocation {args.out} "
        "and the same options for model and data",
    ]


def _rank_table(ranks: Mapping[str, int]) -> Any:
    """A table of layer by module or shortcut; what is outside the layers has its own row."""
    from rich.table import Table

    cells: dict[str, dict[str, int]] = {}
    columns: dict[str, None] = {}
    for name, rank in ranks.items():
        match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
        layer, column = (match.group(1), match.group(2)) if match else ("-", name)
        # The kind of a shortcut says where it ends.
        column = column.rpartition(":")[2]
        cells.setdefault(layer, {})[column] = rank
        columns[column] = None
    table = Table(title="rank by layer and module")
    table.add_column("layer", justify="right")
    for column in columns:
        table.add_column(re.sub(r"([.-])", r"\1\n", column), justify="right")
    for layer, row in cells.items():
        table.add_row(layer, *(str(row.get(column, "")) for column in columns))
    return table
