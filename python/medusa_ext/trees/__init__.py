"""Trees of guesses: the published ones by name, and the checks on a user's own."""

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from medusa_ext import _core
from medusa_ext.options import integer, plain, shown

Paths = list[list[int]]
Tree = str | int | os.PathLike[str] | Sequence[Sequence[int]] | np.ndarray | _core.TreeSpec

MAX_RANKS = 256  # candidates that top_k keeps of each head
MAX_NODES = 256  # of a tree, the root counted
AUTO_TREE = "mc_sim_7b_63"


def tree_names() -> list[str]:
    """The published trees, each of 64 nodes with the root, depth 3 or 4."""
    return list(_named())


def named_tree(name: str, *, max_depth: int | None = None, max_nodes: int | None = None) -> Paths:
    """Paths of a published tree, the most valuable first.

    Args:
        name: one of `tree_names()`.
        max_depth: drop deeper paths.
        max_nodes: keep the best paths only, the root counted.

    Raises:
        ValueError: no tree has this name.
    """
    if name not in _named():
        raise ValueError(f"no tree is named {name!r}; named trees are {', '.join(_named())}")
    # Published in the order in which the search added them: a parent before its children.
    paths = [list(path) for path in _named()[name] if max_depth is None or len(path) <= max_depth]
    return paths if max_nodes is None else paths[: max(max_nodes - 1, 0)]


def read_tree(path: str | os.PathLike[str]) -> Paths:
    """The paths in a JSON file: a list of lists of ranks, such as [[0], [1], [0, 0]].

    Raises:
        ValueError: no such file, or it holds something else.
    """
    try:
        return _checked_paths(json.loads(Path(path).read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise ValueError(f"cannot read the tree {os.fspath(path)}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the tree {os.fspath(path)} is not valid JSON: {error}") from None


def resolve_tree(
    tree: Tree,
    num_heads: int,
    *,
    vocab_size: int | None = None,
    max_nodes: int | None = None,
    best: Paths | None = None,
) -> _core.TreeSpec:
    """The tree for a model's heads.

    Args:
        tree: "auto", the number of nodes to keep of the tree that "auto" takes, a name, a JSON
            file, a list (or array) of paths, or a TreeSpec.
        num_heads: the depth that the heads can fill, at least 1.
        vocab_size: tokens that each head ranks; None: no bound but MAX_RANKS.
        max_nodes: for "auto" alone: the nodes to keep, the root counted.
        best: what "auto" takes, the most valuable path first; None: a published tree, cut to the
            heads.

    Raises:
        ValueError: an invalid tree, one deeper than the heads, or ranks beyond what the heads rank.
    """
    if isinstance(tree, _core.TreeSpec):
        return _fitting(tree, "the tree", num_heads, vocab_size)
    name = os.fspath(tree) if isinstance(tree, (str, os.PathLike)) else None
    count = _node_count(tree)
    if name == "auto" or count is not None:
        max_nodes = max_nodes if count is None else count
        if best is None:
            limit = min(MAX_RANKS, vocab_size or MAX_RANKS)
            published = named_tree(AUTO_TREE, max_depth=num_heads)
            best = [path for path in published if max(path) < limit]
        return _core.TreeSpec.from_paths(
            best if max_nodes is None else best[: max(max_nodes - 1, 0)]
        )
    if name is None:
        what, paths = "the tree", _checked_paths(tree, "the tree")
    elif name in _named():
        what, paths = f"tree {name}", named_tree(name)
    elif isinstance(tree, os.PathLike) or name.endswith(".json"):
        what, paths = f"tree {name}", read_tree(name)
    else:
        raise ValueError(
            f'no tree is named {name!r}; give "auto", a number of nodes, a list of paths, a .json '
            f"file, or one of "
            f"{', '.join(_named())}"
        )
    try:
        spec = _core.TreeSpec.from_paths(paths)
    except ValueError as error:
        raise ValueError(f"{what} is invalid: {str(error).removeprefix('tree: ')}") from None
    return _fitting(spec, what, num_heads, vocab_size)


def is_auto(tree: object) -> bool:
    """Whether the tree is left to us; an array would compare element by element."""
    return isinstance(tree, str) and tree == "auto"


def is_chosen(tree: Tree) -> bool:
    """Whether the paths are left to us: of a calibrated tree, where there is one."""
    return is_auto(tree) or _node_count(tree) is not None


def tree_for(
    config: Mapping[str, Any], tree: Tree, auto_nodes: int, best: Paths | None = None
) -> _core.TreeSpec | None:
    """The tree for a model's Medusa heads, None where it has none.

    Args:
        config: of the model.
        tree: what `resolve_tree` takes.
        auto_nodes: that "auto" keeps, the root counted.
        best: what `resolve_tree` takes.

    Raises:
        ValueError: the tree does not fit the heads, or there are no heads for it.
    """
    heads = config["heads"]
    if heads["num_heads"]:
        return resolve_tree(
            tree,
            heads["num_heads"],
            vocab_size=heads["head_vocab"],
            max_nodes=auto_nodes,
            best=best,
        )
    if not is_auto(tree):
        raise ValueError(
            f"tree {shown(tree)} needs Medusa heads, and there are none; leave tree out"
        )
    return None


def _node_count(tree: object) -> int | None:
    """The nodes of a tree that is given by their number, as text too; None for any other tree."""
    if isinstance(tree, str) and re.fullmatch("[0-9]{1,9}", tree):
        tree = int(tree)
    if not isinstance(tree, int | np.integer) or isinstance(tree, bool):
        return None
    return integer("a tree's number of nodes", tree, 1, MAX_NODES)


@functools.cache
def _named() -> dict[str, Paths]:
    text = resources.files(__name__).joinpath("named_trees.json").read_text(encoding="utf-8")
    named: dict[str, Paths] = json.loads(text)
    return named


def _checked_paths(value: Any, what: str) -> Paths:  # noqa: ANN401 - JSON
    """Plain lists of whole numbers; TreeSpec checks what they mean."""
    value = plain(value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(
            f"{what} is a {type(value).__name__}; wanted a list of paths such as [[0], [1], [0, 0]]"
        )
    paths: list[Any] = [plain(path) for path in value]
    for path in paths:
        if (
            not isinstance(path, Sequence)
            or isinstance(path, str)
            or not all(_is_rank(rank) for rank in path)
        ):
            raise ValueError(
                f"{what} holds {shown(path)}; wanted paths such as [0, 0], of whole numbers from 0"
                f" to {MAX_RANKS - 1}"
            )
    return [[int(rank) for rank in path] for path in paths]


def _is_rank(value: object) -> bool:
    return (
        isinstance(value, int | np.integer)
        and not isinstance(value, bool)
        and abs(int(value)) < 2**31
    )


def _fitting(
    spec: _core.TreeSpec, what: str, num_heads: int, vocab_size: int | None
) -> _core.TreeSpec:
    if spec.depth > num_heads:
        raise ValueError(
            f"{what} has depth {spec.depth}, the model has {num_heads} heads; give a tree of "
            f"depth {num_heads} or less"
        )
    limit = min(MAX_RANKS, vocab_size or MAX_RANKS)
    for depth in range(1, spec.depth + 1):
        if spec.num_ranks(depth) > limit:
            raise ValueError(
                f"{what} takes rank {spec.num_ranks(depth) - 1} at depth {depth}; the heads rank "
                f"{limit} tokens, 0 to {limit - 1}"
            )
    return spec
