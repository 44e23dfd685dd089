"""Trees that each step grows: engines take the steps that were predicted; where they use them."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest

from calibration_util import (
    NUM_HEADS,
    NUM_TOKENS,
    calibrated_heads,
    calibrated_pair,
    make_prompts,
    ranks_of,
    text,
    with_file,
)
from guesses_util import ngrams_of
from loading_util import VOCAB
from medusa_ext import Engine, _core
from medusa_ext.calibration.file import (
    DYNAMIC,
    LOOKUP,
    STATIC,
    Calibration,
    kind_of_trees,
    read_calibration,
)
from medusa_ext.calibration.guesses import NGRAM, Weights, compiled, fit
from medusa_ext.calibration.ranks import walk, walk_dynamic
from medusa_ext.calibration.tree_search import best_paths
from medusa_ext.cli import run
from medusa_ext.loading import LoadError, Stored, export, load_model, open_checkpoint
from medusa_ext.loading.exporting import CALIBRATION_FILE as FILE_NAME
from medusa_ext.loading.ngrams import save_ngrams


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    return calibrated_heads(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("with_lookup", [False, True])
def test_predicted_steps_are_the_engines_own(tmp_path_factory, dtype, with_lookup) -> None:
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
    known = compiled(ngrams_of(first, VOCAB))
    found = fit(ranks.answers, known, with_lookup=with_lookup).model(known)
    better = 0
    for nodes in (2, 3, 5, 16, 64):
        session = _core.Session(
            loaded.model, _core.dynamic_drafter(loaded.model, found, nodes), max_batch=3
        )
        made, steps = exact_steps(session, prompts)
        assert made == answers
        whole = [walk_dynamic(ranks.choose([at]), found, nodes) for at in range(len(made))]
        assert steps == [one.steps for one in whole]
        assert walk_dynamic(ranks, found, nodes).steps == sum(steps)
        better += walk(ranks, best_paths(ranks, nodes - 1)[0]).steps - sum(steps)
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


GOOD = [(1.0, 0.0, 0.0, [0.0] * NGRAM)] * NUM_HEADS


@pytest.mark.parametrize(
    ("heads", "chain", "words"),
    [
        (GOOD[:2], [0.5] * NGRAM, "weights of 2 heads given, the model has 3"),
        (GOOD, [0.5] * 3, "wanted finite weights"),
        (GOOD, [], "wanted finite weights"),
        (GOOD, [1.5] * NGRAM, "shares in"),
        ([*GOOD[:2], (float("nan"), 0, 0, [0.0] * NGRAM)], [0.5] * NGRAM, "wanted finite"),
        ([*GOOD[:2], (1.0, 0, 0, [math.inf] * NGRAM)], [0.5] * NGRAM, "wanted finite"),
    ],
)
def test_weights_that_are_none(calibrated, heads, chain, words) -> None:
    model = load_model(calibrated.model, calibrated.heads, backend=_core.Backend(threads=1)).model
    with pytest.raises(ValueError, match=words):
        _core.dynamic_drafter(model, _core.GuessModel(heads, chain, None), 4)


def test_drafters_that_are_none(calibrated) -> None:
    good = _core.GuessModel(GOOD, [0.5] * NGRAM, None)
    beyond = ngrams_of([[VOCAB, VOCAB + 1] * 4], VOCAB + 2)
    model = load_model(calibrated.model, calibrated.heads, backend=_core.Backend(threads=1)).model
    for nodes in (0, 257):
        with pytest.raises(ValueError, match="max_nodes is"):
            _core.dynamic_drafter(model, good, nodes)
    known = _core.GuessModel(GOOD, [0.5] * NGRAM, compiled(beyond))
    with pytest.raises(ValueError, match=f"token {VOCAB + 1}, the vocabulary has {VOCAB}"):
        _core.dynamic_drafter(model, known, 4)


def with_ngrams(calibrated, folder: Path) -> Path:
    """The heads, as if calibrated with a table."""
    ngrams = ngrams_of([[5, 6, 7] * 9], VOCAB)
    given = calibrated.content["guesses"] | {"ngrams": ngrams.digest}
    heads = with_file(calibrated, folder, guesses=given)
    save_ngrams(heads / "ngrams.safetensors", ngrams)
    return heads


def test_other_ngrams_are_a_warning(calibrated, tmp_path) -> None:
    heads = with_ngrams(calibrated, tmp_path / "heads")
    (heads / "ngrams.safetensors").unlink()
    with pytest.warns(UserWarning, match="table of n-grams is missing"):
        Engine(calibrated.model, heads, threads=1, tree=4).close()
    save_ngrams(heads / "ngrams.safetensors", ngrams_of([[5, 6] * 9], VOCAB))
    with pytest.warns(UserWarning, match="is not the one that they were calibrated with"):
        Engine(calibrated.model, heads, threads=1, tree=4).close()


def test_engines_grow_trees_where_they_choose_them(calibrated, tmp_path) -> None:
    known = with_ngrams(calibrated, tmp_path / "heads")
    name = "3 Medusa heads"
    for heads, options, wanted in [
        (calibrated.heads, {"tree": 4}, f"{name}, lookup; dynamic trees"),
        (known, {"tree": 4}, f"{name}, n-grams, lookup; dynamic trees"),
        (known, {"tree": 4, "lookup": True}, f"{name}, n-grams, lookup; dynamic trees"),
        (known, {"tree": 4, "lookup": False}, f"{name}, n-grams; dynamic trees"),
        (known, {"tree": [[0], [1]]}, name),
    ]:
        with Engine(calibrated.model, heads, threads=1, **options) as engine:
            assert engine.info["drafter"] == wanted, options
            assert engine.info["nodes"] == (4 if "tree" in options and options["tree"] == 4 else 3)


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.8, "seed": 5}])
def test_fewer_steps_and_the_same_tokens(calibrated, sampled) -> None:
    prompts = make_prompts(16, seed=9)
    results = []
    paths = calibrated.content["tree"][:7]
    for options in ({"tree": paths}, {"lookup": False}, {}):
        options = {"tree": 8, "threads": 1} | options
        with Engine(calibrated.model, calibrated.heads, **options) as engine:
            results.append(engine.generate(prompts, max_new_tokens=60, eos_token_id=[], **sampled))
    static, dynamic, looked_up = results
    assert [one.token_ids for one in static] == [one.token_ids for one in dynamic]
    assert [one.token_ids for one in static] == [one.token_ids for one in looked_up]
    steps = [sum(one.stats.steps for one in result) for result in results]
    assert steps == sorted(steps, reverse=True)
    assert steps[2] < steps[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lookup": "yes"}, "lookup must be True, False or None, got 'yes'"),
        ({"lookup": True, "tree": [[0]]}, r"the tree \[\[0\]\] is the same in each step"),
        ({"lookup": True, "heads": None}, "beside Medusa heads; there are none"),
    ],
)
def test_lookup_that_cannot_be(calibrated, options, words) -> None:
    with pytest.raises(ValueError, match=words):
        Engine(calibrated.model, **({"heads": calibrated.heads, "threads": 1} | options))


def test_only_where_it_pays(calibrated) -> None:
    found = Calibration(calibrated.content["tree"], [], calibrated.content)
    for asked, tree, known, device, wanted in [
        (None, "auto", found, "cpu", LOOKUP),
        (None, "16", found, "cpu", LOOKUP),
        (False, 16, found, "cpu", DYNAMIC),
        (True, 16, found, "cuda", LOOKUP),
        (None, "auto", found, "cuda", STATIC),
        (False, "auto", found, "cuda", STATIC),
        (None, "mc_sim_7b_63", found, "cpu", STATIC),
        (None, "auto", None, "cpu", STATIC),
    ]:
        assert kind_of_trees(asked, tree, known, device) == wanted


def before_guesses(calibrated, folder: Path) -> Path:
    """The heads, calibrated before steps grew trees."""
    content = {key: value for key, value in calibrated.content.items() if key != "guesses"}
    content["predicted"] = [without(row) for row in content["predicted"]]
    content["by_category"] = {name: without(part) for name, part in content["by_category"].items()}
    content["step_times"] = [
        {key: value for key, value in row.items() if key != "guesses"}
        for row in content["step_times"]
    ]
    heads = with_file(calibrated, folder)
    (heads / FILE_NAME).write_text(json.dumps(content))
    return heads


def without(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in (DYNAMIC, LOOKUP)}


def test_what_was_measured_with_lookup_before_is_of_no_use(calibrated, tmp_path) -> None:
    """Its trees were others: neither its number of nodes nor its check holds for any of today."""
    heads = before_guesses(calibrated, tmp_path / "heads")
    content = json.loads((heads / FILE_NAME).read_text())
    rows = [
        row | {"lookup": looked, "nodes": 3}
        for row in content["step_times"]
        for looked in (False, True)
    ]
    content["step_times"] = rows
    config = open_checkpoint(calibrated.model, heads).config
    for looked in (False, True):
        content["check"]["device"] = rows[looked]
        (heads / FILE_NAME).write_text(json.dumps(content))
        found = read_calibration(heads / FILE_NAME, config)
        assert found.step_times == rows[:1]
        assert ("check" in found.content) == (not looked)


@pytest.mark.parametrize("check", [None, [], 5, {"device": None}, {"device": 3}])
def test_damaged_checks_from_before(calibrated, tmp_path, check) -> None:
    heads = before_guesses(calibrated, tmp_path / "heads")
    content = json.loads((heads / FILE_NAME).read_text()) | {"check": check}
    (heads / FILE_NAME).write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="check.*a published tree is used"):
        Engine(calibrated.model, heads, threads=1, tree=4).close()


def test_calibrations_from_before(calibrated, tmp_path, capsys) -> None:
    heads = before_guesses(calibrated, tmp_path / "heads")
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
    assert "tokens/s of dynamic trees" in printed
    assert "measured" not in printed
    content = json.loads((heads / FILE_NAME).read_text())
    assert content["check"] == calibrated.content["check"]
    assert [row["guesses"] for row in content["step_times"]] == [LOOKUP, DYNAMIC]
    alone = content["predicted"][1][DYNAMIC]["tokens_per_later_step"]
    row = content["step_times"][1]
    assert row["tokens_per_s"]["4"] == pytest.approx(alone / row["seconds"]["4"], rel=1e-4)
    found = Calibration(content["tree"], [{**row, "nodes": 7}, content["step_times"][0]], content)
    stored = Stored("auto", row["dtype"], {}, row["weights"])
    assert found.nodes_for("cpu", stored, 1, DYNAMIC) == 7


def changed(content: dict, kind: str, **parts: object) -> dict:
    return {"guesses": content["guesses"] | {kind: content["guesses"][kind] | parts}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guesses": None}, "guesses is missing or of the wrong type"),
        ({"guesses": {}}, "guesses.dynamic is missing"),
        ({"heads": [[1, 1, 1]]}, "guesses.lookup has not 3 weights and 8 of lookup"),
        ({"heads": [[1, 1]] * 3}, "guesses.lookup has not 3 weights and 8 of lookup"),
        ({"lookup": [[1.0] * 7] * 3}, "guesses.lookup has not 3 weights and 8 of lookup"),
        ({"chain": [0.5]}, "guesses.lookup has not 3 weights and 8 of lookup"),
        ({"chain": [1.5] * 8}, "wanted finite weights"),
        ({"heads": [[1e9, 1, 1]] * 3}, "wanted finite weights"),
        ({"by_category": "strip"}, r"by_category\.\w+\.dynamic is missing"),
        ({"predicted": "strip"}, r"predicted\[0\]\.dynamic is missing"),
    ],
)
def test_half_a_calibration(calibrated, tmp_path, change, words) -> None:
    content = calibrated.content
    if "by_category" in change:
        change = {"by_category": {n: without(p) for n, p in content["by_category"].items()}}
    elif "predicted" in change:
        change = {"predicted": [without(row) for row in content["predicted"]]}
    elif "guesses" not in change:
        change = changed(content, LOOKUP, **change)
    heads = with_file(calibrated, tmp_path / "heads", **change)
    config = open_checkpoint(calibrated.model, heads).config
    with pytest.raises(LoadError, match=words):
        read_calibration(heads / FILE_NAME, config)


def test_exported_files_carry_it(calibrated, tmp_path) -> None:
    known = with_ngrams(calibrated, tmp_path / "heads")
    path = tmp_path / "one.safetensors"
    export(calibrated.model, known, path)
    with Engine(path, tree=4, threads=1) as engine:
        assert engine.info["drafter"] == "3 Medusa heads, n-grams, lookup; dynamic trees"


def test_calibrate_counts_ngrams(calibrated, tmp_path, capsys) -> None:
    heads = with_file(calibrated, tmp_path / "heads")
    arguments = ["calibrate", str(calibrated.model), str(heads), "--threads", "1", "--nodes", "4"]
    arguments += ["--no-pictures", "--ngrams", str(calibrated.data)]
    assert run(arguments) == 2
    assert "give held-out text with --data too" in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens
        assert run([*arguments, "--data", str(calibrated.data)]) == 0
    assert (heads / "ngrams.safetensors").is_file()
    old, new = calibrated.content, json.loads((heads / FILE_NAME).read_text())
    steps = [one["predicted"][1][DYNAMIC]["tokens_per_step"] for one in (old, new)]
    assert steps[1] > steps[0]  # of the very text that was counted
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run([*arguments[:-2], "--data", str(calibrated.data), "--out", str(elsewhere)]) == 0
    table = (heads / "ngrams.safetensors").read_bytes()
    assert (elsewhere / "ngrams.safetensors").read_bytes() == table
    again = json.loads(json.dumps(new))
    assert run(arguments[:-2]) == 0  # what is there serves on
    assert json.loads((heads / FILE_NAME).read_text())["guesses"] == again["guesses"]


def test_a_text_does_not_depend_on_its_batch(calibrated) -> None:
    """Beside a sampled one, which looks at more candidates: the same tokens in the same steps."""
    found = Weights.of(calibrated.content["guesses"][LOOKUP]).model(None)
    loaded = load_model(calibrated.model, calibrated.heads, backend=_core.Backend(threads=1))
    kinds = [
        {"temperature": 0.9, "acceptance": "typical", "seed": 3},
        {},
        {"temperature": 1.0, "seed": 4},
    ]
    jobs = [(prompt, kinds[at % 3]) for at, prompt in enumerate(make_prompts(12, seed=4))]
    ways = []
    for size in (1, 6):
        drafter = _core.dynamic_drafter(loaded.model, found, 32)
        session = _core.Session(loaded.model, drafter, max_batch=size)
        made, ended = {}, {}
        for prompt, kind in jobs:
            sampling = _core.SamplingParams(**kind)
            made[session.submit(prompt, max_new_tokens=NUM_TOKENS, sampling=sampling)] = []
        while not session.idle:
            for event in session.step():
                made[event.request] += event.tokens
                if event.finish is not None:
                    ended[event.request] = event.stats.steps
        ways.append([(made[request], ended[request]) for request in made])
    assert ways[0] == ways[1]


def test_noise_chooses_among_48(calibrated) -> None:
    """So hot that the draw alone decides: guessed right where a head offers the token at all."""
    prompt = make_prompts(1, seed=8)[0]
    hot = {"temperature": 1e5, "seed": 11, "max_new_tokens": 300, "eos_token_id": []}
    with Engine(calibrated.model, calibrated.heads, threads=1) as engine:
        tokens = engine.generate(prompt, **hot).token_ids
        _, hidden = engine.score(prompt + tokens, return_hidden=True)
        rows = hidden[len(prompt) - 1 : -2]  # those that choose tokens, before guesses of the next
        ids = np.empty((NUM_HEADS, len(rows), 48), np.int32)
        _core.head_candidates(engine._model, rows, ids, np.empty(ids.shape, np.float32))
        weights = [(0.5, 0.0, 0.0, [])] * NUM_HEADS
        drafter = _core.dynamic_drafter(engine._model, _core.GuessModel(weights, [], None), 2)
        with Engine(calibrated.model, drafter=drafter, threads=1) as guessing:
            result = guessing.generate(prompt, **hot)
    assert result.token_ids == tokens
    steps, row = 1, 0
    while row < len(tokens) - 1:
        row += 1 + int(row < len(rows) and tokens[row + 1] in ids[0, row])
        steps += 1
    assert result.stats.steps == steps
    few = sum(tokens[row + 1] in ids[0, row, :32] for row in range(len(rows)))
    assert few < sum(tokens[row + 1] in ids[0, row] for row in range(len(rows)))


def test_no_model_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        _core.dynamic_drafter(None, _core.GuessModel([], [], None), 4)
    with pytest.raises(TypeError):
        _core.medusa_drafter(None, _core.TreeSpec.from_paths([[0]]))


def test_typical_acceptance_goes_without_lookup(calibrated) -> None:
    """It takes what is likely enough, so that other guesses make another text."""
    prompts = make_prompts(8, seed=4)
    options = {"temperature": 0.9, "acceptance": "typical", "seed": 3, "max_new_tokens": 40}
    alike = Weights.of(calibrated.content["guesses"][LOOKUP])
    texts = []
    with Engine(calibrated.model, calibrated.heads, threads=1) as engine:
        for chain in ([], [0.9] * NGRAM):
            guesses = Weights(alike.heads, alike.lookup if chain else [[]] * NUM_HEADS, chain)
            drafter = _core.dynamic_drafter(engine._model, guesses.model(None), 8)
            with Engine(calibrated.model, drafter=drafter, threads=1) as other:
                texts.append([one.token_ids for one in other.generate(prompts, **options)])
    assert texts[0] == texts[1]


def test_the_command_line(calibrated, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "medusa.json").write_text("[[0]]")
    arguments = ["generate", "hi", "-m", str(calibrated.model), "--heads", str(calibrated.heads)]
    assert run([*arguments, "--tree", "medusa.json", "--lookup"]) == 2
    assert "is the same in each step" in capsys.readouterr().err
