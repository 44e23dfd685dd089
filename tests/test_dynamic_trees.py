"""Trees that each step grows: what they hold, how sources are weighed, where engines use them."""

import heapq
import json
import math
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from loading_util import VOCAB
from medusa_ext import Engine, _core
from medusa_ext.calibration import guesses
from medusa_ext.calibration.file import (
    DYNAMIC,
    LOOKUP,
    STATIC,
    Calibration,
    kind_of_trees,
    read_calibration,
)
from medusa_ext.calibration.guesses import AHEAD, NGRAM, Offered, Weights, compiled, fit
from medusa_ext.calibration.ranks import walk, walk_dynamic
from medusa_ext.calibration.tree_search import best_paths
from medusa_ext.cli import run
from medusa_ext.distill.records import Record
from medusa_ext.loading import LoadError, Stored, export, load_model, open_checkpoint
from medusa_ext.loading.exporting import CALIBRATION_FILE as FILE_NAME
from medusa_ext.loading.ngrams import STEP, Ngrams, count_ngrams, save_ngrams

TOKENS = 12  # of the tables made here


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    return calibrated_heads(tmp_path_factory.getbasetemp())


def ngrams_of(texts: list[list[int]], vocab_size: int, most: int = 10_000) -> Ngrams:
    records = [Record(np.array(ids, np.int32), np.ones(len(ids), np.bool_)) for ids in texts]
    return count_ngrams(records, vocab_size, most)


def random_ngrams(random: np.random.Generator) -> Ngrams:
    """Of texts that repeat themselves."""
    texts = [random.integers(0, TOKENS, 6).tolist() * 5 for _ in range(8)]
    return ngrams_of(texts, TOKENS)


def test_what_follows_two_tokens() -> None:
    """The compiled table against the plain one; every pair, known or not."""
    ngrams = random_ngrams(np.random.default_rng(1))
    found = compiled(ngrams)
    assert compiled(None) is None
    assert found.num_bytes > 0
    for before in range(-1, TOKENS):
        for last in range(TOKENS):
            gains = [found.gain(before, last, token) for token in range(TOKENS)]
            assert gains == [STEP * ngrams.gain(before, last, token) for token in range(TOKENS)]
            assert found.frequent(before, last) == frequent(ngrams, before, last)


def frequent(ngrams: Ngrams, before: int, last: int) -> list[int]:
    """Successors of the pair and then of the last token, at most 8, the most frequent first."""
    ends = np.cumsum(ngrams.counts)
    pair_ends = np.cumsum(ngrams.pair_counts)
    rows = {
        int(context): range(end - count, end)
        for context, count, end in zip(ngrams.contexts, ngrams.counts, ends, strict=True)
    }
    tokens: list[int] = []
    for entry in rows.get(before, ()):
        if ngrams.tokens[entry] == last:
            end = pair_ends[entry]
            pair = ngrams.pair_tokens[end - ngrams.pair_counts[entry] : end].tolist()
            tokens += pair[:8]
    tokens += ngrams.tokens[list(rows.get(last, ()))[:8]].tolist()
    return list(dict.fromkeys(tokens))[:8]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("counts", [1], "do not fit each other"),
        ("gains", [1], "do not fit each other"),
        ("contexts", "reversed", "contexts do not rise"),
        ("tokens", "negative", "a token is -1"),
    ],
)
def test_tables_that_are_none(name: str, value: object, words: str) -> None:
    ngrams = random_ngrams(np.random.default_rng(1))
    arrays = {f.name: getattr(ngrams, f.name) for f in fields(ngrams) if f.name != "vocab_size"}
    old = arrays[name]
    changed = {"reversed": old[::-1].copy(), "negative": np.minimum(old, -1)}
    arrays[name] = changed[value] if isinstance(value, str) else np.array(value, old.dtype)
    with pytest.raises(ValueError, match=words):
        _core.Ngrams(**arrays)


def matched(tokens: list[int]) -> tuple[int, int]:
    """The longest run before the text's end that equals it, of equals the latest: length, next."""
    best = (0, 0)
    for end in range(len(tokens) - 1):
        length = 0
        while length < min(NGRAM, end + 1) and tokens[end - length] == tokens[-1 - length]:
            length += 1
        if length and length >= best[0]:
            best = (length, end + 1)
    return best


