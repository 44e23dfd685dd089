"""calibration.json, which lies beside Medusa heads: what `medusa-ext calibrate` found.

One key a line:

- `version` 1; `model`; `vocab_size`; `data`: the file's name; `tokens`, `answers`: in it
- `heads` [K][R]: how often a head's candidate of rank r is the model's own token, over `counts` [K]
- `tree`: paths, the most valuable first, so that its beginning is the tree of any number of nodes;
  `values`: how often a step's tokens run through each
- `guesses`: `dynamic` and `lookup`, what counts how much where each step grows a tree of its own,
  without and with the text so far (`medusa_ext.calibration.guesses`), and `ngrams`, the digest of
  the table that they were fitted with
- `predicted`: for each number of nodes the tokens per step on text that did not choose the tree
  (each half with what the other half chose), and its standard error over texts; `dynamic` and
  `lookup`: the same of trees that steps grow
- `by_category`: `heads`, `counts` and tokens per step by the data's own categories
- `step_times`: a row for each device and kind of trees (`guesses`: static, dynamic or lookup):
  seconds of a step by number of nodes, and the best number
- `check`: prediction against measurement, on prompts that were not used, and on which device

Old files lack `guesses` and what belongs to it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from medusa_ext import _core
from medusa_ext.calibration.guesses import NGRAM, Weights, compiled
from medusa_ext.device import AUTO_NODES
from medusa_ext.loading import Checkpoint, LoadError, Stored
from medusa_ext.loading.exporting import CALIBRATION_FILE, CALIBRATION_KEY
from medusa_ext.loading.files import write_whole
from medusa_ext.loading.ngrams import NGRAMS_FILE, Ngrams, find_ngrams
from medusa_ext.options import shown
from medusa_ext.trees import MAX_NODES, Paths, Tree, is_chosen, resolve_tree

_MAX_BYTES = 16 << 20
_REPAIR = "make it again with `medusa-ext calibrate`, or remove it"

# Of step_times, and of check.
_SAME_DEVICE = ("device", "detail", "weights", "dtype", "threads", "guesses")

# Kinds of trees: the calibrated one; those that steps grow; these with the text so far.
STATIC, DYNAMIC, LOOKUP = "static", "dynamic", "lookup"

# What each key must hold: a type, [of all], or {key: of its value}, ... standing for any key;
# (of it,) may also be null or absent.
_SHARES = {"heads": [[float]], "counts": [int]}
_STEPS = {"tokens_per_step": float, "error": (float,), "tokens_per_later_step": float}
_SHAPE = {
    "model": str,
    "data": str,
    "tokens": int,
    **_SHARES,
    "tree": list,
    "values": [float],
    "predicted": [{"nodes": int, **_STEPS}],
    "by_category": {...: {**_SHARES, "tokens_per_step": {...: float}}},
    "step_times": [
        {
            "device": str,
            "weights": (str,),
            "dtype": str,
            "threads": int,
            "nodes": int,
            "seconds": {...: float},
            "guesses": (str,),
        }
    ],
}
_GUESSES = {
    "guesses": {
        kind: {"heads": [[float]], "lookup": [[float]], "chain": [float]}
        for kind in (DYNAMIC, LOOKUP)
    }
    | {"ngrams": (str,)},
    "predicted": [{DYNAMIC: _STEPS, LOOKUP: _STEPS}],
    "by_category": {...: {DYNAMIC: {...: float}, LOOKUP: {...: float}}},
}
_CHECK = {
    "device": {...: object},
    "prompts": int,
    "all": [{"nodes": int, "predicted": float, "measured": float, "measured_tokens_per_s": float}],
    "by_category": {...: {...: {"measured": float}}},
}


@dataclass(frozen=True)
class Calibration:
    """A calibration file that fits its heads; `content` is all of it.

    Attributes:
        tree: paths, the most valuable first.
        step_times: rows with device, weights, dtype, threads, seconds and nodes.
        content: as in the file.
        ngrams: of the heads, which lie beside the file; None: there are none.
    """

    tree: Paths
    step_times: list[dict[str, Any]]
    content: dict[str, Any]
    ngrams: Ngrams | None = None

    @property
    def knows_guesses(self) -> bool:
        """Whether it says what counts how much, so that steps may grow trees."""
        return bool(self.content.get("guesses"))

    @cached_property
    def _ngrams(self) -> _core.Ngrams | None:
        return compiled(self.ngrams)

    def drafter(self, model: _core.Model, nodes: int, kind: str) -> _core.Drafter:
        """Make a drafter.

        Args:
            model: with the heads.
            nodes: of a tree, the root counted; of `self.tree` the first.
            kind: of trees.
        """
        if kind == STATIC:
            return _core.medusa_drafter(model, _core.TreeSpec.from_paths(self.tree[: nodes - 1]))
        weights = Weights.of(self.content["guesses"][kind])
        return _core.dynamic_drafter(model, weights.model(self._ngrams), nodes)

    def nodes_for(self, device: str, stored: Stored, threads: int, kind: str) -> int:
        """Return the number of nodes that was best on the device most like this one."""
        rows = [row for row in self.step_times if row["device"] == device]
        if not rows:
            return AUTO_NODES[device]
        like = max(  # the last of several that are equally like
            enumerate(rows),
            key=lambda at: (
                kind_of_row(at[1]) == kind,
                weights_of(at[1]) == stored.text,
                at[1]["dtype"] == stored.dtype,
                -abs(at[1]["threads"] - threads),
                at[0],
            ),
        )
        return int(like[1]["nodes"])


def find_calibration(checkpoint: Checkpoint) -> Calibration | None:
    """Return the calibration that a model's heads carry, None where they carry none.

    One that does not fit them is a warning: it is of no use, but guesses never change the output.
    """
    info, found = checkpoint.heads_info, None
    try:
        if info is not None and info.format == "export":
            text = (checkpoint.metadata or {}).get(CALIBRATION_KEY)
            if text is not None:
                found = _parsed(text, str(info.path), checkpoint.config)
        elif info is not None and (info.path / CALIBRATION_FILE).is_file():
            found = read_calibration(info.path / CALIBRATION_FILE, checkpoint.config)
    except LoadError as error:
        warnings.warn(f"{error}; a published tree is used", stacklevel=3)
    if found is None or not found.knows_guesses:
        return found
    ngrams = find_ngrams(checkpoint)
    wanted = found.content["guesses"].get("ngrams")
    if (None if ngrams is None else ngrams.digest) != wanted:
        what = "is missing" if ngrams is None else "is not the one that they were calibrated with"
        repair = f"copy {NGRAMS_FILE} from where they were calibrated, or calibrate them again"
        if checkpoint.metadata is not None:
            repair = "export again from a folder of heads that is whole"
        warnings.warn(
            f"{checkpoint.source.given}: the heads' table of n-grams {what}, so that they guess "
            f"worse; {repair}",
            stacklevel=3,
        )
    return replace(found, ngrams=ngrams)


def check_lookup(asked: object, tree: Tree) -> None:
    """Refuse, with ValueError, what no file could make right."""
    if not (asked is None or isinstance(asked, bool)):
        raise ValueError(f"lookup must be True, False or None, got {shown(asked)}")
    if asked and not is_chosen(tree):
        raise ValueError(
            f"lookup is True, but the tree {shown(tree)} is the same in each step, which leaves "
            'the text no room; give tree="auto" or a number of nodes'
        )


def kind_of_trees(asked: bool | None, tree: Tree, found: Calibration | None, device: str) -> str:
    """Which kind of trees Medusa heads guess.

    Args:
        asked: whether the user wants the text so far to take part; None: what is best.
        tree: as for `Engine`.
        found: the calibration of the heads.
        device: "cpu" or "cuda", where guesses would have to come from the host.

    Raises:
        ValueError: it is wanted, and nothing is known of it.
    """
    known = found is not None and found.knows_guesses
    if asked and not known:
        raise ValueError(
            "lookup is True, but no calibration says what it is worth beside these heads; run "
            "`medusa-ext calibrate`, or leave lookup out"
        )
    if not (known and is_chosen(tree)):
        return STATIC
    if asked or (asked is None and device == "cpu"):
        return LOOKUP
    return DYNAMIC if device == "cpu" else STATIC


def auto_tree(
    found: Calibration | None, device: str, stored: Stored, threads: int, kind: str
) -> tuple[int, Paths | None]:
    """The nodes of the tree to use, the root counted, and its paths, the most valuable first.

    Args:
        found: the calibration of the heads; None: the paths are None too.
        device: "cpu" or "cuda".
        stored: types of weights and cache.
        threads: of the CPU.
        kind: of trees.
    """
    if found is None:
        return AUTO_NODES[device], None
    return found.nodes_for(device, stored, threads, kind), found.tree


def read_calibration(path: Path, config: Mapping[str, Any]) -> Calibration:
    """Read and check a calibration file.

    Args:
        path: of the file.
        config: canonical configuration of the model with the heads.

    Raises:
        LoadError: the file is damaged or for other heads; says what to do.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise LoadError(f"{path} has over {_MAX_BYTES} bytes and is no calibration; {_REPAIR}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LoadError(f"{path} is not UTF-8 text; {_REPAIR}") from None
    return _parsed(text, str(path), config)


def predictions(content: Mapping[str, Any], kind: str) -> dict[int, dict[str, Any]]:
    """What a calibration's content predicts of a kind of trees, by number of nodes."""
    return {row["nodes"]: row if kind == STATIC else row[kind] for row in content["predicted"]}


def kind_of_row(row: Mapping[str, Any]) -> str:
    """The kind of trees of a row of step_times; old rows lack it."""
    return str(row.get("guesses") or STATIC)


def weights_of(row: Mapping[str, Any]) -> str:
    """The types of the weights of a row of step_times; old rows lack it and had one."""
    return str(row.get("weights") or row.get("dtype"))


def device_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a row of step_times that names what was measured."""
    known = {name: row.get(name) for name in _SAME_DEVICE}
    return known | {"weights": weights_of(row), "guesses": kind_of_row(row)}


def check_here(content: Mapping[str, Any]) -> dict[str, Any]:
    """The check of a calibration's content, if it was made on the device of the last step times."""
    check: dict[str, Any] = content.get("check", {})
    times = content["step_times"][-1]
    return check if device_of(check.get("device", {})) == device_of(times) else {}


def _parsed(text: str, where: str, config: Mapping[str, Any]) -> Calibration:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{where}: its calibration is not JSON ({error}); {_REPAIR}") from None
    try:
        return _checked(content, config)
    except ValueError as error:
        raise LoadError(f"{where}: {error}; {_REPAIR}") from None


def write_calibration(path: Path, content: Mapping[str, Any]) -> None:
    """Write a calibration file; LoadError where the disk refuses, and nothing stays."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_whole(path, text.encode())


def _checked(content: object, config: Mapping[str, Any]) -> Calibration:
    """The file's content, every field that is used checked; ValueError without the file's name."""
    if not isinstance(content, dict) or content.get("version") != 1:
        raise ValueError("it is no calibration of version 1")
    heads, own = content.get("heads"), config["heads"]
    if not isinstance(heads, list) or len(heads) != own["num_heads"]:
        found = len(heads) if isinstance(heads, list) else "no"
        raise ValueError(f"it is for {found} heads, the heads beside it are {own['num_heads']}")
    if content.get("vocab_size") != config["vocab_size"]:
        raise ValueError(
            f"it is for a vocabulary of {content.get('vocab_size')}, the model has "
            f"{config['vocab_size']}"
        )
    _match(content, _SHAPE)
    if "check" in content:
        _match(content["check"], _CHECK, "check")
    if "guesses" not in content:  # what was measured with lookup then was of another method
        old = {"lookup": True}.items()
        content["step_times"] = [row for row in content["step_times"] if not old <= row.items()]
        if "check" in content and old <= content["check"]["device"].items():
            del content["check"]
    tree, rows = content["tree"], content["step_times"]
    if len(tree) >= MAX_NODES:
        raise ValueError(f"tree must be a list of up to {MAX_NODES - 1} paths")
    resolve_tree(tree, own["num_heads"], vocab_size=own["head_vocab"])
    for count, path in enumerate(tree):  # the beginning of the list must be a tree too
        if len(path) > 1 and path[:-1] not in tree[:count]:
            raise ValueError(f"path {path} stands before its parent")
    for row in (*content["predicted"], *rows):
        if not 1 <= row["nodes"] <= MAX_NODES:
            raise ValueError(f"nodes is {row['nodes']}; wanted 1 to {MAX_NODES}")
    if not all(0 <= share <= 1 for share in content["values"]):
        raise ValueError("values must lie in [0, 1]")
    if "guesses" in content:
        _match(content, _GUESSES)
        for kind, length in ((DYNAMIC, 0), (LOOKUP, NGRAM)):
            given = content["guesses"][kind]
            sizes = [len(row) for row in given["lookup"]] + [len(given["chain"])]
            counts = [len(row) for row in given["heads"]]
            if sizes != [length] * (own["num_heads"] + 1) or counts != [3] * own["num_heads"]:
                raise ValueError(
                    f"guesses.{kind} has not 3 weights and {length} of lookup for each of "
                    f"{own['num_heads']} heads, and {length} of chain"
                )
            Weights.of(given).model(None)  # which refuses what is out of range
    if len(content["values"]) != len(tree):
        raise ValueError(f"it has {len(content['values'])} values for {len(tree)} paths")
    for part in (content, *content["by_category"].values()):
        if not len(part["heads"]) == len(part["counts"]) == own["num_heads"]:
            raise ValueError(f"heads and counts must have {own['num_heads']} entries each")
    return Calibration(tree, rows, content)


def _match(value: Any, shape: Any, where: str = "") -> None:  # noqa: ANN401 - JSON
    """Compare a value with what it must hold; ValueError names the place."""
    if isinstance(shape, tuple):
        if value is None:
            return
        (shape,) = shape
    kind = shape if isinstance(shape, type) else type(shape)
    if kind is float:
        fits = type(value) in (int, float) and abs(value) < 1e18  # NaN is not
    else:
        fits = isinstance(value, kind) and (kind in (bool, object) or not isinstance(value, bool))
    if not fits:
        raise ValueError(f"{where} is missing or of the wrong type")
    if kind is list and shape is not list:
        for index, item in enumerate(value):
            _match(item, shape[0], f"{where}[{index}]")
    elif kind is dict and shape is not dict:
        keys = value if ... in shape else shape
        for key in keys:
            _match(value.get(key), shape.get(key, shape.get(...)), f"{where}.{key}".lstrip("."))
