"""Exact Medusa tree decoding for language models.

`Engine` runs a model; see its docstring. Importing this package loads neither transformers nor torch.
"""

from typing import TYPE_CHECKING

from medusa_ext._core import InternalError, __version__

if TYPE_CHECKING:
    from medusa_ext.chat import Chat
    from medusa_ext.engine import Engine
    from medusa_ext.results import Piece, Result, Stats

__all__ = [
    "Chat",
    "Engine",
    "InternalError",
    "Piece",
    "Result",
    "Stats",
    "__version__",
]

_LAZY = {
    "Chat": "medusa_ext.chat",
    "Engine": "medusa_ext.engine",
    "Piece": "medusa_ext.results",
    "Result": "medusa_ext.results",
    "Stats": "medusa_ext.results",
}


def __getattr__(name: str) -> object:
    """Import what the package offers on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
