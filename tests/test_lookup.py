"""What the text so far guesses beside Medusa heads."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration_util import (
    NUM_TOKENS,
    calibrated_heads,
    calibrated_pair,
    make_prompts,
    ranks_of,
    text,
    with_file,
)
from medusa_ext import Engine, _core
from medusa_ext.calibration import lookup
from medusa_ext.calibration.file import Calibration, read_calibration, takes_lookup
from medusa_ext.calibration.lookup import AHEAD, NGRAM, look_up, shares
from medusa_ext.calibration.ranks import walk
from medusa_ext.calibration.tree_search import best_paths
from medusa_ext.cli import run
from medusa_ext.loading import LoadError, Stored, export, load_model, open_checkpoint
from medusa_ext.loading.exporting import CALIBRATION_FILE as FILE_NAME

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
    # 6 7 8 5; 7 8 5; 8 5; none; none
    assert found.right.tolist() == [2, 1, 0, 0, 0]
    assert found.place.tolist() == [[1, 0], [-1, -1], [-1, -1], [-1, -1], [-1, -1]]


def test_a_loop_is_guessed_to_any_length() -> None:
    tokens = [9, *[1, 2] * 12]
    found = look_up(tokens, 3, len(tokens), np.full((1, 21, 1), 99, np.int32))
    assert found.length.tolist() == [1, *range(2, NGRAM), *[NGRAM] * 14]
    assert (found.right == found.room).all()


def test_shares_count_what_there_is_room_for() -> None:
    rows = 200
    random = np.random.default_rng(1)
    length = random.integers(0, 3, rows).astype(np.int8)
    room = random.integers(0, AHEAD + 1, rows).astype(np.int8)
    right = np.minimum(random.integers(0, 6, rows), room).astype(np.int8)
    found = lookup.LookedUp(length, room, right, np.zeros((rows, 2), np.int16))
    weights = random.integers(0, 3, rows).astype(float)
    table = shares(found, weights)
    assert np.shape(table) == (NGRAM, AHEAD)

    def counts(m: int, ahead: int) -> tuple[float, float]:
        valid = [row for row in range(rows) if length[row] == m and room[row] >= ahead]
        return sum(weights[row] * (right[row] >= ahead) for row in valid), weights[valid].sum()

    for ahead in (1, 2, 3):
        hits, of = counts(1, ahead)
        assert table[0][ahead - 1] == pytest.approx(hits / of)
        hits, of = counts(2, ahead)
        assert table[1][ahead - 1] == pytest.approx((hits + 8 * table[0][ahead - 1]) / (of + 8))
    assert table[2] == table[1]  # no longer match was seen
    assert all(row == sorted(row, reverse=True) for row in table)
    nothing = found.choose(np.empty(0, np.intp))
    assert shares(nothing, np.empty(0)) == [[0.0] * AHEAD] * NGRAM


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_predicted_steps_are_the_engines_own(tmp_path_factory, dtype) -> None:
    model, heads = calibrated_pair(tmp_path_factory.getbasetemp())
    prompts = make_prompts(12, seed=3)
    options = {"max_new_tokens": NUM_TOKENS, "eos_token_id": []}
    with Engine(model, None, threads=1, dtype=dtype) as engine:
        # Some begin with an answer, so that it can be looked up.
        first = [result.token_ids for result in engine.generate(prompts, **options)]
        prompts[::2] = [
            prompt + answer + prompt
            for prompt, answer in zip(prompts[::2], first[::2], strict=True)
        ]
        answers = [result.token_ids for result in engine.generate(prompts, **options)]
    loaded = load_model(model, heads, dtype=dtype, backend=_core.Backend(threads=1))
    ranks = ranks_of(loaded.model, [text(*both) for both in zip(prompts, answers, strict=True)])
    table = shares(ranks.looked_up, np.ones(len(ranks.ranks)))
    better = 0
    for nodes in (2, 3, 5, 16, 64):
        paths, values = best_paths(ranks, nodes - 1)
        tree = _core.TreeSpec.from_paths(paths)
        known = {tuple(path): value for path, value in zip(paths, values, strict=True)}
        drafter = _core.medusa_drafter(
            loaded.model, tree, [known[tuple(path)] for path in tree.paths()], table
        )
        session = _core.Session(loaded.model, drafter, max_batch=3)
        made, steps = exact_steps(session, prompts)
        assert made == answers
        whole = [
            walk(ranks.choose([at]), paths, lookup.Worth(values, table)) for at in range(len(made))
        ]
        assert steps == [one.steps for one in whole]
        better += walk(ranks, paths).steps - sum(steps)
    assert better > 20


def exact_steps(
    session: _core.Session, prompts: list[list[int]]
) -> tuple[list[list[int]], list[int]]:
    """Answers of NUM_TOKENS, and the steps that they took."""
    made, steps = {}, {}
    for prompt in prompts:
        made[session.submit(prompt, max_new_tokens=NUM_TOKENS)] = []
    while not session.idle:
        for event in session.step():
            made[event.request] += event.tokens
            if event.finish is not None:
                steps[event.request] = event.stats.steps
    return list(made.values()), [steps[request] for request in made]


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
        ({"lookup": True, "heads": None}, "beside Medusa heads; there are none"),
    ],
)
def test_lookup_that_cannot_be(calibrated, options, words) -> None:
    with pytest.raises(ValueError, match=words):
        Engine(calibrated.model, **({"heads": calibrated.heads, "threads": 1} | options))


def test_only_where_it_pays(calibrated) -> None:
    found = Calibration(calibrated.content["tree"], [], calibrated.content)
    assert takes_lookup(None, "auto", found, "cpu")
    assert takes_lookup(None, "16", found, "cpu")
    assert takes_lookup(True, 16, found, "cuda")
    for tree, known, device in [
        ("auto", found, "cuda"),
        ("mc_sim_7b_63", found, "cpu"),
        ("auto", None, "cpu"),
    ]:
        assert not takes_lookup(None, tree, known, device)


def before_lookup(calibrated, folder: Path) -> Path:
    """The heads, calibrated before there was lookup."""
    content = {key: value for key, value in calibrated.content.items() if key != "lookup"}
    content["predicted"] = [without(row) for row in content["predicted"]]
    content["by_category"] = {name: without(part) for name, part in content["by_category"].items()}
    content["step_times"] = [
        {key: value for key, value in row.items() if key != "lookup"}
        for row in content["step_times"]
    ]
    heads = with_file(calibrated, folder)
    (heads / FILE_NAME).write_text(json.dumps(content))
    return heads


def without(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "with_lookup"}


def test_calibrations_from_before(calibrated, tmp_path, capsys) -> None:
    heads = before_lookup(calibrated, tmp_path / "heads")
    with Engine(calibrated.model, heads, tree=4, threads=1) as engine:
        assert engine.info["drafter"] == "3 Medusa heads"
    with pytest.raises(ValueError, match="no calibration says what it is worth"):
        Engine(calibrated.model, heads, threads=1, lookup=True)
    arguments = ["calibrate", str(calibrated.model), str(heads), "--threads", "1"]
    assert run([*arguments, "--lookup", "--no-pictures"]) == 2
    assert "does not say what lookup is worth" in capsys.readouterr().err
    assert run([*arguments, "--no-pictures"]) == 0
    assert "lookup" not in capsys.readouterr().out


def test_a_check_with_lookup_is_none_without(calibrated, tmp_path, capsys) -> None:
    """What was measured with it stays, and is not shown beside what was measured without."""
    heads = with_file(calibrated, tmp_path / "heads")
    arguments = ["calibrate", str(calibrated.model), str(heads), "--threads", "1"]
    assert run([*arguments, "--no-pictures", "--no-lookup"]) == 0
    printed = capsys.readouterr().out
    assert "tokens/s without lookup" in printed
    assert "measured" not in printed
    content = json.loads((heads / FILE_NAME).read_text())
    assert content["check"] == calibrated.content["check"]
    assert [row["lookup"] for row in content["step_times"]] == [True, False]
    alone = content["predicted"][1]["tokens_per_later_step"]
    row = content["step_times"][1]
    assert row["tokens_per_s"]["4"] == pytest.approx(alone / row["seconds"]["4"], rel=1e-4)
    found = Calibration(content["tree"], [{**row, "nodes": 7}, content["step_times"][0]], content)
    stored = Stored("auto", row["dtype"], {}, row["weights"])
    assert found.nodes_for("cpu", stored, 1, with_lookup=False) == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lookup": []}, "lookup has 0 rows; wanted 1 to 8"),
        ({"lookup": [[0.5]] * 9}, "lookup has 9 rows"),
        ({"lookup": None}, "lookup is missing or of the wrong type"),
        ({"by_category": "strip"}, r"by_category\.\w+\.with_lookup is missing"),
        ({"predicted": "strip"}, r"predicted\[0\]\.with_lookup is missing"),
    ],
)
def test_half_a_calibration(calibrated, tmp_path, change, words) -> None:
    content = calibrated.content
    if change.get("by_category"):
        change = {"by_category": {n: without(p) for n, p in content["by_category"].items()}}
    if change.get("predicted"):
        change = {"predicted": [without(row) for row in content["predicted"]]}
    heads = with_file(calibrated, tmp_path / "heads", **change)
    config = open_checkpoint(calibrated.model, heads).config
    with pytest.raises(LoadError, match=words):
        read_calibration(heads / FILE_NAME, config)


def test_exported_files_carry_it(calibrated, tmp_path) -> None:
    path = tmp_path / "one.safetensors"
    export(calibrated.model, calibrated.heads, path)
    with Engine(path, tree=4, threads=1) as engine:
        assert engine.info["drafter"] == "3 Medusa heads and lookup"


def test_typical_acceptance_goes_without(calibrated) -> None:
    """It takes what is likely enough, so that other guesses make another text."""
    prompts = make_prompts(8, seed=4)
    options = {"temperature": 0.9, "acceptance": "typical", "seed": 3, "max_new_tokens": 40}
    texts = []
    for look in (False, True):
        with Engine(calibrated.model, calibrated.heads, tree=8, threads=1, lookup=look) as engine:
            texts.append([one.token_ids for one in engine.generate(prompts, **options)])
    assert texts[0] == texts[1]


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
        found = lookup.LookedUp(one, row, one, np.full((1, 2), -1, np.int16))
        kept = lookup.kept(found, paths, child, lookup.Worth([0.9, 0.8, 0.2], [[0.1] * 3]))
        assert kept.nodes[kept.kind[0]].tolist() == nodes
        assert kept.right.tolist() == [right]
