"""Plain decoding steps of transformers on the shapes of bench_decode, random weights, bf16.

Static cache; the step runs eagerly, as a recorded CUDA graph, and under torch.compile with mode
"reduce-overhead". What does not work on this machine is reported and left out. Prints a table to
stderr and JSON to stdout.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from peer_shapes import SHAPES, Shape
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

WARM_UPS = 10


def make_model(shape: Shape, max_context: int, device: str) -> LlamaForCausalLM:
    """A Llama of this shape with random weights, made on the device."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max_context,
        tie_word_embeddings=shape.tied,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.eval()


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def step_seconds(step: Callable[[], object], samples: int, device: str) -> list[float]:
    """Times of single steps, each waited for as the next token is."""
    for _ in range(WARM_UPS):
        step()
    times = []
    for _ in range(samples):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


class Bench:
    """One model; a fresh static cache for every measurement."""

    def __init__(self, model: LlamaForCausalLM, device: str, samples: int) -> None:
        """Hold what all measurements share."""
        self.model, self.device, self.samples = model, device, samples

    def filled_cache(self, context: int, batch: int) -> StaticCache:
        """A cache with `context` tokens of each text, and room for the steps to come."""
        room = context + self.samples + 2 * WARM_UPS
        cache = StaticCache(config=self.model.config, max_cache_len=room)
        ids = torch.randint(0, self.model.config.vocab_size, (batch, context), device=self.device)
        for part in ids.split(2048, dim=1):
            self.model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def stepper(
        self, mode: str, context: int, batch: int
    ) -> tuple[Callable[[], object], StaticCache]:
        """A function that runs one step at this context."""
        cache = self.filled_cache(context, batch)
        ids = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        forward = self.model.forward
        if mode == "compile":
            forward = torch.compile(forward, mode="reduce-overhead", fullgraph=True)

        def step() -> None:
            logits = forward(ids, past_key_values=cache, use_cache=True).logits
            ids.copy_(logits[:, -1].argmax(-1, keepdim=True))

        if mode != "graph":
            return step, cache
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay, cache

    def measure(self, mode: str, context: int, batch: int) -> list[float]:
        """Times of steps in seconds."""
        with torch.inference_mode():
            step, _cache = self.stepper(mode, context, batch)
            return step_seconds(step, self.samples, self.device)


def main() -> int:
    """Measure and print; 1 if no mode worked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-2-7b", choices=list(SHAPES))
    parser.add_argument("--contexts", default="1024")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--modes", default="eager,graph,compile")
    parser.add_argument("--samples", type=int, default=50)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[args.shape]
    contexts = [int(c) for c in args.contexts.split(",")]
    model = make_model(shape, max(contexts) + 4096, device)
    bench = Bench(model, device, args.samples)

    rows, failures = [], []
    print("| mode | batch | context | median ms | GB/s of the floor's bytes |", file=sys.stderr)
    print("|---|---|---|---|---|", file=sys.stderr)
    for mode in args.modes.split(","):
        try:
            for batch in (int(b) for b in args.batches.split(",")):
                for context in contexts:
                    seconds = statistics.median(bench.measure(mode, context, batch))
                    floor = shape.streamed_bytes() + batch * context * shape.kv_bytes()
                    rows.append(
                        {
                            "op": "decode",
                            "shape": f"{args.shape} batch {batch} context {context} {mode}",
                            "dtype": "bf16",
                            "median_us": round(1e6 * seconds, 2),
                            "bytes": floor,
                        }
                    )
                    print(
                        f"| {mode} | {batch} | {context} | {1e3 * seconds:.3f} |"
                        f" {1e-9 * floor / seconds:.0f} |",
                        file=sys.stderr,
                        flush=True,
                    )
        except Exception as error:  # whatever a compiler may raise: the other modes still count
            text = f"{type(error).__name__}: {error}"
            failures.append({"mode": mode, "error": text[:500]})
            print(f"{mode} did not work: {text[:500]}", file=sys.stderr)
    result = {
        "program": "peer_transformers",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "rows": rows,
        "failures": failures,
    }
    print(json.dumps(result, indent=1))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
