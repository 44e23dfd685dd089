"""A tiny model whose heads are right often enough to calibrate, made without training.

`base` is a folder that test modules share, so that they make each thing once.
"""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file

from loading_util import VOCAB, make_model, write_json
from medusa_ext import Engine, _core
from medusa_ext.calibration.ranks import Ranks, collect
from medusa_ext.calibration.texts import Text
from medusa_ext.cli import run
from medusa_ext.loading.exporting import CALIBRATION_FILE as FILE_NAME

NUM_HEADS = 3
NUM_TOKENS = 40  # of an answer


def make_prompts(count: int, seed: int) -> list[list[int]]:
    """Random token ids."""
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCAB, int(random.integers(3, 9))).tolist() for _ in range(count)]


@cache
def calibrated_pair(base: Path) -> tuple[Path, Path]:
    """A model, and heads (format B, no blocks) fitted to what it writes by least squares."""
    folder = base / "pair"
    folder.mkdir()
    model = make_model(folder / "model", tie_word_embeddings=True)
    xs: list[list[np.ndarray]] = [[] for _ in range(NUM_HEADS)]
    ys: list[list[int]] = [[] for _ in range(NUM_HEADS)]
    with Engine(model, None, threads=1) as engine:
        for prompt in make_prompts(40, seed=1):
            made = engine.generate(prompt, max_new_tokens=NUM_TOKENS, eos_token_id=[]).token_ids
            text = prompt + made
            _, hidden = engine.score(text, return_hidden=True)
            for head in range(NUM_HEADS):
                for at in range(len(prompt) - 1, len(text) - 2 - head):
                    xs[head].append(hidden[at])
                    ys[head].append(text[at + 2 + head])
    state = {}
    for head in range(NUM_HEADS):
        x, y = np.stack(xs[head]), np.eye(VOCAB)[ys[head]]
        weight = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y).T
        state[f"{head}.0.weight"] = torch.from_numpy(weight.astype(np.float32)).contiguous()
    heads = folder / "heads"
    heads.mkdir()
    save_file(state, heads / "medusa_lm_head.safetensors")
    write_json(heads / "config.json", {"medusa_num_heads": NUM_HEADS, "medusa_num_layers": 0})
    return model, heads


@cache
def answered_prompts(base: Path) -> list[tuple[list[int], list[int]]]:
    """Prompts and the model's own answers."""
    prompts = make_prompts(24, seed=2)
    with Engine(*calibrated_pair(base), threads=1, max_batch=4) as engine:
        results = engine.generate(prompts, max_new_tokens=NUM_TOKENS)
    return [(prompt, result.token_ids) for prompt, result in zip(prompts, results, strict=True)]


@cache
def calibrated_heads(base: Path) -> SimpleNamespace:
    """Heads calibrated by the command, in a folder of their own."""
    model, pair = calibrated_pair(base)
    folder = base / "calibrated"
    folder.mkdir()
    data = write_lines(folder / "data.jsonl", records(answered_prompts(base)))
    prompts = write_lines(
        folder / "prompts.jsonl",
        [{"turns": [f"say {n}", "x"], "category": "math"} for n in range(3)],
    )
    heads = folder / "heads"
    heads.mkdir()
    for path in pair.iterdir():
        (heads / path.name).write_bytes(path.read_bytes())
    found = SimpleNamespace(model=model, heads=heads, data=data, prompts=prompts)
    options = ["--data", data, "--prompts", prompts, "--nodes", 4, "--nodes", 16, "-n", 12]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens
        assert command(found, heads, *options) == 0
    found.content = json.loads((heads / FILE_NAME).read_text())
    return found


def write_lines(path: Path, values: list[object]) -> Path:
    """JSONL."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def records(answered, categories=("writing", "math")) -> list[object]:
    return [
        {
            "record": index,
            "input_ids": prompt + answer,
            "assistant_mask": [0] * len(prompt) + [1] * len(answer),
            "category": categories[index % 2],
        }
        for index, (prompt, answer) in enumerate(answered)
    ]


def with_file(calibrated, folder: Path, **changes: object) -> Path:
    """A copy of the heads whose calibration is changed."""
    folder.mkdir()
    for path in calibrated.heads.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / FILE_NAME).write_text(json.dumps(calibrated.content | changes))
    return folder


def tree_of(model: Path, heads: Path, **options: object) -> list[list[int]]:
    with Engine(model, heads, **({"threads": 1} | options)) as engine:
        return sorted(engine.tree)


def command(calibrated, heads: Path, *more: object) -> int:
    arguments = ["calibrate", calibrated.model, heads, "--threads", 1, *more]
    if "--nodes" not in more:
        arguments += ["--nodes", 4]
    if "--pictures" not in more:
        arguments.append("--no-pictures")
    return run([str(argument) for argument in arguments])


def warned_command(*arguments: object) -> int:
    """With warnings as they are outside of tests: lines on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        return command(*arguments)


def text(prompt: list[int], answer: list[int], category: str = "") -> Text:
    return Text(prompt + answer, [(len(prompt), len(prompt) + len(answer))], category)


def ranks_of(model: _core.Model, texts: list[Text], num_ranks: int = 64) -> Ranks:
    return collect(model, texts, num_heads=NUM_HEADS, num_ranks=num_ranks, hidden_size=32)
