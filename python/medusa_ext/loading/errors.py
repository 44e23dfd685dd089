"""The one error of this package."""

from collections.abc import Sequence


class LoadError(ValueError):
    """A model, its heads or its tokenizer cannot be loaded: one line that says what and why."""


def shape_text(shape: Sequence[int]) -> str:
    """`[2, 3]`, as every message writes shapes."""
    return "[" + ", ".join(str(int(size)) for size in shape) + "]"
