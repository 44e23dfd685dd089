"""Print a text while it is made: `python examples/stream.py [PROMPT] [MODEL]`."""

import sys

from medusa_ext import Engine


def main() -> None:
    """Stream one answer; ^C ends it and frees its place."""
    prompt = sys.argv[1] if len(sys.argv) > 1 else "Tell me a story"
    model = sys.argv[2] if len(sys.argv) > 2 else "demo"
    with Engine(model) as engine:
        messages = [{"role": "user", "content": prompt}]
        for piece in engine.stream(messages, max_new_tokens=128, temperature=0.7, seed=1):
            print(piece.text, end="", flush=True)
            if piece.result is not None:
                print(f"\n-- {piece.result.stats.tokens_per_step:.2f} tokens per step")


if __name__ == "__main__":
    main()
