"""Tiny models, a tiny SICK and a tiny instruction set for the tests of `bench evidence`."""

import json
import random
from pathlib import Path
from typing import Any

from tiny import BAD, FILLER, GOOD, save_model

from heterolora.bench.evidence.config import Recipe, Trial

ROWS = 48
HEADER = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
LABELS = ("NEUTRAL", "ENTAILMENT", "CONTRADICTION")

# Of the steps that an arm takes; all of them where it is not named.
STEPS_TAKEN = {
    "short": 0.6,
    "short-57": 0.57,
    "no-dropout-65": 0.65,
}


def save_sick(data: Path, rows: int = ROWS) -> Path:
    """`data` with a folder sick whose labels follow from the words, and a quote in one sentence."""
    folder = data / "sick"
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for name in ("SICK_train.txt", "SICK_test_annotated.txt"):
        lines = []
        for row in range(rows):
            words = (FILLER, GOOD, BAD)[row % 3]
            first = " ".join(draw.choices(FILLER, k=draw.randint(1, 5)))
            second = " ".join(draw.choices(words, k=3))
            quote = '"' if row == 1 else ""
            lines.append(f"{row}\t{quote}{first}\t{second}\t3.0\t{LABELS[row % 3]}\n")
        (folder / name).write_text(HEADER + "".join(lines), encoding="utf-8")
    return data


def save_alpaca(data: Path, rows: int = 40) -> Path:
    """`data` with a folder alpaca-en-demo, whose responses are of 1 to 10 words."""
    folder = data / "alpaca-en-demo"
    folder.mkdir(parents=True)
    draw = random.Random(0)
    table = [
        {
            "instruction": " ".join(draw.choices(FILLER, k=3)),
            "input": draw.choice(FILLER) if row % 2 else "",
            "output": " ".join(draw.choices((GOOD, BAD)[row % 2], k=draw.randint(1, 10))),
        }
        for row in range(rows)
    ]
    (folder / "alpaca_en_demo.json").write_text(json.dumps(table), encoding="utf-8")
    return data


def save_tiny_model(folder: Path, kind: str = "bert") -> Path:
    return save_model(folder, kind)


def a_run(model: Path | str, **changes: Any) -> Trial:
    """A run of a few steps."""
    recipe = Recipe(model=str(model), batch_size=8, max_length=16, scoring_batches=2)
    values = {
        "purpose": "test",
        "task": "sick",
        "arm": "uniform",
        "rank": 2,
        "seed": 0,
        "learning_rate": 1e-3,
        "epochs": 2.0,
        "recipe": recipe,
    }
    return Trial(**{**values, **changes})


def entry(
    arm: str,
    seed: int,
    loss: float | None,
    accuracy: float = 0.5,
    *,
    training: float = 25.0,
    date: str = "2026-11-23T10:00:00+00:00",
    **more: Any,
) -> dict[str, Any]:
    """A result file's content, as far as a table reads it."""
    counts = {"enabled": 100, "ever_trained": 100, "stored": 100}
    result = {
        "loss": loss,
        "accuracy": accuracy,
        "diverged": loss is None,
        "parameters": counts,
        "ranks": {"bert.encoder.layer.0.attention.self.query": 2},
        "steps": 10,
        "seconds_per_step": {"wall": training / 5, "cpu": training / 10},
        # Around the steps too.
        "train_seconds": {"wall": 2 * training + 2, "cpu": training + 1},
        "search_seconds": 0.0,
        **more,
    }
    return {
        "schema": 1,
        "run": a_run("minilm", arm=arm, seed=seed).as_json(),
        "result": result,
        "environment": {"date": date},
    }
