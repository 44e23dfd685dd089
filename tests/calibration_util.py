"""A tiny model whose heads are right often enough to calibrate, made without training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from loading_util import VOCAB, make_model, write_json
from medusa_ext import Engine

NUM_HEADS = 3
NUM_TOKENS = 40  # of an answer


def make_prompts(count: int, seed: int) -> list[list[int]]:
    """Random token ids."""
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCAB, int(random.integers(3, 9))).tolist() for _ in range(count)]


def make_calibrated_pair(folder: Path) -> tuple[Path, Path]:
    """A model, and heads (format B, no blocks) fitted to what it writes by least squares."""
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


def write_lines(path: Path, values: list[object]) -> Path:
    """JSONL."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path
