"""How many nodes a tree should have on this machine: steps are timed once, and remembered.

Calibration says what a tree of N nodes accepts, which is true of the heads wherever they run. What
a step with it takes, t(N), belongs to a machine: its cores, its memory, how the weights are stored.
So an engine with tree="auto" on a CPU takes the time of a few sizes after it has loaded, a second
or two, and chooses the N that maximises tokens per step / t(N). N = 1 is plain decoding.

The times are kept in step_times.json in MEDUSA_EXT_CACHE, else in medusa_ext below XDG_CACHE_HOME
or ~/.cache, under all that they depend on; a file that is damaged or cannot be written costs
another measurement and nothing else. Times that scatter, because the machine was busy, serve this
once and are not kept. With MEDUSA_EXT_CACHE=off nothing is timed.
"""

from __future__ import annotations

import hashlib
import json
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
from medusa_ext.calibration.file import Calibration
from medusa_ext.trees import Paths

COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64)
FILE_NAME = "step_times.json"
OFF = "off"

_VERSION = 1
_MAX_ROWS = 64
_MAX_BYTES = 1 << 20
_MAX_SECONDS = 1e6
_CONTEXT = 256  # tokens of a text to time; steps begin at the prompt's end
_PROMPT = 64
_ROUNDS = 15
_SECONDS = 1.0  # no further round begins after
_SCATTER = 1.25  # upper over lower quartile
_DOUBT = 0.9  # a size that cannot pay even if its first times were so much too long is left out

Times = dict[int, float]  # seconds of a step by number of nodes


def best_nodes(model: _core.Model, found: Calibration, fits: Callable[[int], bool]) -> int | None:
    """Return the number of nodes that makes most tokens a second here.

    Args:
        model: with heads, on a CPU.
        found: the calibration of its heads.
        fits: whether memory holds a session with so many nodes.

    Returns:
        The root counted; 1 where guessing does not pay. None where timing is switched off.
    """
    if os.environ.get("MEDUSA_EXT_CACHE") == OFF:
        return None
    folder = cache_folder()
    key = key_of(model, found.tree)
    times = None if folder is None else read_times(folder, key)
    if times is None:
        counts = [count for count in COUNTS if count <= len(found.tree) + 1 and fits(count)]
        samples = step_times(model, found, counts)
        times = {count: statistics.median(seconds) for count, seconds in samples.items()}
        if folder is not None and is_steady(samples):
            write_times(folder, key, times)
    return choose(tokens_per_step(found), {n: t for n, t in times.items() if fits(n)})


def tokens_per_step(found: Calibration) -> list[float]:
    """Return how many tokens a step emits with the first 1, 2, ... nodes of a calibrated tree."""
    return [1.0, *(1.0 + np.cumsum(found.content["values"])).tolist()]


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
    model: _core.Model, found: Calibration, counts: Sequence[int]
) -> dict[int, list[float]]:
    """Measure what a step takes with some numbers of nodes, in sessions of their own.

    The sizes take turns, a step each, so that a machine that changes its pace changes it for all.

    Args:
        model: with heads.
        found: the calibration, whose tree each size is a beginning of.
        counts: numbers of nodes, rising; once one cannot pay, the greater ones are left out.

    Returns:
        Seconds of each step by number of nodes.
    """
    tokens = tokens_per_step(found)
    lanes: dict[int, _Lane] = {}
    first: Times = {}
    for count in counts:
        lanes[count] = _Lane(model, found.tree[: count - 1])
        first[count] = min(lanes[count].step() for _ in range(2))
        # A greater tree takes no less time, and accepts no more than the greatest.
        most = tokens[counts[-1] - 1] / (_DOUBT * first[count])
        if most < max(tokens[n - 1] / first[n] for n in first):
            break
    taken: dict[int, list[float]] = {count: [] for count in lanes}
    end = time.perf_counter() + _SECONDS
    for _ in range(_ROUNDS):
        for count, lane in lanes.items():
            taken[count].append(lane.step())
        if time.perf_counter() > end:
            break
    return taken


class _Lane:
    """A text that is decoded with one size of tree, a step at a time, over and over."""

    def __init__(self, model: _core.Model, paths: Paths) -> None:
        config = json.loads(model.config)
        self.context = min(_CONTEXT, config["max_context"])
        # What the text says hardly matters: what a step takes depends on its rows.
        length = min(_PROMPT, self.context // 4)
        self.prompt = [token % config["vocab_size"] for token in range(length)]
        drafter = None
        if paths:
            drafter = _core.medusa_drafter(model, _core.TreeSpec.from_paths(paths))
        self.session = _core.Session(
            model,
            drafter,
            max_batch=1,
            max_context=self.context,
            cache_tokens=self.context,
            prefill_chunk=length,
        )
        # Ends where the whole tree still fits: nearer the context's end trees are smaller.
        self.max_new_tokens = max(2, self.context - length - len(paths) - 1)
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


def key_of(model: _core.Model, paths: Paths) -> dict[str, Any]:
    """Return all that the time of a step depends on."""
    config = json.loads(model.config)
    return {
        "version": _core.__version__,
        "model": f"{config['family']} {_digest(config)}",
        "heads": config["heads"],
        "tree": _digest(paths[: max(COUNTS)]),
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
