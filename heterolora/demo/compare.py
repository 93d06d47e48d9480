"""What the demo's numbers say, in plain sentences, and whether a difference is more than noise."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["compare", "summarise"]


def compare(
    uniform: Sequence[Mapping[str, Any]], searched: Sequence[Mapping[str, Any]], *, rows: int
) -> dict[str, Any]:
    """Searched minus uniform test accuracy, in points, with its standard error.

    The error is that of two independent proportions over the test rows; averaging over seeds would
    make it smaller, sharing the test rows too, so it is on the careful side. A difference of less
    than two of them is called noise.

    Args:
        uniform: training runs, each with a ``test_accuracy`` between 0 and 1.
        searched: likewise.
        rows: rows of the test split.
    """
    means = [statistics.mean(run["test_accuracy"] for run in arm) for arm in (uniform, searched)]
    difference = 100 * (means[1] - means[0])
    error = 100 * math.sqrt(sum(mean * (1 - mean) / rows for mean in means))
    noise = abs(difference) < 2 * error or error == 0
    verdict = "inside noise" if noise else "more than noise"
    sentence = (
        f"Test accuracy: searched {100 * means[1]:.1f} %, uniform {100 * means[0]:.1f} %, "
        f"a difference of {difference:+.1f} points with a standard error of {error:.1f}: {verdict}."
    )
    return {
        "accuracy_difference": difference,
        "standard_error": error,
        "inside_noise": noise,
        "sentence": sentence,
    }


def summarise(results: Mapping[str, Any]) -> list[str]:
    """The report's opening sentences."""
    uniform, searched = results["arms"]
    ranks = list(searched["ranks"].values())
    rows = {row["variant"]: row for row in results["speed"]["rows"]}
    fused = rows["fused, uniform"]
    cheap = rows["fused, searched"]
    steps = results["search_seconds"] / results["step_seconds"]
    return [
        f"Both arms have the same budget: {uniform['parameters']:,} LoRA parameters uniform, "
        f"{searched['parameters']:,} searched, over {len(ranks)} linear layers; the search put "
        f"ranks from {min(ranks)} to {max(ranks)} and left {ranks.count(0)} layers out.",
        results["comparison"]["sentence"],
        f"The search took {results['search_seconds']:.1f} s, as long as {steps:.1f} training "
        "steps of its own.",
        f"A training step on the fused path takes {fused['ratio']:.2f}x the time of PEFT's at "
        f"uniform ranks, with the same results; the searched ranks on the fused path take "
        f"{cheap['ratio']:.2f}x.",
    ]
