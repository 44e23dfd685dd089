"""A drafter in a few lines of Python: `python examples/custom_drafter.py [MODEL]`.

It guesses that a token is followed by what followed it last time. Whatever a drafter proposes, the
text stays that of plain decoding; good guesses only make it come in fewer steps.
"""

import sys

from medusa_ext import Drafter, DraftInput, Engine


class LastFollower(Drafter):
    """Proposes one chain: the last follower of the last token, its last follower, and so on."""

    def __init__(self, length: int = 4) -> None:
        """Propose at most `length` tokens, >= 1."""
        super().__init__()
        self._length = length

    @property
    def max_nodes(self) -> int:
        """Of any tree made here, the root included."""
        return self._length + 1

    def draft(self, inputs: list[DraftInput]) -> list[tuple[list[int], list[int]]]:
        """Return (tokens, parents) of each sequence's tree without its root, which is parent 0."""
        return [self._chain(item) for item in inputs]

    def _chain(self, item: DraftInput) -> tuple[list[int], list[int]]:
        follower = dict(zip(item.tokens, item.tokens[1:], strict=False))
        length = min(self._length, item.max_nodes - 1, item.max_depth)
        chain: list[int] = []
        token = item.tokens[-1]
        while len(chain) < length and token in follower:
            token = follower[token]
            chain.append(token)
        return chain, list(range(len(chain)))


def main() -> None:
    """Compare the text and the number of steps with those of plain decoding."""
    model = sys.argv[1] if len(sys.argv) > 1 else "demo"
    question = [{"role": "user", "content": "Count from one to thirty in words."}]
    with Engine(model, heads=None) as plain, Engine(model, drafter=LastFollower()) as drafted:
        expected = plain.generate(question, max_new_tokens=96)
        result = drafted.generate(question, max_new_tokens=96)
    print(result.text)
    print(f"-- same text: {result.token_ids == expected.token_ids}")
    print(f"-- steps: {expected.stats.steps} plain, {result.stats.steps} drafted")


if __name__ == "__main__":
    main()
