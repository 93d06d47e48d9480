"""What to run: read from a JSON file, checked before anything runs."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from heterolora.bench.harness.timing import BenchError

__all__ = ["SHIPPED", "Config", "Recipe", "Trial", "read_config"]

SHIPPED = Path(__file__).resolve().parent / "configs"


@dataclass(frozen=True)
class Recipe:
    """What all runs have in common.

    Attributes:
        model: "minilm", or a model folder.
        batch_size: rows of a training step.
        max_length: tokens of a row; longer ones are cut.
        scoring_batches: batches of the training rows that a search sees.
        warmup: fraction of the steps over which the learning rate rises; it falls to 0 after.
        bf16: train and evaluate under bf16 autocast.
        limit: at most this many rows of each split; None for all.
    """

    model: str = "minilm"
    batch_size: int = 32
    max_length: int = 64
    scoring_batches: int = 16
    warmup: float = 0.06
    bf16: bool = True
    limit: int | None = None


@dataclass(frozen=True)
class Config:
    """A set of runs: every arm at every budget on every task with every seed.

    Attributes:
        epochs: {task: epochs}; its keys are the tasks.
        ranks: budgets, as the parameters of uniform LoRA of that rank.
        arms: names of `ARMS`; in a file also patterns ("alone-*").
        seeds: each arm is trained once for each.
        learning_rates: the grid that each family of arms chooses from.
        choice_seeds: the seeds it is chosen with.
        recipe: what else all runs have in common.
    """

    epochs: dict[str, float]
    ranks: tuple[int, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    choice_seeds: tuple[int, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Trial:
    """One training run and everything its result depends on.

    Attributes:
        purpose: "test" trains on all training rows and reports the test split; "choice" trains on
            nine tenths of them and reports the rest, to choose a learning rate.
        task, arm: names.
        rank: the budget, as the parameters of uniform LoRA of that rank.
        seed: of head, adapter, order of the data, dropout and search.
        learning_rate: its largest value.
        epochs: over the training rows.
        recipe: what else matters.
    """

    purpose: str
    task: str
    arm: str
    rank: int
    seed: int
    learning_rate: float
    epochs: float
    recipe: Recipe

    @property
    def name(self) -> str:
        """Its place below the folder of results, without suffix."""
        leaf = f"rank{self.rank}-seed{self.seed}-lr{self.learning_rate:g}"
        return f"{self.purpose}/{self.task}/{self.arm}/{leaf}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_config(path: Path) -> Config:
    """The configuration in a file, or one that comes with heterolora by its name ("main").

    Raises:
        BenchError: no such file, not JSON, or a key that is missing, unknown or malformed.
    """
    shipped = SHIPPED / f"{path}.json"
    # A folder of that name, such as smollm2's of the model, is no configuration.
    found = shipped if not path.is_file() and path.suffix == "" and shipped.is_file() else path
    try:
        given = json.loads(found.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.json")))
        raise BenchError(
            f"{path}: cannot be read ({error.strerror}); give a file, or one of {names}"
        ) from error
    except ValueError as error:
        raise BenchError(f"{path}: not JSON ({error})") from error
    if not isinstance(given, dict):
        raise BenchError(f"{path}: expected an object with {', '.join(_REQUIRED)}")
    try:
        return _config(given)
    except _Malformed as error:
        raise BenchError(f"{path}: {error}") from error


class _Malformed(Exception):
    pass


_DEFAULTS = {field.name: field.default for field in fields(Recipe)}
_REQUIRED = ("epochs", "ranks", "arms", "seeds", "learning_rates")
_OPTIONAL = ("choice_seeds", *_DEFAULTS)


def _config(given: Mapping[str, Any]) -> Config:
    from heterolora.bench.evidence.arms.registry import ARMS
    from heterolora.bench.evidence.tasks.registry import TASKS

    missing = [key for key in _REQUIRED if key not in given]
    unknown = [key for key in given if key not in (*_REQUIRED, *_OPTIONAL)]
    if missing or unknown:
        key = (missing or unknown)[0]
        raise _Malformed(
            f"{'no' if missing else 'unknown'} key {key!r}; "
            f"required: {', '.join(_REQUIRED)}; optional: {', '.join(_OPTIONAL)}"
        )
    epochs = given["epochs"]
    if not isinstance(epochs, dict) or not epochs:
        raise _Malformed('epochs: expected an object such as {"sick": 3}')
    for task, number in epochs.items():
        _known(task, TASKS, "epochs: task")
        _check(_positive(number), "epochs", number, "a number above 0")
    named = _several(given, "arms", lambda value: isinstance(value, str), "names")
    arms = tuple(
        dict.fromkeys(arm for name in named for arm in fnmatch.filter(ARMS, name) or [name])
    )
    for arm in arms:
        _known(arm, ARMS, "arms: arm")
    seeds = _several(given, "seeds", _whole, "whole numbers")
    return Config(
        epochs={task: float(number) for task, number in epochs.items()},
        ranks=_several(given, "ranks", lambda v: _whole(v) and v > 0, "whole numbers above 0"),
        arms=arms,
        seeds=seeds,
        learning_rates=_several(given, "learning_rates", _positive, "numbers above 0"),
        choice_seeds=_several(
            {"choice_seeds": seeds[:1], **given}, "choice_seeds", _whole, "whole numbers"
        ),
        recipe=_recipe(given),
    )


def _recipe(given: Mapping[str, Any]) -> Recipe:
    values = {key: given.get(key, default) for key, default in _DEFAULTS.items()}
    for key in ("batch_size", "max_length", "scoring_batches"):
        value = values[key]
        _check(_whole(value) and value > 0, key, value, "a whole number above 0")
    _check(isinstance(values["model"], str), "model", values["model"], "a name or folder")
    _check(isinstance(values["bf16"], bool), "bf16", values["bf16"], "true or false")
    warmup, limit = values["warmup"], values["limit"]
    _check(_number(warmup) and 0 <= warmup < 1, "warmup", warmup, "a fraction below 1")
    # Below a batch of every class there is nothing to learn or to hold out.
    _check(limit is None or (_whole(limit) and limit >= 20), "limit", limit, "20 or more, or null")
    return Recipe(**values)


def _several(given: Mapping[str, Any], key: str, valid: Any, what: str) -> tuple[Any, ...]:
    values = given[key]
    good = isinstance(values, list | tuple) and values and all(map(valid, values))
    _check(good, key, values, f"a list of {what}")
    _check(len(set(values)) == len(values), key, values, "each of them once")
    return tuple(values)


def _check(good: Any, key: str, value: Any, expected: str) -> None:
    if not good:
        raise _Malformed(f"{key}={value!r}: expected {expected}")


def _known(name: str, registry: Mapping[str, Any], what: str) -> None:
    if name not in registry:
        raise _Malformed(f"{what} {name!r} is unknown; there are {', '.join(registry)}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32
