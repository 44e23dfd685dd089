"""Exact Medusa tree decoding of language models, in C++ with thin Python bindings."""

from medusa_ext._core import CudaError, Drafter, DraftInput, InternalError, TreeSpec, __version__
from medusa_ext.answers import Stream
from medusa_ext.chat import Chat
from medusa_ext.engine import Engine
from medusa_ext.results import Piece, Result, Stats

__all__ = [
    "Chat",
    "CudaError",
    "DraftInput",
    "Drafter",
    "Engine",
    "InternalError",
    "Piece",
    "Result",
    "Stats",
    "Stream",
    "TreeSpec",
    "__version__",
]
