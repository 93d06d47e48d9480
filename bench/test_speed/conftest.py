"""Options of `pytest bench`.

pytest reads options from the folders on its command line and from those directly below them whose
names start with "test": hence this folder's.
"""

import pytest

__all__ = ["pytest_addoption"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("heterolora bench")
    group.addoption(
        "--bench-case",
        action="append",
        metavar="PATTERN",
        help="case to run, or a pattern such as 'minilm-*'; may be repeated (default: quick cases)",
    )
    group.addoption(
        "--bench-compile",
        action="store_true",
        help="add torch.compile variants (about a minute each)",
    )
