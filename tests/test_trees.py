"""Named trees, cutting, and every invalid tree refused in one line."""

import json

import numpy as np
import pytest

from medusa_ext import _core
from medusa_ext.trees import MAX_RANKS, named_tree, read_tree, resolve_tree, tree_names


def test_named_trees_are_the_published_ones(shared_dir):
    published = json.loads((shared_dir / "data" / "named_trees.json").read_text())["trees"]
    assert {name: named_tree(name) for name in tree_names()} == published


@pytest.mark.parametrize("name", tree_names())
def test_named_tree_as_nodes(name):
    """64 nodes; parents, depths and ranks as the paths say, in the order (length, path)."""
    tree = resolve_tree(name, 4)
    paths = [[], *sorted(named_tree(name), key=lambda path: (len(path), path))]
    assert tree.num_nodes == len(paths) == 64
    assert tree.depth == max(map(len, paths)) == (3 if name == "vicuna_33b_stage1" else 4)
    assert tree.paths() == paths[1:]
    assert tree.depths() == [len(path) for path in paths]
    assert tree.parents() == [-1] + [paths.index(path[:-1]) for path in paths[1:]]
    for depth in range(1, tree.depth + 1):
        ranks = [path[depth - 1] for path in paths if len(path) >= depth]
        assert tree.num_ranks(depth) == 1 + max(ranks)


@pytest.mark.parametrize("name", tree_names())
def test_any_cut_keeps_parents(name):
    for nodes in range(1, 65):
        paths = named_tree(name, max_nodes=nodes)
        assert len(paths) == nodes - 1
        assert _core.TreeSpec.from_paths(paths).num_nodes == nodes
    for depth in range(5):
        paths = named_tree(name, max_depth=depth)
        assert paths == [path for path in named_tree(name) if len(path) <= depth]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("vocab_size", [None, 5, 1])
@pytest.mark.parametrize("max_nodes", [None, 1, 16])
def test_auto_always_fits(num_heads, vocab_size, max_nodes):
    tree = resolve_tree("auto", num_heads, vocab_size=vocab_size, max_nodes=max_nodes)
    assert tree.depth <= num_heads
    assert all(tree.num_ranks(depth) <= (vocab_size or 256) for depth in range(1, tree.depth + 1))
    assert tree.num_nodes <= (max_nodes or 64)
    if vocab_size is None and max_nodes is None:
        wanted = 1 + len(named_tree("mc_sim_7b_63", max_depth=num_heads))
        assert tree.num_nodes == wanted
        assert tree.depth == min(num_heads, 4)


def test_a_number_of_nodes(tmp_path):
    """As text too; of the published tree, or of the one that was found best."""
    published = named_tree("mc_sim_7b_63", max_depth=3)
    for given in (9, np.int64(9), "9"):
        assert sorted(resolve_tree(given, 3, max_nodes=16).paths()) == sorted(published[:8])
    best = [[4], [0], [4, 2], [0, 0]]
    assert resolve_tree(3, 2, best=best).paths() == [[0], [4]]
    assert resolve_tree("auto", 2, max_nodes=4, best=best).paths() == [[0], [4], [4, 2]]
    assert resolve_tree(256, 2, best=best).num_nodes == 5
    assert resolve_tree(1, 2).num_nodes == 1


def test_own_paths_in_every_form(tmp_path):
    paths = [[0], [1], [0, 0]]
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(paths))
    spec = _core.TreeSpec.from_paths(paths)
    for given in (paths, tuple(map(tuple, paths)), path, str(path), spec):
        assert resolve_tree(given, 2).paths() == [[0], [1], [0, 0]]
    assert read_tree(path) == paths
    assert resolve_tree([], 1).num_nodes == 1


INVALID = [
    ([[0], [0, 0], [1, 0]], "parent"),
    ([[0], [0]], "twice|duplicate"),
    ([[-1]], "-1"),
    ([[]], "path \\[\\] is the root"),
    ([[0], 1], "wanted paths"),
    ([["0"]], "wanted paths"),
    ([[0.5]], "wanted paths"),
    ([[True]], "wanted paths"),
    ([[2**40]], "wanted paths"),
    (["01"], "wanted paths"),
    (7.5, "wanted a list of paths"),
    (True, "wanted a list of paths"),
    (0, "a tree's number of nodes must be an integer in"),
    (257, "a tree's number of nodes must be an integer in .*got 257"),
    ("257", "a tree's number of nodes must be an integer in"),
    ({"0": 1}, "wanted a list of paths"),
    (None, "wanted a list of paths"),
    ([[0], [0, 0], [0, 0, 0]], "depth 3, the model has 2 heads"),
    ([[rank] for rank in range(MAX_RANKS)], "256"),
    ([[MAX_RANKS]], "rank 256 at depth 1; the heads rank 256"),
    ("mc_sim_7b_63", "tree mc_sim_7b_63 has depth 4, the model has 2 heads"),
    ("nonsense", "no tree is named 'nonsense'; give"),
]


@pytest.mark.parametrize(("tree", "words"), INVALID, ids=[words for _, words in INVALID])
def test_invalid_trees(tree, words):
    with pytest.raises(ValueError, match=words) as error:
        resolve_tree(tree, 2)
    assert "\n" not in str(error.value)


def test_ranks_beyond_a_small_vocabulary():
    with pytest.raises(ValueError, match="rank 7 at depth 1; the heads rank 7 tokens, 0 to 6"):
        resolve_tree([[7]], 1, vocab_size=7)
    assert resolve_tree([[6]], 1, vocab_size=7).num_nodes == 2


@pytest.mark.parametrize("text", ["", "{", "[[0], ", "[" * 100_000])
def test_files_that_are_no_trees(tmp_path, text):
    path = tmp_path / "tree.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tree\.json is not valid JSON"):
        resolve_tree(path, 4)


def test_files_that_hold_or_are_something_else(tmp_path):
    path = tmp_path / "tree.json"
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="wanted a list of paths"):
        resolve_tree(str(path), 4)
    with pytest.raises(ValueError, match="cannot read the tree"):
        resolve_tree(str(tmp_path / "nowhere.json"), 4)
    with pytest.raises(ValueError, match="cannot read the tree"):
        resolve_tree(tmp_path, 4)


def test_no_such_name():
    with pytest.raises(ValueError, match="no tree is named 'x'; named trees are mc_sim_7b_63"):
        named_tree("x")