def reference(
    weights: Weights, ngrams: Ngrams | None, tokens: list[int], ids, logits, max_nodes, max_depth
) -> list[tuple[float, tuple[int, ...]]]:
    """Values and paths of the best nodes, in f64, by the definition in medusa/guesses.h."""
    length, at = matched(tokens) if weights.chain else (0, 0)
    told = [tokens[at + i % (len(tokens) - at)] for i in range(AHEAD)] if length else []
    lengths = [min(length + i, NGRAM) - 1 for i in range(AHEAD)]

    def below(path: tuple[int, ...]) -> dict[int, float]:
        depth = len(path)
        on_told = bool(told) and depth < AHEAD and list(path) == told[:depth]
        if depth >= len(ids):
            return {told[depth]: weights.chain[lengths[depth]]} if on_told else {}
        head, ngram, rest = weights.heads[depth]
        logit = {int(i): float(x) for i, x in zip(ids[depth], logits[depth], strict=True)}
        norm = math.log(sum(math.exp(x) for x in logit.values()))
        before, last = (-1, *tokens, *path)[-2:]
        others = [] if ngrams is None else frequent(ngrams, before, last)
        for token in [*others, *([told[depth]] if on_told else [])]:
            logit.setdefault(token, float(logits[depth][-1]) - 1.0)
        score = {}
        for token, x in logit.items():
            gain = 0.0 if ngrams is None else STEP * ngrams.gain(before, last, token)
            score[token] = head * (x - norm) + ngram * gain
        if on_told:
            score[told[depth]] += weights.lookup[depth][lengths[depth]]
        total = math.exp(rest) + sum(math.exp(x) for x in score.values())
        return {token: math.exp(x) / total for token, x in score.items()}

    if told and max_nodes - 1 <= min(max_depth, AHEAD):
        alone = math.prod(weights.chain[m] for m in lengths[: max_nodes - 1])
        if alone > 1 - weights.chain[lengths[0]]:
            return [(1.0, tuple(told[: i + 1])) for i in range(max_nodes - 1)]
    waiting: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    found = []
    while waiting and len(found) < max_nodes:
        negative, path = heapq.heappop(waiting)
        found.append((-negative, path))
        if len(path) < max_depth:
            for token, share in below(path).items():
                heapq.heappush(waiting, (negative * share, (*path, token)))
    return found[1:]


