"""Trees that each step grows: what they hold, and how sources are weighed."""

import heapq
import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guesses_util import ngrams_of
from medusa_ext import _core
from medusa_ext.calibration import guesses
from medusa_ext.calibration.guesses import AHEAD, NGRAM, Offered, Weights, compiled, fit
from medusa_ext.loading.ngrams import STEP, Ngrams

TOKENS = 12  # of the tables made here


def random_ngrams(random: np.random.Generator) -> Ngrams:
    """Of texts that repeat themselves."""
    texts = [random.integers(0, TOKENS, 6).tolist() * 5 for _ in range(8)]
    return ngrams_of(texts, TOKENS)


def test_what_follows_two_tokens() -> None:
    """The compiled table against the plain one; every pair, known or not."""
    ngrams = random_ngrams(np.random.default_rng(1))
    found = compiled(ngrams)
    assert compiled(None) is None
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


def test_a_logit_that_is_no_number_hides_nothing() -> None:
    """The text's token is offered all the same."""
    weights = Weights([[1.0, 0.0, 0.0]], [[9.0] * NGRAM], [0.5] * NGRAM)
    text = [1, 2, 3, 1]
    for logits in ([2.0, 1.0, 0.0], [2.0, 1.0, -np.inf], [2.0, 1.0, np.nan]):
        ids = np.array([[5, 6, 7]], np.int32)
        scores = np.array([logits], np.float32)
        nodes = _core.grow_tree(weights.model(None), text, ids, scores, 3, 1)
        assert nodes[0] == (0, 2)


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
    assert (judged["right"] < 3).all()
    assert np.isfinite(judged["log_share"]).sum() == 3 * len(judged["right"])
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
