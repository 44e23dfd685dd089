"""How many nodes a tree should have on this machine: steps are timed once, and remembered.

Calibration says what a tree of N nodes accepts, which is true of the heads wherever they run. What
a step with it takes, t(N), belongs to a machine: its cores, its memory, how the weights are stored.
So an engine with tree="auto" on a CPU takes the time of a few sizes after it has loaded, a second
or two, and chooses the N that maximises tokens per step / t(N). N = 1 is plain decoding. The larger
the model, the fewer sizes; where two would take too long, nobody waits and calibration decides.

The times are kept in step_times.json in MEDUSA_EXT_CACHE, else in medusa_ext below XDG_CACHE_HOME
or ~/.cache, under all that they depend on; a file that is damaged or cannot be written costs
another measurement and nothing else. Times that scatter, because the machine was busy, serve this
once and are not kept. With MEDUSA_EXT_CACHE=off nothing is timed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from medusa_ext import _core
from medusa_ext.calibration.file import DYNAMIC, LOOKUP, STATIC, Calibration, predictions
from medusa_ext.trees import Paths

COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64)
FILE_NAME = "step_times.json"
OFF = "off"

_VERSION = 1
_MAX_ROWS = 64
_MAX_BYTES = 1 << 20
_MAX_SECONDS = 1e6
_CONTEXT = 128  # tokens of a text to time; steps begin at the prompt's end
_PROMPT = 16
_ROOM = 8  # tokens that a text must have room for, or its size of tree is left out
_ROUNDS = 15
_BEGINNING = 2.0  # seconds; no further size begins after
_SECONDS = 1.0  # no further round begins after
_SCATTER = 1.25  # upper over lower quartile
_DOUBT = 0.9  # a size that cannot pay even if its first times were so much too long is left out

Times = dict[int, float]  # seconds of a step by number of nodes


def best_nodes(
    model: _core.Model,
    found: Calibration,
    fits: Callable[[int], bool],
    kind: str = STATIC,
) -> int | None:
    """Return the number of nodes that makes most tokens a second here.

    Args:
        model: with heads, on a CPU.
        found: the calibration of its heads.
        fits: whether memory holds a session with so many nodes.
        kind: of trees.

    Returns:
        The root counted; 1 where guessing does not pay. None where timing is switched off, would
        take too long, or finds no room in the model's context.
    """
    if os.environ.get("MEDUSA_EXT_CACHE") == OFF:
        return None
    most = min(len(found.tree) + 1, _most_nodes(json.loads(model.config)["max_context"]))
    counts = [count for count in COUNTS if count <= most and fits(count)]
    if not counts:
        return None
    folder = cache_folder()
    # What the text guesses takes no time.
    timed = DYNAMIC if kind == LOOKUP else kind
    key = key_of(model, found.tree, counts[-1]) | {
        "guesses": timed,
        "ngrams": None if found.ngrams is None else found.ngrams.digest,
    }
    tokens = tokens_per_step(found, kind)
    times = None if folder is None else read_times(folder, key)
    if times is None:
        samples = step_times(model, found, counts, tokens, timed)
        if samples is None:
            return None
        times = {count: statistics.median(seconds) for count, seconds in samples.items()}
        if folder is not None and is_steady(samples):
            write_times(folder, key, times)
    return choose(tokens, {n: t for n, t in times.items() if n in counts})


def tokens_per_step(found: Calibration, kind: str = STATIC) -> list[float]:
    """Return how many tokens a step emits with trees of 1, 2, ... nodes.

    Of dynamic trees some sizes were calibrated, and between these a straight line is taken.
    """
    tokens = 1.0 + np.cumsum([0.0, *found.content["values"]])
    if kind != STATIC:
        known = predictions(found.content, kind)
        steps = {1: 1.0} | {count: known[count]["tokens_per_later_step"] for count in sorted(known)}
        tokens = np.interp(np.arange(1, len(tokens) + 1), list(steps), list(steps.values()))
    result: list[float] = tokens.tolist()
    return result


def choose(tokens: Sequence[float], times: Times) -> int:
    """Return the number of nodes of most tokens a second; of equals the fewest.

    Args:
        tokens: of a step with 1, 2, ... nodes.
        times: of steps; between two that were measured a straight line is taken.
    """
    if not times:
        return 1
    measured = sorted(times)
    counts = np.arange(measured[0], min(measured[-1], len(tokens)) + 1)
    seconds = np.interp(counts, measured, [times[count] for count in measured])
    rates = np.array([tokens[count - 1] for count in counts]) / seconds
    return int(counts[np.argmax(rates)])


def is_steady(samples: Mapping[int, Sequence[float]]) -> bool:
    """Whether times scatter as little as those of a machine that has nothing else to do."""
    quartiles = [np.quantile(seconds, [0.25, 0.75]) for seconds in samples.values()]
    return bool(statistics.median(high / low for low, high in quartiles) < _SCATTER)


def step_times(
    model: _core.Model,
    found: Calibration,
    counts: Sequence[int],
    tokens: Sequence[float],
    kind: str = STATIC,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, list[float]] | None:
    """Measure what a step takes with some numbers of nodes, in sessions of their own.

    The sizes take turns, a step each, so that a machine that changes its pace changes it for all.
    So they are in memory together, ten at most, before the engine has a session: each holds a cache
    of 128 tokens and the workspace of a pass of as many rows as it has nodes, but of 16 at least.

    Args:
        model: with heads.
        found: the calibration of its heads.
        counts: numbers of nodes, rising, the first being 1. Once one cannot pay, the greater ones
            are left out; if the first takes so long that there is no time for all, only each
            second, third, ... is measured.
        tokens: that a step emits with 1, 2, ... nodes.
        kind: of trees.
        clock: seconds.

    Returns:
        Seconds of each step by number of nodes; None where there is no time for two sizes.
    """
    lanes: dict[int, _Lane] = {}
    first: Times = {}
    began, stride = clock(), 1
    for index, count in enumerate(counts):
        if index % stride:
            continue
        lanes[count] = _Lane(model, found, count, kind)
        first[count] = min(lanes[count].step() for _ in range(2))
        spent = clock() - began
        if index == 0:
            if spent > _BEGINNING / 2:
                return None
            stride = max(1, math.ceil(len(counts) * spent / _BEGINNING))
        # A greater tree takes no less time, and accepts no more than the greatest.
        most = tokens[counts[-1] - 1] / (_DOUBT * first[count])
        if spent > _BEGINNING or most < max(tokens[n - 1] / first[n] for n in first):
            break
    taken: dict[int, list[float]] = {count: [] for count in lanes}
    end = clock() + _SECONDS
    for _ in range(_ROUNDS):
        for count, lane in lanes.items():
            taken[count].append(lane.step())
        if clock() > end:
            break
    return taken


def _sizes(max_context: int) -> tuple[int, int]:
    """Context and prompt of a text to time."""
    context = min(_CONTEXT, max_context)
    return context, min(_PROMPT, context // 4)


def _most_nodes(max_context: int) -> int:
    """Nodes of the greatest tree that leaves room for a text; 0 where there is none for any."""
    context, prompt = _sizes(max_context)
    return context - prompt - _ROOM if context >= 2 * _ROOM else 0


class _Lane:
    """A text that is decoded with one size of tree, a step at a time, over and over."""

    def __init__(self, model: _core.Model, found: Calibration, nodes: int, kind: str) -> None:
        config = json.loads(model.config)
        self.context, length = _sizes(config["max_context"])
        # What the text says hardly matters: what a step takes depends on its rows.
        self.prompt = [token % config["vocab_size"] for token in range(length)]
        self.session = _core.Session(
            model,
            None if nodes == 1 else found.drafter(model, nodes, kind),
            max_batch=1,
            max_context=self.context,
            cache_tokens=self.context,
            prefill_chunk=length,
        )
        # Ends where the whole tree still fits: nearer the context's end trees are smaller.
        self.max_new_tokens = self.context - length - nodes
        self.begin()

    def begin(self) -> None:
        """Submit the prompt, take it in, and warm up with a step of the same size."""
        self.session.submit(self.prompt, max_new_tokens=self.max_new_tokens, reuse_prefix=False)
        for _ in range(2):
            self.session.step()

    def step(self) -> float:
        """Seconds of a step that emits tokens."""
        if self.session.idle:
            self.begin()  # leaves a token to emit
        began = time.perf_counter()
        self.session.step()
        return time.perf_counter() - began


def key_of(model: _core.Model, paths: Paths, most: int) -> dict[str, Any]:
    """Return all that the time of a step depends on, and the greatest number of nodes there is."""
    config = json.loads(model.config)
    return {
        "version": _core.__version__,
        "model": f"{config['family']} {_digest(config)}",
        "heads": config["heads"],
        "tree": _digest(paths[: max(COUNTS)]),
        "nodes": most,
        "dtype": model.dtype,
        "weight_bytes": model.weight_bytes,
        "threads": model.backend.threads,
        "backend": model.backend.detail,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def cpu_name() -> str:
    """Return what the processor calls itself."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "cpu model"):
                return value.strip()
    return platform.processor() or platform.machine()


