"""The folder of results: a JSON file for each run, and one for each learning rate that was chosen.

A file is there whole or not at all, so that work can be cut off at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from heterolora.bench.evidence.config import Trial
from heterolora.bench.harness.files import write_whole
from heterolora.bench.harness.timing import BenchError

__all__ = ["SCHEMA", "Store"]

SCHEMA = 1

_RUN = {field.name for field in fields(Trial)}
# What every table reads.
_RESULT = {"loss", "diverged", "parameters", "ranks", "steps", "seconds_per_step", "train_seconds"}


class Store:
    """Results below a folder.

    Raises:
        BenchError: (every method) a file cannot be written or read, or is none of these results.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While this one command writes here: two would do every run twice, at half the speed.

        Raises:
            BenchError: another command is at work on this folder.
        """
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = FileLock(self.folder / ".lock").acquire(blocking=False)
        except Timeout as error:
            raise BenchError(
                f"{self.folder}: another `bench evidence` is at work on this folder; wait for its "
                "end, stop it, or give another folder with --out"
            ) from error
        except OSError as error:
            raise BenchError(f"{self.folder}: cannot be written ({error.strerror})") from error
        with held:
            yield

    def result(self, run: Trial) -> dict[str, Any] | None:
        """What an earlier command found for this run, or None.

        Raises:
            BenchError: there is a result of this name, but of a run with other settings.
        """
        path = self._path(run)
        if not path.exists():
            return None
        found = self._read(path)
        wanted = json.loads(json.dumps(run.as_json()))
        if found["run"] != wanted:
            raise BenchError(
                f"{path} is of a run with other settings ({_difference(found['run'], wanted)}); "
                "give another folder with --out"
            )
        result: dict[str, Any] = found["result"]
        return result

    def save(self, run: Trial, result: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Write the result of a run."""
        entry = {
            "schema": SCHEMA,
            "run": run.as_json(),
            "result": dict(result),
            "environment": dict(environment),
        }
        self._write(self._path(run), entry)

    def save_choice(self, name: str, choice: Mapping[str, Any]) -> None:
        """Write how a learning rate was chosen, for the reader."""
        self._write(self.folder / "choice" / f"{name}.json", {"schema": SCHEMA, **choice})

    def tests(self) -> Iterator[dict[str, Any]]:
        """{"run": ..., "result": ..., "environment": ...} of every final run, in order of name."""
        if not (self.folder / "test").is_dir():
            raise BenchError(f"{self.folder} holds no results (no folder 'test' in it)")
        for path in sorted((self.folder / "test").rglob("*.json")):
            yield self._read(path)

    def _path(self, run: Trial) -> Path:
        return self.folder / f"{run.name}.json"

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BenchError(f"{path}: cannot be read ({error}); delete it") from error
        keys = {"schema", "run", "result", "environment"}
        if not isinstance(found, dict) or not keys <= found.keys():
            raise BenchError(f"{path}: not a result of `bench evidence`; delete it")
        if found["schema"] != SCHEMA:
            raise BenchError(f"{path}: schema {found['schema']!r}, and {SCHEMA} is known here")
        missing = _RUN - found["run"].keys() | _RESULT - found["result"].keys()
        if missing:
            raise BenchError(f"{path}: {sorted(missing)[0]!r} is missing in it; delete it")
        return found

    def _write(self, path: Path, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, indent=1, allow_nan=False) + "\n"
        try:
            write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise BenchError(f"{path}: cannot be written ({error.strerror})") from error


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    had, asked = ({**entry, **entry["recipe"]} for entry in (found, wanted))
    return ", ".join(
        f"{key} {had.get(key)!r}, not {asked.get(key)!r}"
        for key in dict.fromkeys([*asked, *had])
        if key != "recipe" and had.get(key) != asked.get(key)
    )
