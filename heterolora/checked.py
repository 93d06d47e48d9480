"""The one reader of JSON that comes from outside: every value is checked where it is taken.

::

    fields = Fields.load(path, AllocationFileError)
    fields.keys("seed", "ranks", optional=("note",))
    seed = fields.integer("seed", high=2**32 - 1)
    ranks = {name: rank for name, rank in fields.each("ranks", Fields.integer).items()}

What is wrong raises the error type that the reader was made with, as "file: key problem".
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

__all__ = ["Fields", "is_integer", "is_number"]

T = TypeVar("T")
_NEEDED: Any = object()


def is_integer(value: Any, low: int = 0, high: int | None = None) -> bool:
    """Whether a value is a whole number in these limits; true and false are none."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and value >= low and (high is None or value <= high)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    # A whole number may be larger than any float.
    return real and (isinstance(value, int) or math.isfinite(value))


class Fields:
    """A JSON object of which every key is read through a check.

    Args:
        values: the object.
        file: what messages begin with.
        error: the exception to raise, made from one message.
        at: path of the object within the file, "" for the whole of it.

    Raises:
        error: (every method) a key is missing, or its value is not what was asked for.
    """

    def __init__(self, values: Any, file: Path | str, error: type[Exception], at: str = "") -> None:
        self.file, self.error, self.at = file, error, at
        if not isinstance(values, dict):
            raise error(f"{file}: {at or 'the file'} must be a JSON object, not {_shown(values)}")
        self.values: dict[str, Any] = values

    @classmethod
    def load(cls, path: Path, error: type[Exception]) -> Fields:
        """The object in a file; NaN and infinity, which JSON has not, are refused."""
        try:
            return cls.parse(path.read_text(encoding="utf-8"), path, error)
        except FileNotFoundError:
            raise error(f"{path}: no such file") from None
        except (OSError, UnicodeDecodeError) as exc:
            raise error(f"{path}: cannot be read ({exc})") from exc

    @classmethod
    def parse(cls, text: str, file: Path | str, error: type[Exception]) -> Fields:
        """The object in a text; `file` is what messages call it."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise error(f"{file}: not valid JSON ({exc})") from exc
        fields = cls(values, file, error)
        fields._refuse_not_finite()
        return fields

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raise, naming the file and the key."""
        raise self.error(f"{self.file}: {self.path(key)} {problem}")

    def path(self, key: str) -> str:
        """Where a key lies in the file: `sites['q.proj'].in_features`."""
        name = key if key.isidentifier() else f"{key!r:.80}"
        return f"{self.at}.{name}" if self.at else name

    def keys(self, *required: str, optional: Sequence[str] = ()) -> None:
        """Refuse the object if a required key is missing, or one is there that is not named."""
        for key in required:
            if key not in self.values:
                self.fail(key, "is missing")
        for key in sorted(self.values.keys() - {*required, *optional}):
            known = ", ".join((*required, *optional))
            self.fail(key, f"is not a key that is known here; known are {known}")

    def _refuse_not_finite(self) -> None:
        """Python's reader takes NaN, Infinity and 1e999, which are no numbers to go on with."""
        for key, value in self.values.items():
            if isinstance(value, float) and not math.isfinite(value):
                self.fail(key, f"is {value}, which is not a finite number")
            if isinstance(value, dict):
                self.fields(key)._refuse_not_finite()
            if isinstance(value, list):
                _Entries(value, self.file, self.error, self.path(key))._refuse_not_finite()

    def version(self, current: int, key: str = "schema_version") -> int:
        """The schema version, from 1 up to the one that this code writes."""
        found = self.integer(key, low=1)
        if found > current:
            self.fail(key, f"is {found}, and this heterolora reads up to {current}; upgrade it")
        return found

    def value(self, key: str, default: Any = _NEEDED) -> Any:
        """Whatever is there, unchecked."""
        if key in self.values:
            return self.values[key]
        if default is _NEEDED:
            self.fail(key, "is missing")
        return default

    def integer(self, key: str, low: int = 0, high: int | None = None) -> int:
        """A whole number from `low` to `high`; true and false are none."""
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(key, f"must be a whole number, not {_shown(value)}")
        if value < low or (high is not None and value > high):
            limit = f"at least {low}" if high is None else f"from {low} to {high}"
            self.fail(key, f"is {value}; it must be {limit}")
        return value

    def number(
        self,
        key: str,
        low: float = 0.0,
        high: float = math.inf,
        *,
        positive: bool = False,
    ) -> float:
        """A finite number from `low` to `high`, above 0 if `positive`."""
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(key, f"must be a number, not {_shown(value)}")
        # Not math.isfinite, which fails at a whole number that is larger than any float.
        finite = abs(value) <= sys.float_info.max
        if not finite or not low <= value <= high or (positive and value <= 0):
            limit = "above 0" if positive else f"at least {low:g}" if low > -math.inf else "finite"
            limit += f" and at most {high:g}" if high < math.inf else ""
            self.fail(key, f"is {value!r:.80}; it must be {limit}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.value(key)
        if not isinstance(value, bool):
            self.fail(key, f"must be true or false, not {_shown(value)}")
        return value

    def text(self, key: str, *, empty: bool = False) -> str:
        """A string, not an empty one unless `empty`."""
        value = self.value(key)
        if not isinstance(value, str) or not (value or empty):
            self.fail(key, f"must be a {'' if empty else 'non-empty '}string, not {_shown(value)}")
        return value

    def choice(self, key: str, known: Sequence[str]) -> str:
        """One of the strings that are known."""
        value = self.value(key)
        if value not in known:
            self.fail(key, f"is {_shown(value)}, none of {', '.join(known)}")
        return str(value)

    def optional(self, key: str, take: Callable[..., T], /, **limits: Any) -> T | None:
        """None where the key is null or missing, else what `take` (`Fields.number`, ...) gives."""
        return None if self.value(key, None) is None else take(self, key, **limits)

    def fields(self, key: str) -> Fields:
        """The object under a key."""
        return Fields(self.value(key), self.file, self.error, self.path(key))

    def each(self, key: str, take: Callable[..., T], /, **limits: Any) -> dict[str, T]:
        """{name: what `take` gives} of an object whose keys are names."""
        inner = _Named(self.value(key), self.file, self.error, self.path(key))
        return {name: take(inner, name, **limits) for name in inner.values}

    def entries(self, key: str, take: Callable[..., T], /, **limits: Any) -> list[T]:
        """What `take` gives for every entry of a list; `Fields.fields` for a list of objects."""
        value = self.value(key)
        if not isinstance(value, list | tuple):
            self.fail(key, f"must be a list, not {_shown(value)}")
        entries = _Entries(value, self.file, self.error, self.path(key))
        return [take(entries, str(index), **limits) for index in range(len(value))]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)


class _Named(Fields):
    """An object whose keys are names of things, which messages quote."""

    def path(self, key: str) -> str:
        return f"{self.at}[{key!r:.80}]"


class _Entries(Fields):
    """A list as an object whose keys are its indices."""

    def __init__(
        self, values: Sequence[Any], file: Path | str, error: type[Exception], at: str
    ) -> None:
        named: Mapping[str, Any] = {str(index): value for index, value in enumerate(values)}
        super().__init__(dict(named), file, error, at)

    def path(self, key: str) -> str:
        return f"{self.at}[{key}]"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'}"
    return f"{value!r:.80}"
