"""The base model's hidden states at every position that heads learn from, computed once.

A row is a position whose next token the model wrote: what a head sees when it guesses. Its token is
that next one. Rows of one turn follow one another, so head k at row r learns the token of row
r + 1 + k, and the base model's own distribution there is its lm_head at that row's hidden state.

Our engine computes the states: they are what the heads will see, to the rounding of bf16. Shards of
records are files named by their content, written under another name first: a build that was
interrupted goes on at its first missing shard, and data that has grown computes only what is new.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from medusa_ext import _core
from medusa_ext.device import open_device
from medusa_ext.distill.records import Record
from medusa_ext.loading import Checkpoint, LoadError, load_checkpoint
from medusa_ext.loading.files import SafetensorsTensors
from medusa_ext.training.data import Data, digest
from medusa_ext.training.files import lock_folder, write_tensors

_SHARD_ROWS = 1 << 16
_CHUNK = 512  # tokens of one pass


@dataclass(frozen=True)
class Rows:
    """What is known of R rows without the model."""

    token: NDArray[np.int32]  # [R]
    turn: NDArray[np.int32]  # [R], the number of the turn
    held_out: NDArray[np.bool_]  # [R]

    def labels(self, rows: NDArray[np.int64], num_heads: int) -> NDArray[np.int64]:
        """[B, K]: the token that head k is to guess at each row, -100 beyond its turn."""
        ahead = rows[:, None] + 1 + np.arange(num_heads)
        inside = ahead < len(self.token)
        ahead = np.where(inside, ahead, 0)
        inside &= self.turn[ahead] == self.turn[rows][:, None]
        return np.where(inside, self.token[ahead], -100).astype(np.int64)

    def usable(self, held_out: bool) -> NDArray[np.int64]:
        """Rows of one part of the data at which at least the first head has a label."""
        followed = np.append(self.turn[1:] == self.turn[:-1], False)
        return np.flatnonzero(followed & (self.held_out == held_out))


def make_rows(data: Data) -> Rows:
    """Rows of all records, in their order.

    Raises:
        LoadError: one part of the data has nothing for a head to guess.
    """
    tokens, turns, held_out = [], [], []
    first_turn = 0
    for record, out in zip(data.records, data.held_out, strict=True):
        at = _positions(record)
        tokens.append(record.ids[at + 1])
        turn = np.cumsum(np.diff(at, prepend=at[0]) > 1)
        turns.append(first_turn + turn)
        first_turn += int(turn[-1]) + 1
        held_out.append(np.full(len(at), out))
    rows = Rows(
        np.concatenate(tokens), np.concatenate(turns).astype(np.int32), np.concatenate(held_out)
    )
    for out, part in ((False, "to learn from"), (True, "set aside")):
        if not len(rows.usable(out)):
            raise LoadError(
                f"{', '.join(map(str, data.paths))}: no answer of the records {part} holds two "
                "tokens, so that no head has one to guess; give more records, with longer answers"
            )
    return rows


def _positions(record: Record) -> NDArray[np.int64]:
    return np.flatnonzero(record.generated[1:])


class HiddenStates:
    """Hidden states [R, d] in bf16, mapped from the shards."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Opens the shards in order; LoadError where one is damaged."""
        self.shards = [SafetensorsTensors(path).read("hidden", "")[0] for path in paths]
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])

    def __len__(self) -> int:
        """R."""
        return int(self.starts[-1])

    def read(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """[n, d] bf16."""
        out = np.empty((len(rows), self.shards[0].shape[1]), np.uint16)
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        for index in np.unique(shard):
            chosen = shard == index
            out[chosen] = self.shards[index][rows[chosen] - self.starts[index]]
        return torch.from_numpy(out).view(torch.bfloat16)


def open_hidden_states(
    checkpoint: Checkpoint,
    data: Data,
    folder: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HiddenStates:
    """Open the cache, and compute what is missing of it. Processes that share it take turns.

    Args:
        checkpoint: the model.
        data: the records.
        folder: of the cache; made where it does not exist.
        threads: of the CPU, for the engine.
        progress: called with (tokens computed, tokens to compute) after each record.

    Raises:
        LoadError: the model cannot be loaded, or the disk refuses.
    """
    shards = list(_shards(data.records))
    model = _identity(checkpoint)
    paths = [
        folder / f"{hashlib.sha256(b''.join([model, *map(digest, s)])).hexdigest()[:32]}"
        ".safetensors"
        for s in shards
    ]
    with lock_folder(folder, wait=True):
        missing = [index for index, path in enumerate(paths) if not path.is_file()]
        if missing:
            # Blocks are expanded, so that the states are the same on every device.
            loaded = load_checkpoint(
                checkpoint,
                weights=checkpoint.stored_dtype,
                backend=open_device("auto", threads=threads),
            ).model
            total = sum(len(record.ids) for index in missing for record in shards[index])
            done = 0
            for index in missing:
                hidden = []
                for record in shards[index]:
                    hidden.append(_states(loaded, record))
                    done += len(record.ids)
                    if progress is not None:
                        progress(done, total)
                write_tensors(paths[index], {"hidden": torch.cat(hidden)})
    return HiddenStates(paths)


def _states(model: _core.Model, record: Record) -> torch.Tensor:
    """[rows of the record, d] bf16."""
    at = _positions(record)
    ids = record.ids[: at[-1] + 1].tolist()
    hidden = np.empty((len(ids), json.loads(model.config)["hidden_size"]), np.float32)
    _core.score(model, ids, _CHUNK, None, hidden)
    return torch.from_numpy(hidden[at]).to(torch.bfloat16)


def _shards(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Neighbours with about _SHARD_ROWS rows together; more records change the last one alone."""
    shard: list[Record] = []
    rows = 0
    for record in records:
        shard.append(record)
        rows += len(_positions(record))
        if rows >= _SHARD_ROWS:
            yield shard
            shard, rows = [], 0
    if shard:
        yield shard


def _identity(checkpoint: Checkpoint) -> bytes:
    """Of the model without its heads: the configuration, and each file's name, size and time."""
    config = {name: value for name, value in checkpoint.config.items() if name != "heads"}
    files = {entry.file.path.resolve() for entry in checkpoint.entries}
    stats = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return json.dumps([config, checkpoint.stored_dtype, stats], sort_keys=True).encode()
