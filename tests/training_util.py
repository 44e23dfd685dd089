"""What the tests of training share: a tiny model, and text that a head can learn."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from loading_util import make_model
from medusa_ext.training.run import Job, train
from medusa_ext.training.settings import Settings

for _package in ("accelerate", "peft", "matplotlib"):
    pytest.importorskip(_package, reason=f"{_package} of the extra `train` is not installed")

FIRST, LENGTH = 40, 16  # a cycle of tokens in which each one says all that follow


def cycle(start: int, length: int) -> list[int]:
    """Tokens that follow `start` in the cycle, itself first."""
    return [FIRST + (start + 5 * index) % LENGTH for index in range(length)]


def write_records(path: Path, records: Iterable[tuple[list[int], list[int]]]) -> Path:
    """Pairs of ids and mask as `medusa-ext distill` writes them."""
    lines = [
        json.dumps(
            {
                "record": index,
                "seed": index,
                "input_ids": ids,
                "assistant_mask": mask,
                "messages": [],
                "settings": {"model": "tiny", "temperature": 0.0},
            }
        )
        for index, (ids, mask) in enumerate(records)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def make_data(path: Path, count: int = 48) -> Path:
    """Records of the cycle, with prompts of 2 to 5 tokens."""
    rng = np.random.default_rng(0)
    records = []
    for _ in range(count):
        prompt, length = int(rng.integers(2, 6)), int(rng.integers(20, 40))
        ids = cycle(int(rng.integers(LENGTH)), length)
        records.append((ids, [0] * prompt + [1] * (length - prompt)))
    return write_records(path, records)


def make_job(folder: Path, name: str = "heads", **changes: Any) -> Job:
    """A short run on the cycle; `changes` are settings, or attributes of the job."""
    if not (folder / "model").exists():
        make_model(folder / "model")
        make_data(folder / "data.jsonl")
    own = {key: changes.pop(key) for key in list(changes) if key in Job.__dataclass_fields__}
    settings: dict[str, Any] = {"num_heads": 3, "batch_size": 64, "warmup": 2, "max_steps": 12}
    if changes.get("method", "medusa1") != "medusa1":
        settings |= {"batch_size": 8, "accumulate": 1, "lora_rank": 4}
    return Job(
        **{
            "model": str(folder / "model"),
            "data": [folder / "data.jsonl"],
            "out": folder / name,
            "settings": Settings(**settings | changes),
            "threads": 1,
            "eval_every": 6,
            "save_every": 3,
            "log_every": 2,
            "eval_positions": 100,
        }
        | own
    )


def quiet() -> Console:
    """A console that shows nothing."""
    return Console(quiet=True)


def run(job: Job) -> dict[str, float]:
    """Train; the figures at the end."""
    return dict(train(job, quiet()))
