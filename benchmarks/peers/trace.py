"""What one contestant said to one prompt, and when."""

import time
from collections.abc import Sequence


class Trace:
    """Tokens of one answer in the order of the passes that emitted them.

    Attributes:
        tokens: the answer so far.
        marks: per pass that emitted tokens: seconds since the start, tokens of the answer so far.
            The first one is the end of the prefill.
    """

    def __init__(self) -> None:
        """Start the clock."""
        self.tokens: list[int] = []
        self.marks: list[tuple[float, int]] = []
        self._start = time.perf_counter()

    def emit(self, tokens: Sequence[int], *, same_pass: bool = False) -> None:
        """Add tokens that came just now.

        Args:
            tokens: none of them adds nothing.
            same_pass: they belong to the pass that emitted the tokens before them.
        """
        if not tokens:
            return
        self.tokens.extend(tokens)
        if same_pass and self.marks:
            self.marks.pop()
        self.marks.append((time.perf_counter() - self._start, len(self.tokens)))
