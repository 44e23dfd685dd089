"""Tokens per second by the number of nodes of a tree, and what tree="auto" chooses among them.

All sizes answer each prompt in turn, greedily, beginning with the next size each time, so that what
else the machine does falls on all alike; an answer that is not that of plain decoding ends the
program with status 1. Rates are of whole runs: all tokens behind the first of each answer, over the
seconds that they took.
"""

import argparse
import json
import sys
from pathlib import Path

from medusa_ext import Engine

HERE = Path(__file__).parent


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--prompts", type=Path, default=HERE / "questions.jsonl")
    parser.add_argument("--limit", type=int, default=None, help="so many prompts of the file")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--nodes", default="2,3,4,6,8,16", help="sizes beside plain decoding")
    parser.add_argument("--weights", default="auto")
    args = parser.parse_args()

    with args.prompts.open(encoding="utf-8") as lines:
        prompts = [json.loads(line)["turns"][0] for line in lines][: args.limit]
    auto = Engine(args.model, weights=args.weights)
    chosen = auto.info["nodes"]
    auto.close()
    sizes = [1, *(int(size) for size in args.nodes.split(","))]
    engines = {
        size: Engine(args.model, weights=args.weights, heads=None)
        if size == 1
        else Engine(args.model, weights=args.weights, tree=size)
        for size in sizes
    }

    tokens, steps, seconds = (dict.fromkeys(sizes, 0.0) for _ in range(3))
    for number, prompt in enumerate(prompts):
        first = number % len(sizes)
        answers = {}
        for size in sizes[first:] + sizes[:first]:
            result = engines[size].generate(prompt, max_new_tokens=args.tokens)
            answers[size] = result.token_ids
            # The first token comes of the prompt's pass.
            tokens[size] += max(len(result.token_ids) - 1, 0)
            steps[size] += result.stats.steps - 1
            seconds[size] += result.stats.decode_s
        wrong = [size for size in sizes if answers[size] != answers[1]]
        if wrong:
            print(f"prompt {number + 1}: {wrong} nodes gave another answer", file=sys.stderr)
            return 1

    plain = tokens[1] / seconds[1]
    print(f"{args.model}, weights {args.weights}, {len(prompts)} prompts; auto: {chosen} nodes\n")
    print("| nodes | tokens/s | tokens/step | ms/step | x plain | speed-up | / tokens per step |")
    print("|---|---|---|---|---|---|---|")
    for size in sizes:
        rate, emitted = tokens[size] / seconds[size], tokens[size] / steps[size]
        step = seconds[size] / steps[size]
        print(
            f"| {size} | {rate:.0f} | {emitted:.2f} | {1e3 * step:.2f} "
            f"| {step / (seconds[1] / steps[1]):.2f} | {rate / plain:.2f} "
            f"| {rate / plain / emitted:.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
