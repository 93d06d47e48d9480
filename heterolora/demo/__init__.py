"""`heterolora demo`: a searched adapter against a uniform one, on bundled film reviews."""

from heterolora.demo.pipeline import Recipe, run

__all__ = ["Recipe", "run"]
