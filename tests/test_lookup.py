"""What the text so far guesses beside Medusa heads."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration_util import calibrated_heads, make_prompts
from medusa_ext import Engine, _core
from medusa_ext.calibration import lookup
from medusa_ext.calibration.lookup import AHEAD, NGRAM, look_up, shares
from medusa_ext.cli import run

MAX_NGRAM = 4


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    return calibrated_heads(tmp_path_factory.getbasetemp())


def latest(text: list[int]) -> tuple[int, int]:
    """The longest run of tokens before the text's end that equals it; of equals the latest."""
    best = (0, 0)
    for end in range(len(text) - 1):
        length = 0
        while length < min(MAX_NGRAM, end + 1) and text[end - length] == text[-1 - length]:
            length += 1
        if length and length >= best[0]:
            best = (length, end + 1)
    return best


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_the_longest_match_and_of_equals_the_latest(text: list[int]) -> None:
    found = _core.latest_matches(text, 1, len(text) + 1, MAX_NGRAM)
    assert found == [latest(text[:length]) for length in range(1, len(text) + 1)]


@pytest.mark.parametrize("given", [(0, 1, 4), (1, 5, 4), (3, 2, 4), (1, 2, 0)])
def test_texts_that_there_are_not(given: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="latest_matches: texts of"):
        _core.latest_matches([1, 2, 3], *given)


def test_what_an_answer_repeats() -> None:
    """By hand: 5 6 7 8 | 5 6 7 9 5 6 ."""
    tokens, start = [5, 6, 7, 8, 5, 6, 7, 9, 5, 6], 4
    ids = np.full((2, 5, 3), 99, np.int32)
    ids[0, 0] = [1, 6, 7]  # after 5 the first head's second candidate is what stood there
    ids[1, 0] = [7, 1, 2]
    found = look_up(tokens, start, len(tokens), ids)
    assert found.length.tolist() == [1, 2, 3, 0, 1]
    assert found.room.tolist() == [4, 3, 2, 1, 0]
    assert found.known.tolist() == [4, 3, 2, 0, 0]  # 6 7 8 5; 7 8 5; 8 5
    assert found.right.tolist() == [2, 1, 0, 0, 0]
    assert found.place.tolist() == [[1, 0], [-1, -1], [-1, -1], [-1, -1], [-1, -1]]


def test_shares_count_what_there_is_room_for() -> None:
    rows = 200
    random = np.random.default_rng(1)
    length = random.integers(0, 3, rows).astype(np.int8)
    room = random.integers(0, AHEAD + 1, rows).astype(np.int8)
    right = np.minimum(random.integers(0, 6, rows), room).astype(np.int8)
    found = lookup.LookedUp(length, room, room, right, np.zeros((rows, 2), np.int16))
    table = shares(found)
    assert np.shape(table) == (NGRAM, AHEAD)
    for ahead in (1, 3, 5):
        valid = [row for row in range(rows) if length[row] == 1 and room[row] >= ahead]
        share = sum(right[row] >= ahead for row in valid) / len(valid)
        assert table[0][ahead - 1] <= share + 1e-12
    valid = [row for row in range(rows) if length[row] == 2 and room[row] >= 1]
    hits = sum(right[row] >= 1 for row in valid)
    assert table[1][0] == pytest.approx((hits + 8 * table[0][0]) / (len(valid) + 8))
    assert table[2] == table[1]  # no longer match was seen
    assert all(row == sorted(row, reverse=True) for row in table)
    nothing = found.choose(np.empty(0, np.intp))
    assert shares(nothing) == [[0.0] * AHEAD] * NGRAM


@pytest.mark.parametrize(
    ("values", "table", "words"),
    [
        ([0.5], [[0.5]], "1 values given, the tree has 2 nodes"),
        ([0.5, 1.5], [[0.5]], r"outside \[0, 1\]"),
        ([0.5, 0.5], [[0.5], [-1.0]], r"outside \[0, 1\]"),
        ([0.5, float("nan")], [[0.5]], r"outside \[0, 1\]"),
    ],
)
def test_values_that_are_none(calibrated, values, table, words) -> None:
    with Engine(calibrated.model, calibrated.heads, threads=1) as engine:
        tree = _core.TreeSpec.from_paths([[0], [1]])
        with pytest.raises(ValueError, match=words):
            _core.medusa_drafter(engine._model, tree, values, table)


def test_engines_look_up_where_they_choose_the_tree(calibrated) -> None:
    heads = "3 Medusa heads"
    for options, name in [
        ({"tree": 4}, f"{heads} and lookup"),
        ({"tree": 4, "lookup": True}, f"{heads} and lookup"),
        ({"tree": 4, "lookup": False}, heads),
        ({"tree": [[0], [1]]}, heads),
    ]:
        with Engine(calibrated.model, calibrated.heads, threads=1, **options) as engine:
            assert engine.info["drafter"] == name, options


def test_fewer_steps_and_the_same_tokens(calibrated) -> None:
    prompts = make_prompts(16, seed=9)
    results = []
    for look in (False, True):
        with Engine(calibrated.model, calibrated.heads, tree=8, threads=1, lookup=look) as engine:
            results.append(engine.generate(prompts, max_new_tokens=60, eos_token_id=[]))
    without, with_it = results
    assert [one.token_ids for one in without] == [one.token_ids for one in with_it]
    assert sum(one.stats.steps for one in with_it) < sum(one.stats.steps for one in without)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lookup": "yes"}, "lookup must be True, False or None, got 'yes'"),
        ({"lookup": True, "tree": [[0]]}, r"the tree \[\[0\]\] is your own"),
        ({"lookup": True, "heads": None}, "no calibration"),
    ],
)
def test_lookup_that_cannot_be(calibrated, options, words) -> None:
    with pytest.raises(ValueError, match=words):
        Engine(calibrated.model, **({"heads": calibrated.heads, "threads": 1} | options))


def test_the_command_line(calibrated, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "medusa.json").write_text("[[0]]")
    arguments = ["generate", "hi", "-m", str(calibrated.model), "--heads", str(calibrated.heads)]
    assert run([*arguments, "--tree", "medusa.json", "--lookup"]) == 2
    assert "is your own" in capsys.readouterr().err


def test_nodes_without_room_leave_it_to_others() -> None:
    """With room for one token the deeper node is no node, and the last place is the text's."""
    paths = [[0], [0, 0], [1]]
    child = np.array([[1, 3, -1, -1], [2, -1, -1, -1], [-1] * 4, [-1] * 4])
    for room, nodes, right in ((1, [1, 1, 0, 1], 1), (2, [1, 1, 1, 1], 0)):
        row = np.array([room], np.int8)
        one = np.ones(1, np.int8)
        found = lookup.LookedUp(one, row, one, one, np.full((1, 2), -1, np.int16))
        kept = lookup.kept(found, paths, child, lookup.Worth([0.9, 0.8, 0.2], [[0.1] * 3]))
        assert kept.nodes[kept.kind[0]].tolist() == nodes
        assert kept.right.tolist() == [right]