def cache_folder() -> Path | None:
    """Return where times are kept; None where there is no home."""
    given = os.environ.get("MEDUSA_EXT_CACHE")
    if given:
        return Path(given)
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if Path(caches).is_absolute():
        return Path(caches) / "medusa_ext"
    with suppress(RuntimeError):  # no home
        return Path.home() / ".cache" / "medusa_ext"
    return None


def read_times(folder: Path, key: Mapping[str, Any]) -> Times | None:
    """Return the times that were kept under a key; None where there are none of any use."""
    for row in _rows(folder):
        if row["key"] == key:
            return _times(row["seconds"])
    return None


def write_times(folder: Path, key: Mapping[str, Any], times: Times) -> None:
    """Keep times, the latest _MAX_ROWS of any key; a folder that cannot be written is left alone.

    The file is replaced as a whole, so that engines that start together may lose each other's row,
    which is then measured again, but never see half a file.
    """
    rows = [row for row in _rows(folder) if row["key"] != key]
    rows.append(
        {"key": dict(key), "seconds": {str(count): value for count, value in times.items()}}
    )
    lines = ",\n".join(json.dumps(row) for row in rows[-_MAX_ROWS:])
    text = f'{{"version": {_VERSION}, "rows": [\n{lines}\n]}}\n'
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{FILE_NAME}.", dir=folder)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).replace(folder / FILE_NAME)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the file that are whole."""
    path = folder / FILE_NAME
    try:
        if path.stat().st_size > _MAX_BYTES:
            return []
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        return []
    rows = content.get("rows")
    return [
        row
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
        and isinstance(row.get("key"), dict)
        and _times(row.get("seconds")) is not None
    ]


def _times(value: object) -> Times | None:
    """Seconds by number of nodes; None where they are something else."""
    if not isinstance(value, dict) or "1" not in value:
        return None
    known = {str(count): count for count in COUNTS}
    for name, seconds in value.items():
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if name not in known or not is_number or not 0 < seconds < _MAX_SECONDS:
            return None
    return {known[name]: float(seconds) for name, seconds in value.items()}