def paths_of(nodes: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for parent, token in nodes:
        paths.append((*paths[parent], token))
    return paths[1:]


def random_weights(random: np.random.Generator, heads: int, *, with_lookup: bool) -> Weights:
    return Weights(
        random.uniform([0.3, 0.0, -2.0], [1.0, 0.6, 1.0], (heads, 3)).tolist(),
        random.uniform(0, 4, (heads, NGRAM if with_lookup else 0)).tolist(),
        np.sort(random.uniform(0.1, 0.9, NGRAM)).tolist() if with_lookup else [],
    )


@settings(deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.booleans())
def test_the_most_valuable_nodes(seed: int, with_ngrams: bool, with_lookup: bool) -> None:
    random = np.random.default_rng(seed)
    heads, width = int(random.integers(1, 4)), int(random.integers(1, TOKENS + 1))
    ngrams = random_ngrams(random) if with_ngrams else None
    weights = random_weights(random, heads, with_lookup=with_lookup)
    tokens = random.integers(0, 4, int(random.integers(1, 12))).tolist()
    ids = np.stack([random.permutation(TOKENS)[:width] for _ in range(heads)]).astype(np.int32)
    logits = -np.sort(-random.normal(0, 2, (heads, width))).astype(np.float32)
    max_nodes, max_depth = int(random.integers(1, 20)), int(random.integers(0, 7))
    nodes = _core.grow_tree(
        weights.model(compiled(ngrams)), tokens, ids, logits, max_nodes, max_depth
    )
    wanted = reference(weights, ngrams, tokens, ids, logits, max_nodes, max_depth)
    paths = paths_of(nodes)
    assert len(paths) == len(wanted)
    value = {path: value for value, path in wanted}
    least = min(value.values(), default=0.0)
    # In f32 with exponentials to 2^-21: nodes whose values differ by less may change places.
    more = reference(weights, ngrams, tokens, ids, logits, max_nodes + 20, max_depth)
    everything = {path: value for value, path in more} | value
    for path in paths:
        assert everything[path] >= least * (1 - 1e-4)
    assert len(set(paths)) == len(paths)


def test_a_token_that_is_offered_twice_is_one_node() -> None:
    """And below it nothing is looked at twice, which would double with each depth."""
    weights = random_weights(np.random.default_rng(1), 6, with_lookup=False)
    ids, logits = np.zeros((6, 32), np.int32), np.zeros((6, 32), np.float32)
    nodes = _core.grow_tree(weights.model(None), [1, 2], ids, logits, 64, 6)
    assert paths_of(nodes) == [(0,) * depth for depth in range(1, 7)]


def offered(random: np.random.Generator, rows: int, heads: int) -> Offered:
    """A text of 3 tokens and an answer, and what nobody learned to guess."""
    tokens = random.integers(0, TOKENS, rows + 4).tolist()
    ids = np.argsort(random.random((heads, rows, TOKENS)))[..., :6].astype(np.int32)
    logits = -np.sort(-random.normal(0, 2, ids.shape)).astype(np.float32)
    return Offered(tokens, 3, rows + 4, ids, logits)


def test_judged_by_hand() -> None:
    """5 6 7 8 | 5 6 7 9 5 6: what was offered where the answer's own tokens stand before."""
    tokens, start = [5, 6, 7, 8, 5, 6, 7, 9, 5, 6], 4
    ids = np.tile(np.array([[[1, 6, 7]], [[7, 1, 2]]], np.int32), (1, 5, 1))
    logits = np.tile(np.array([2.0, 1.0, 0.0], np.float32), (2, 5, 1))
    one = Offered(tokens, start, len(tokens), ids, logits)
    judged = one.judge(None, with_lookup=True)
    assert judged["found"].tolist() == [1, 2, 3, 0, 1]
    assert judged["kept"].tolist() == [2, 1, 0, 0, 1]
    # Head 0 offers 1 6 7, and the text 6 7 8 - 6; head 1 offers 7 1 2, and the text 7 8 - - -.
    assert judged["right"].tolist() == [[1, 0], [2, -1], [-1, -1], [-1, -1], [1, -2]]
    assert judged["told"].tolist() == [[1, 0], [2, 3], [3, -1], [-1, -1], [1, -1]]
    assert judged["matched"].tolist() == [[1, 2], [2, 3], [3, 0], [0, 0], [1, 0]]
    shares = np.exp(judged["log_share"])
    np.testing.assert_allclose(shares[0, 0, :3], softmax([2.0, 1.0, 0.0]), rtol=1e-5)
    assert (shares[0, 0, 3:] == 0).all()
    alone = one.judge(None, with_lookup=False)
    assert (alone["told"] == -1).all()
    assert (alone["found"] == 0).all()


def softmax(scores: list[float]) -> np.ndarray:
    exp = np.exp(np.asarray(scores))
    return exp / exp.sum()


def loss(weights: np.ndarray, columns: dict[str, np.ndarray]) -> float:
    """What a fit makes least, row by row."""
    total = 0.0
    for row in range(len(columns["right"])):
        known = np.isfinite(columns["log_share"][row])
        score = np.full(len(known), -np.inf)
        score[known] = (
            weights[0] * columns["log_share"][row, known] + weights[1] * columns["gain"][row, known]
        )
        told, right = columns["told"][row], columns["right"][row]
        if told >= 0:
            score[told] += weights[2 + columns["matched"][row]]
        score = np.append(score, weights[2])
        total += np.log(np.exp(score).sum()) - score[right]
    rises = np.diff(weights[3:])
    return total + 1e-2 * (weights**2).sum() / 2 + 2.0 * (rises**2).sum() / 2


@pytest.mark.parametrize("with_lookup", [False, True])
def test_the_fit_is_the_least(with_lookup: bool) -> None:
    """No step along any weight lowers the loss; and it is lower than that of other weights."""
    random = np.random.default_rng(3)
    ngrams = compiled(random_ngrams(random))
    answers = [offered(random, 40, 2) for _ in range(4)]
    found = fit(answers, ngrams, with_lookup=with_lookup)
    assert [len(row) for row in found.lookup] == [NGRAM if with_lookup else 0] * 2
    judged = [one.judge(ngrams, with_lookup=with_lookup) for one in answers]
    for head in range(2):
        names = ("log_share", "gain", "right", "told", "matched")
        columns = {n: np.concatenate([one[n][:, head] for one in judged]) for n in names}
        rows = columns["right"] > -2
        columns = {name: column[rows] for name, column in columns.items()}
        best = np.array([*found.heads[head], *(found.lookup[head] or [0.0] * NGRAM)])
        least = loss(best, columns)
        for index in range(len(best) if with_lookup else 3):
            for step in (-0.02, 0.02):
                tried = best.copy()
                tried[index] += step
                assert loss(tried, columns) > least - 1e-6
        assert least < loss(np.array([1.0, *[0.0] * (NGRAM + 2)]), columns)


def test_the_fit_does_not_depend_on_the_scale() -> None:
    """Heads whose logits are large are weighed less, by as much."""
    random = np.random.default_rng(5)
    answers = [offered(random, 40, 1) for _ in range(4)]
    judged = [one.judge(None, with_lookup=False) for one in answers]
    names = ("log_share", "gain", "right", "told", "matched")
    columns = {n: np.concatenate([one[n][:, 0] for one in judged]) for n in names}
    least = guesses._regress(**columns)
    for scale in (0.01, 100, 1000):
        scaled = columns | {"log_share": (scale * columns["log_share"]).astype(np.float32)}
        found = guesses._regress(**scaled)
        if scale > 1:  # where the ridge is too weak to matter
            assert found[0] * scale == pytest.approx(least[0], rel=0.02, abs=1e-3)
        assert abs(found).max() < 10


def test_logits_that_are_no_numbers_offer_nothing() -> None:
    random = np.random.default_rng(6)
    one = offered(random, 60, 1)
    one.logits[..., 3:] = -np.inf
    found = fit([one], None, with_lookup=False)
    assert np.isfinite(found.heads).all()
    judged = one.judge(None, with_lookup=False)
    assert (judged["right"] >= 3).any()  # as a place, which counts as none
    one.logits[:] = np.nan
    assert np.isfinite(fit([one], None, with_lookup=False).heads).all()


def test_a_fit_takes_some_rows_of_each_text(monkeypatch) -> None:
    """Of two kinds that take turns, both count."""
    random = np.random.default_rng(7)
    answers = []
    for at in range(40):
        one = offered(random, 20, 1)
        if at % 2:  # the best candidate is right
            one.ids[0, :, 0] = one.tokens[one.start + 1 :]
        answers.append(one)
    whole = fit(answers, None, with_lookup=True)
    monkeypatch.setattr(guesses, "_MAX_ROWS", 400)
    part = fit(answers, None, with_lookup=True)
    assert part.chain == whole.chain
    assert part.heads != whole.heads
    np.testing.assert_allclose(part.heads[0], whole.heads[0], atol=0.5)


def test_how_often_the_text_goes_on() -> None:
    """By hand: 1 2 1 2 ... is right wherever something was found; 3 4 5 never comes again."""
    loop = [9, *[1, 2] * 12]
    ids, logits = np.full((1, 21, 1), 8, np.int32), np.zeros((1, 21, 1), np.float32)
    weights = fit([Offered(loop, 3, len(loop), ids, logits)], None, with_lookup=True)
    assert weights.chain[0] == 1.0
    assert weights.chain[NGRAM - 1] == 1.0
    tokens = [7, 1, 7, 2, 7, 3, 7, 4]  # after 7 something else each time
    ids, logits = ids[:, :6], logits[:, :6]
    weights = fit([Offered(tokens, 1, 8, ids, logits)], None, with_lookup=True)
    assert weights.chain == [0.0] * NGRAM


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
    with pytest.warns(UserWarning, match="calibrated with other n-grams than none beside them"):
        Engine(calibrated.model, heads, threads=1, tree=4).close()
    save_ngrams(heads / "ngrams.safetensors", ngrams_of([[5, 6] * 9], VOCAB))
    with pytest.warns(UserWarning, match="with other n-grams than those beside them"):
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
        ({"lookup": True, "tree": [[0]]}, r"the tree \[\[0\]\] is your own"),
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
    assert "is your own" in capsys.readouterr().err
