"""Ceilings of a GPU as torch reaches them, and its dense products (cuBLAS) as a baseline.

Prints JSON: copy_gbs, matrix_tflops, and rows that `bench_linear --baseline` reads. torch writes
its products in bf16 where ours are f32: 2 bytes a value less.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import torch
from peer_shapes import SHAPES

COLD_BYTES = 256 << 20
SAMPLES = 100


def seconds_of(run: Callable[[int], object], samples: int = SAMPLES) -> float:
    """Median time of one call, many of them between two events; `run(i)` is the i-th."""
    for i in range(10):
        run(i)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(count: int) -> float:
        start.record()
        for i in range(count):
            run(i)
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / count

    count = max(1, min(1000, round(2e-3 / sample(10))))
    return statistics.median(sample(count) for _ in range(samples))


def copy_gbs() -> float:
    """Bytes read and written per second by a copy of 4 GiB, in GB/s."""
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2e-9 * source.numel() / seconds_of(lambda _: target.copy_(source), 10)


def matrix_tflops() -> float:
    """Rate of an 8192 x 8192 x 8192 product of random bf16 numbers."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2e-12 * 8192**3 / seconds_of(lambda _: a @ b, 10)


def linear_rows(names: list[str], row_counts: list[int]) -> list[dict[str, object]]:
    """Times of torch.nn.functional.linear on every product of these models."""
    rows: list[dict[str, object]] = []
    for name in names:
        for product, (n, k) in SHAPES[name].products().items():
            copies = max(2, -(-COLD_BYTES // (2 * n * k)))
            weights = torch.randn(copies, n, k, dtype=torch.bfloat16, device="cuda")
            for count in row_counts:
                x = torch.randn(count, k, dtype=torch.bfloat16, device="cuda")
                out = torch.empty(count, n, dtype=torch.bfloat16, device="cuda")

                def run(i: int, x=x, weights=weights, out=out) -> None:  # noqa: ANN001
                    torch.mm(x, weights[i % len(weights)].T, out=out)

                rows.append(
                    {
                        "op": "linear",
                        "shape": f"{name} {product} [{n}, {k}] x {count}",
                        "dtype": "bf16",
                        "median_us": round(1e6 * seconds_of(run), 3),
                    }
                )
            del weights
    return rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-2-7b,llama-3-8b,llama-1b")
    parser.add_argument("--rows", default="1,16,64,512")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no GPU", file=sys.stderr)
        return 1
    result = {
        "program": "peer_ops",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_gbs": round(copy_gbs(), 1),
        "matrix_tflops": round(matrix_tflops(), 1),
        "rows": linear_rows(args.shape.split(","), [int(r) for r in args.rows.split(",")]),
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
