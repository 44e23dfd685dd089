"""The choice of tokens: noise, filters, the walk through a tree, and the law that sampled text
follows.
"""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

import reference
from medusa_ext import _core
from reference import Choice
from util import U, assert_within, normal, random_node_tokens, random_parents

# Noise.


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [  # known answers of the Random123 distribution
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], want: tuple[int, ...]
) -> None:
    assert _core.ops.philox(counter, key) == want
    assert tuple(reference.philox(counter, key)) == want


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize(("sample_index", "position"), [(0, 0), (3, 1), (2**32 - 1, 2**31 - 1)])
def test_noise_is_keyed_by_seed_sample_position_and_id(
    seed: int, sample_index: int, position: int
) -> None:
    got = _core.ops.noise(seed, sample_index, position, 49)
    assert got.tolist() == reference.noise_words(seed, sample_index, position, 49).tolist()


def test_every_key_matters() -> None:
    keys = [(1, 0, 5), (2, 0, 5), (1 << 32 | 1, 0, 5), (1, 1, 5), (1, 0, 6)]
    words = np.stack([_core.ops.noise(*key, 400) for key in keys])
    assert len(np.unique(words)) == words.size


BORDERS = [0, 1, 2, 2**24 - 1, 2**24, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1]


def test_gumbel_against_high_precision() -> None:
    rng = np.random.default_rng(1)
    words = [
        BORDERS,
        rng.integers(0, 2**32, 200_000),
        2 ** rng.integers(0, 32, 1000),
        2**32 - 2 ** rng.integers(0, 32, 1000),
    ]
    x = np.concatenate(words).astype(np.uint32)
    want = reference.gumbel(x)
    got = _core.ops.gumbel(x)
    assert np.isfinite(got).all()
    # E is good to a few units of itself, which -log E turns into as much absolute error; then the
    # rounding of G.
    assert_within(got, want, (5 + np.abs(want).astype(np.float64)) * U)


def test_gumbel_never_rises() -> None:
    """G falls from word to word, near the ends strictly."""
    for start in (0, 2**24 - 500, 2**31 - 5000, 2**32 - 10_000):
        x = np.arange(start, min(start + 10_000, 2**32), dtype=np.uint64).astype(np.uint32)
        assert (np.diff(_core.ops.gumbel(x)) <= 0).all()
    for x in (np.arange(50), np.arange(2**32 - 50, 2**32)):
        assert (np.diff(_core.ops.gumbel(x.astype(np.uint32))) < 0).all()


def test_words_are_uniform() -> None:
    """Chi-square of the top byte over ids and over positions, at the level 1e-4."""
    by_id = _core.ops.noise(7, 0, 0, 200_000) >> 24
    by_position = np.concatenate([_core.ops.noise(7, 0, p, 4) for p in range(20_000)]) >> 24
    for top in (by_id, by_position):
        assert stats.chisquare(np.bincount(top, minlength=256)).pvalue > 1e-4


# The rule against the reference.


def params(choice: Choice) -> _core.SamplingParams:
    return _core.SamplingParams(**vars(choice))


def is_close_call(logits: np.ndarray, seen: set[int], choice: Choice, position: int) -> bool:
    """Whether f32 rounding could decide: a filter's border or the two best scores within 1e-5 of
    each other.
    """
    if choice.temperature == 0:
        return (
            False  # the reference rounds the penalty as the rule says, and nothing else is rounded
        )
    score, ids = reference.scores(logits, seen, choice, position)
    y = reference.tempered(logits, seen, choice.repetition_penalty, choice.temperature)
    for factor in (1 - 1e-5, 1 + 1e-5):
        top_p = choice.top_p * factor if choice.top_p < 1 else 1.0
        if reference.kept(y, choice.top_k, min(top_p, 1.0), min(choice.min_p * factor, 1.0)) != ids:
            return choice.top_p < 1 or choice.min_p > 0
    best = np.sort(score[ids])[::-1]
    return len(best) > 1 and best[0] - best[1] < 1e-5 * (1 + abs(best[0]))


def random_choice(rng: np.random.Generator) -> Choice:
    """Any filter on its own, several, or none; greedy in a quarter of the cases."""
    on = rng.random(5) < 0.5
    return Choice(
        temperature=float(np.float32(rng.choice([0.3, 0.7, 1.0, 1.5, 10.0])))
        if rng.random() < 0.75
        else 0.0,
        top_k=int(rng.integers(1, 60)) if on[0] else 0,
        top_p=float(rng.choice([0.05, 0.3, 0.5, 0.9, 0.999])) if on[1] else 1.0,
        min_p=float(rng.choice([0.001, 0.05, 0.3, 1.0])) if on[2] else 0.0,
        repetition_penalty=float(np.float32(rng.choice([0.8, 1.1, 1.5]))) if on[3] else 1.0,
        seed=int(rng.integers(0, 2**63)),
        sample_index=int(rng.integers(0, 4)) if on[4] else 0,
    )


def test_walk_against_the_reference(
    backend: _core.Backend, case_count: Callable[[int], int]
) -> None:
    """Random logits (smooth, or of few values so that ties abound), trees, texts, filters, ends and
    limits.
    """
    met = dict.fromkeys(["deep", "end inside", "cut", "tie", "filtered", "penalised", "close"], 0)
    for seed in range(case_count(1500)):
        rng = np.random.default_rng(seed)
        vocab, num_nodes = int(rng.choice([2, 5, 33, 100])), int(rng.choice([1, 2, 10, 60]))
        parents = random_parents(rng, num_nodes, rng.choice([0.0, 0.5, 1.0]), vocab)
        logits = normal(rng, num_nodes, vocab, scale=2)
        if rng.random() < 0.3:
            logits = np.round(logits)
        choice = random_choice(rng)
        history = rng.integers(0, vocab, rng.integers(0, 12)).tolist()
        eos = rng.integers(0, vocab, rng.integers(0, 3)).tolist() if rng.random() < 0.5 else []
        max_tokens = int(rng.choice([1, 2, 3, 1000]))
        tokens = random_node_tokens(rng, parents, vocab)
        if rng.random() < 0.1:
            tokens = [0, *tokens[1:]]

        close = []

        def choose_at(node: int, path: list[int]) -> int:
            # Called in this turn of the loop only.
            seen = {*history, *(tokens[v] for v in path)}  # noqa: B023
            position = len(history) + len(path)  # noqa: B023
            close.append(is_close_call(logits[node], seen, choice, position))  # noqa: B023
            met["tie"] += np.sum(logits[node] == logits[node].max()) > 1  # noqa: B023
            return reference.choose(logits[node], seen, choice, position)  # noqa: B023

        # Half of the nodes hold what the model would say, so that walks go deep.
        if rng.random() < 0.6:
            for node in range(1, num_nodes):
                path = []
                above = parents[node]
                while above >= 0:
                    path.insert(0, above)
                    above = parents[above]
                said = choose_at(parents[node], path)
                siblings = [
                    tokens[v]
                    for v in range(1, num_nodes)
                    if parents[v] == parents[node] and v != node
                ]
                if said not in siblings:
                    tokens[node] = said
            close.clear()

        want = reference.walk(tokens, parents, choose_at, set(eos), max_tokens)
        if any(close):
            met["close"] += 1
            continue
        got = _core.ops.verify(
            backend,
            logits,
            tokens,
            parents,
            params(choice),
            history=history,
            eos_ids=eos,
            max_tokens=max_tokens,
        )
        assert (list(got[0]), list(got[1])) == want, f"case {seed}: {choice}"
        path, emitted = want
        met["deep"] += len(path) > 3
        met["end inside"] += emitted[-1] in eos and any(
            parents[c] == path[-1] and tokens[c] == emitted[-1] for c in range(num_nodes)
        )
        met["cut"] += len(path) == max_tokens and max_tokens > 1
        met["filtered"] += (
            choice.temperature > 0 and choice.top_k + choice.min_p > 0 and choice.top_p < 1
        )
        met["penalised"] += choice.repetition_penalty != 1
    assert met["close"] < case_count(75), met
    assert min(met[name] for name in met if name != "close") > case_count(20), met


def first_token(
    backend: _core.Backend, logits: list[float], choice: Choice, history: list[int] | None = None
) -> int:
    history = history or []
    row = np.float32([logits])
    _, (token,) = _core.ops.verify(backend, row, [0], [-1], params(choice), history=history)
    return token


def drawn(
    backend: _core.Backend, logits: list[float], num_seeds: int = 400, **options: float
) -> set[int]:
    """The tokens that many seeds give."""
    return {first_token(backend, logits, Choice(seed=seed, **options)) for seed in range(num_seeds)}


def test_greedy_ties_go_to_the_lowest_id(backend: _core.Backend) -> None:
    assert first_token(backend, [1, 3, 3, 3], Choice()) == 1
    assert first_token(backend, [0.0, -0.0, -1], Choice()) == 0
    assert first_token(backend, [-0.0, 0.0, -1], Choice()) == 0
    row = np.full(1000, 2.0)
    row[:700] = 1
    assert first_token(backend, row.tolist(), Choice()) == 700


def test_top_k_keeps_exactly_k_and_ties_go_to_lower_ids(backend: _core.Backend) -> None:
    assert drawn(backend, [1, 1, 1, 1, 1], temperature=1.0, top_k=2) == {0, 1}
    assert drawn(backend, [0, 1, 2, 1, 1], temperature=1.0, top_k=3) == {1, 2, 3}
    assert drawn(backend, [0, 1, 2, 1, 1], temperature=1.0, top_k=1) == {2}
    assert drawn(backend, [0, 0, 0], temperature=1.0, top_k=99) == {0, 1, 2}


def test_top_p_borders_are_exact(backend: _core.Backend) -> None:
    """Equal logits have equal integer masses: an id is kept while the mass strictly before it is
    below the share.
    """
    four = [0.0, 0.0, 0.0, 0.0]
    for top_p, kept in [
        (0.25, {0}),
        (0.2500001, {0, 1}),
        (0.5, {0, 1}),
        (0.75, {0, 1, 2}),
        (0.7500001, {0, 1, 2, 3}),
    ]:
        assert drawn(backend, four, temperature=1.0, top_p=top_p) == kept, top_p
    assert drawn(backend, [0, 5, 0, 5], temperature=1.0, top_p=1e-9) == {1}
    # The total is that of the ids that passed top-k: of two, half is the first.
    assert drawn(backend, four, temperature=1.0, top_p=0.5, top_k=2) == {0}


def test_min_p_is_relative_to_the_greatest(backend: _core.Backend) -> None:
    row = [0.0, float(np.log(0.5)) + 1e-4, float(np.log(0.5)) - 1e-4, -1.0]
    assert drawn(backend, row, temperature=1.0, min_p=0.5) == {0, 1}
    assert drawn(backend, [1, 1, 0], temperature=1.0, min_p=1.0) == {0, 1}
    # At temperature 2 the gap halves.
    assert drawn(backend, row, temperature=2.0, min_p=0.5) == {0, 1, 2, 3}


def test_impossible_tokens_are_never_drawn(backend: _core.Backend) -> None:
    inf = float("inf")
    assert drawn(backend, [-inf, 0, -inf, 0, -inf], temperature=5.0) == {1, 3}
    assert first_token(backend, [-inf, -inf, 1, -inf], Choice()) == 2


def test_nan_is_never_drawn(backend: _core.Backend) -> None:
    """Not even where a filter would keep more ids than there are numbers."""
    nan = float("nan")
    for options in (
        {},
        {"top_k": 4},
        {"top_p": 0.999},
        {"min_p": 1e-6},
        {"top_k": 4, "top_p": 0.9},
    ):
        assert drawn(backend, [nan, 0, nan, 0.1, nan], temperature=1.0, **options) == {1, 3}


def wide_row(kind: str, vocab: int) -> np.ndarray:
    rng = np.random.default_rng(vocab)
    row = normal(rng, 1, vocab, scale=0.05 if kind == "flat" else 4)
    if kind == "few values":
        return np.round(row / 3)
    return np.zeros_like(row) if kind == "equal" else row


@pytest.mark.parametrize("vocab", [4096, 20_002])
@pytest.mark.parametrize("kind", ["steep", "flat", "few values", "equal"])
def test_filters_of_wide_rows(backend: _core.Backend, kind: str, vocab: int) -> None:
    """Rows that no block reads at once, borders among thousands of equals, more kept than is ever
    sorted.
    """
    row = wide_row(kind, vocab)
    choices = [
        Choice(temperature=0.8),
        Choice(temperature=0.8, top_k=50),
        Choice(temperature=0.8, top_k=3000),
        Choice(temperature=0.8, top_k=vocab - 1, repetition_penalty=1.3),
        Choice(temperature=0.8, top_p=0.3003),
        Choice(temperature=0.8, top_p=0.9001),
        Choice(temperature=1.7, top_k=20, top_p=0.9001),
        Choice(temperature=0.8, top_k=3500, top_p=0.7003),
        Choice(temperature=1.7, min_p=0.3),
        Choice(temperature=0.8, top_k=4000, top_p=0.9903, min_p=0.02),
    ]
    history = list(range(0, vocab, 3))
    close = 0
    for i, options in enumerate(choices):
        choice = Choice(**{**vars(options), "seed": i})
        seen = {*history, 0}
        if is_close_call(row[0], seen, choice, len(history) + 1):
            close += 1
            continue
        _, (token,) = _core.ops.verify(backend, row, [0], [-1], params(choice), history=history)
        assert token == reference.choose(row[0], seen, choice, len(history) + 1), choice
    assert close <= 3


def test_the_last_of_thousands_that_are_kept(backend: _core.Backend) -> None:
    """Of equals the first k are kept: k decides whether the id that noise favours is the last."""
    found = 0
    for seed in range(8):
        row = [0.0] * 4096
        best = first_token(backend, row, Choice(temperature=1.0, seed=seed))
        if best < 3000:
            continue  # too few to need a second pass over the row
        found += 1
        kept = Choice(temperature=1.0, seed=seed, top_k=best + 1)
        assert first_token(backend, row, kept) == best
        dropped = Choice(temperature=1.0, seed=seed, top_k=best)
        assert first_token(backend, row, dropped) < best
    assert found > 1


def chosen_in_f32(row: np.ndarray, choice: Choice, position: int) -> tuple[int, bool]:
    """The token by the rule in f32, noise and roundings included, and whether a filter's border is
    too close for the f64 masses of the reference.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        y = row / np.float32(choice.temperature)
        words = _core.ops.noise(choice.seed, choice.sample_index, position, len(row))
        score = y + _core.ops.gumbel(words)
        ids, close = np.flatnonzero(~np.isnan(y)), False
        wide = y.astype(np.float64)[ids]
        kept = [
            reference.kept(wide, choice.top_k, min(choice.top_p * f, 1.0), min(choice.min_p * f, 1))
            if choice.top_p < 1 or choice.min_p > 0
            else reference.kept(wide, choice.top_k, 1.0, 0.0)
            for f in (1.0, 1 - 1e-6, 1 + 1e-6)
        ]
        close = any(sorted(other) != sorted(kept[0]) for other in kept)
    ids = np.sort(ids[kept[0]])
    return int(ids[np.argmax(score[ids])]), close


def hard_row(rng: np.random.Generator, vocab: int) -> tuple[str, np.ndarray]:
    """A row of some kind: noise that decides nothing or all, ties, holes."""
    row = normal(rng, 1, vocab, scale=float(rng.choice([0.01, 1, 3])))[0]
    kind = rng.choice(["plain", "peaked", "few values", "far off", "absorbed", "huge", "equal"])
    if kind == "peaked":
        row[rng.integers(0, vocab, 4)] += np.float32(rng.choice([9, 20, 27]))
    elif kind == "few values":
        row = np.round(row * 2) / 2
    elif kind == "far off":  # noise is rounded to steps of the score, so that it ties
        row = row + np.float32(rng.choice([-3e4, 3e6]))
    elif kind == "absorbed":  # but for the greatest noise
        row = np.round(row) * 16 + np.float32(rng.choice([-1, 1]) * 3e8)
    elif kind == "huge":
        row = row * np.float32(1e37)
    elif kind == "equal":
        row = np.full_like(row, row[0])
    for hole in (-np.inf, np.nan):
        if rng.random() < 0.2:
            row = np.where(rng.random(vocab) < rng.choice([0.1, 0.9]), np.float32(hole), row)
    if not np.isfinite(row).any():
        row[rng.integers(0, vocab)] = 0
    return str(kind), row.astype(np.float32)


def hard_choice(rng: np.random.Generator, vocab: int) -> Choice:
    on = rng.random(3) < 0.3
    return Choice(
        temperature=float(np.float32(rng.choice([1e-6, 0.05, 0.7, 1.5, 30, 1e6]))),
        top_k=int(rng.choice([1, 2, 50, 256, 257, 1 + rng.integers(0, vocab)])) if on[0] else 0,
        top_p=float(rng.choice([1e-9, 0.1, 0.5, 0.9, 0.9999])) if on[1] else 1.0,
        min_p=float(rng.choice([1e-30, 1e-4, 0.1, 1.0])) if on[2] else 0.0,
        seed=int(rng.integers(0, 2**63)),
        sample_index=int(rng.choice([0, 1, 2**32 - 1])),
    )


def test_hard_rows_to_the_last_bit(
    backend: _core.Backend, case_count: Callable[[int], int]
) -> None:
    """Nothing is left out that could win: rows of every size around a block of noise, in f32."""
    met: dict[str, int] = {"close": 0, "not the greatest": 0}
    for seed in range(case_count(800)):
        rng = np.random.default_rng(seed)
        vocab = int(rng.choice([2, 15, 16, 17, 63, 64, 65, 130, 1000, 2049, 5000]))
        kind, row = hard_row(rng, vocab)
        choice = hard_choice(rng, vocab)
        with np.errstate(over="ignore"):
            if not np.isfinite(np.nanmax(row) / np.float32(choice.temperature)):
                continue
        history = [0] * int(rng.integers(0, 3))
        want, close = chosen_in_f32(row, choice, len(history) + 1)
        if close:
            met["close"] += 1
            continue
        _, (token,) = _core.ops.verify(
            backend, row[None], [0], [-1], params(choice), history=history
        )
        assert token == want, f"case {seed}: {kind}, {vocab} ids, {choice}"
        met[kind] = met.get(kind, 0) + 1
        met["not the greatest"] += row[token] < np.nanmax(row)
    assert met.pop("close") < case_count(80), met
    assert len(met) == 8, met
    assert min(met.values()) >= case_count(40), met


# Seeds by search: at the first position one of 4,096 ids has the word 0, so the greatest noise.
@pytest.mark.parametrize("seed", [*range(60), 2180528, 2884190, 3151982])
def test_a_rare_word_wins_from_far_below(backend: _core.Backend, seed: int) -> None:
    """The id with the greatest noise wins by a hair, and loses by one."""
    noise = _core.ops.gumbel(_core.ops.noise(seed, 0, 1, 4096))
    rare = int(np.argmax(noise))
    assert (noise[rare] > 22.8) == (seed >= 60)
    top = (rare + 977) % 4096
    row = np.full((1, 4096), -60, np.float32)
    row[0, top] = 0
    choice = Choice(temperature=1.0, seed=seed)
    for step, wins in ((1e-4, True), (-1e-4, False)):
        row[0, rare] = noise[top] - noise[rare] + np.float32(step)
        _, (token,) = _core.ops.verify(backend, row, [0], [-1], params(choice))
        assert token == (rare if wins else top)


def test_logits_that_tie_once_divided(backend: _core.Backend) -> None:
    """Which of equal scores a filter keeps is decided by the scores, not by the logits."""
    row = [0.0, 1e-44, 0.0, 1e-44]
    assert drawn(backend, row, temperature=1e6, top_k=1) == {0}
    assert drawn(backend, row, temperature=1e6, top_p=1e-9) == {0}
    assert drawn(backend, row, temperature=1e6, top_k=3) == {0, 1, 2}
    assert drawn(backend, [0.0, -1e-44], temperature=1e6, min_p=1.0) == {0, 1}


def test_greedy_on_wide_rows(backend: _core.Backend, case_count: Callable[[int], int]) -> None:
    for seed in range(case_count(200)):
        rng = np.random.default_rng(seed)
        vocab = int(rng.choice([1, 2, 15, 17, 63, 65, 2047, 2048, 2049, 4097, 9000]))
        kind, row = hard_row(rng, vocab)
        _, (token,) = _core.ops.verify(backend, row[None], [0], [-1], params(Choice()))
        assert token == np.nanargmax(row), f"case {seed}: {kind}, {vocab} ids"


def test_repetition_penalty_counts_prompt_root_and_path_once(backend: _core.Backend) -> None:
    choice = Choice(repetition_penalty=2.0)
    assert first_token(backend, [0, 4, 3, 1], choice) == 1
    assert first_token(backend, [0, 4, 3, 1], choice, history=[1]) == 2
    assert first_token(backend, [0, 4, 1.9, 1], choice, history=[1, 1, 1]) == 1  # 4 / 2, once
    assert (
        first_token(backend, [-9, -1, -1.5, -9], choice, history=[1]) == 2
    )  # negative: times, not over
    assert first_token(backend, [4, 3, 1, 1], choice) == 1  # the root itself is token 0
    logits = np.float32([[0, 4, 3, 0], [0, 4, 3, 0], [0, 4, 3.5, 3.4]])
    got = _core.ops.verify(backend, logits, [3, 1, 2], [-1, 0, 1], params(choice))
    # At the last node 4 / 2, 3.5 / 2 and 3.4 / 2: root, 1 and 2 are all penalised.
    assert [list(part) for part in got] == [[0, 1, 2], [1, 2, 1]]


def test_an_end_inside_a_path_cuts_it(backend: _core.Backend) -> None:
    logits = np.zeros((4, 5), np.float32)
    logits[[0, 1, 2, 3], [1, 2, 3, 4]] = 9
    chain = ([0, 1, 2, 3], [-1, 0, 1, 2])
    for eos, max_tokens, want in [
        ([], 100, [1, 2, 3, 4]),
        ([2], 100, [1, 2]),
        ([1, 2], 100, [1]),
        ([4], 100, [1, 2, 3, 4]),
        ([0], 100, [1, 2, 3, 4]),  # the root is not emitted again
        ([], 3, [1, 2, 3]),
        ([3], 3, [1, 2, 3]),
        ([3], 2, [1, 2]),
        ([], 1, [1]),
    ]:
        got = _core.ops.verify(
            backend, logits, *chain, params(Choice()), eos_ids=eos, max_tokens=max_tokens
        )
        assert (list(got[0]), list(got[1])) == (list(range(len(want))), want)


def test_token_zero_everywhere(backend: _core.Backend) -> None:
    """There is no padding that token 0 could be taken for."""
    logits = np.zeros((300, 4), np.float32)
    logits[:, 0] = 1
    chain = [*range(-1, 255)]
    path, tokens = _core.ops.verify(backend, logits[:256], [0] * 256, chain, params(Choice()))
    assert list(path) == list(range(256))
    assert list(tokens) == [0] * 256
    path, tokens = _core.ops.verify(backend, logits, [0, 1, 2], [-1, 0, 0], params(Choice()))
    assert (list(path), list(tokens)) == ([0], [0])


def test_choice_does_not_depend_on_the_tree(backend: _core.Backend) -> None:
    """The token at a place is the same whether the node is a root, a leaf or deep, and whatever its
    siblings.
    """
    rng = np.random.default_rng(5)
    logits = normal(rng, 4, 50)
    choice = Choice(temperature=1.2, seed=11, repetition_penalty=1.1, top_p=0.95)
    history, text, alone = [3, 4, 5], [6], []
    for row in range(4):
        _, (token,) = _core.ops.verify(
            backend,
            logits[row : row + 1],
            [text[-1]],
            [-1],
            params(choice),
            history=history + text[:-1],
        )
        alone.append(token)
        text.append(token)
    wrong = [t for t in range(50) if t not in alone][:3]
    tokens = [6, wrong[0], alone[0], wrong[1], alone[1], alone[2], wrong[2]]
    parents = [-1, 0, 0, 2, 2, 4, 4]
    rows = logits[[0, 3, 1, 0, 2, 3, 0]]
    path, emitted = _core.ops.verify(
        backend, rows, tokens, parents, params(choice), history=history
    )
    assert (list(path), list(emitted)) == ([0, 2, 4, 5], alone)


def test_verify_refuses_bad_arguments(backend: _core.Backend) -> None:
    row = np.zeros((1, 4), np.float32)
    for tokens, parents, options in [
        ([0, 1], [-1, 0], {}),  # two nodes, one row
        ([0], [-1], {"max_tokens": 0}),
        ([], [], {}),
        ([0, 1], [-1], {}),
    ]:
        with pytest.raises(ValueError, match=r"^verify"):
            _core.ops.verify(backend, row, tokens, parents, params(Choice()), **options)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("temperature", [-0.1, float("nan"), float("inf")]),
        ("top_k", [-1]),
        ("top_p", [0.0, -0.5, 1.5, float("nan")]),
        ("min_p", [-0.1, 1.1, float("nan")]),
        ("repetition_penalty", [0.0, -1.0, float("nan")]),
        ("epsilon", [-0.1, 1.1, float("nan")]),
        ("delta", [-0.1, float("nan")]),
    ],
)
def test_sampling_params_refuse_bad_values(field: str, bad: list[float]) -> None:
    for value in bad:
        with pytest.raises(ValueError, match=field):
            _core.SamplingParams(**{field: value})


def test_sampling_params_refuse_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match="lucky"):
        _core.SamplingParams(acceptance="lucky")


# The law.

VOCAB = 6
LAWS = [
    Choice(temperature=1.0),
    Choice(temperature=0.6),
    Choice(temperature=1.0, top_k=4),
    Choice(temperature=1.5, top_p=0.8),
    Choice(temperature=1.0, min_p=0.15),
    Choice(temperature=1.3, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2),
]


def exact_law(logits: np.ndarray, seen: set[int], choice: Choice) -> np.ndarray:
    y = reference.tempered(logits, seen, choice.repetition_penalty, choice.temperature)
    ids = reference.kept(y, choice.top_k, choice.top_p, choice.min_p)
    p = np.zeros(len(logits))
    p[ids] = np.exp(y[ids] - y[ids].max())
    return p / p.sum()


def chi_square(counts: np.ndarray, law: np.ndarray) -> float:
    """The level at which the counts would be refused; outcomes expected fewer than 5 times are
    pooled.
    """
    counts, law = counts.reshape(-1), law.reshape(-1)
    assert (counts[law == 0] == 0).all(), "a token that the filters drop was emitted"
    order = np.argsort(law)
    counts, expected = counts[order], law[order] * counts.sum()
    pooled = max(int(np.searchsorted(np.cumsum(expected), 5)) + 1, int(np.sum(expected < 5)))
    cells = [np.append(x[pooled:], x[:pooled].sum()) for x in (counts, expected)]
    assert len(cells[0]) > 1
    return float(stats.chisquare(*cells).pvalue)


@pytest.mark.parametrize("choice", LAWS, ids=range(len(LAWS)))
@pytest.mark.parametrize("vary", ["seed", "sample_index", "position"])
def test_law_of_two_tokens(
    backend: _core.Backend, choice: Choice, vary: str, case_count: Callable[[int], int]
) -> None:
    """First and second token jointly, drawn through trees that hold some continuations and not
    others.

    Fixed seeds, so the test is deterministic; each of its statistics is asked to pass at the level
    1e-4.
    """
    rng = np.random.default_rng(3)
    first, second = normal(rng, VOCAB), normal(rng, VOCAB, VOCAB)
    counts, accepted = np.zeros((VOCAB, VOCAB)), 0
    root = 2
    for draw in range(case_count(6000)):
        # Positions end where texts do: past 4,000 draws another seed, so that no draw comes twice.
        options = {**vars(choice), "seed": 5 + (draw // 4000 if vary == "position" else 0)}
        options[vary] = draw
        history = [root] * (options.pop("position", 0) % 4000)
        sampling = _core.SamplingParams(**options)
        children = rng.permutation(VOCAB)[: rng.integers(0, 4)].tolist()
        logits = np.concatenate([first[None], second[children]])
        tree = ([root, *children], [-1] + [0] * len(children))
        _, emitted = _core.ops.verify(backend, logits, *tree, sampling, history=history)
        emitted = list(emitted)
        accepted += len(emitted) == 2
        if len(emitted) == 1:
            _, more = _core.ops.verify(
                backend, second[emitted], [emitted[0]], [-1], sampling, history=[*history, root]
            )
            emitted += more
        counts[emitted[0], emitted[1]] += 1
    first_law = exact_law(first, {root}, choice)
    law = np.stack([first_law[a] * exact_law(second[a], {root, a}, choice) for a in range(VOCAB)])
    assert accepted > case_count(500)
    assert chi_square(counts.sum(axis=1), first_law) > 1e-4
    assert chi_square(counts, law) > 1e-4


def test_law_over_many_ids(backend: _core.Backend, case_count: Callable[[int], int]) -> None:
    """A vocabulary wide enough that most ids are skipped by the bound on the noise."""
    rng = np.random.default_rng(4)
    logits = normal(rng, 1, 1003, scale=3)
    counts = np.zeros(1003)
    for seed in range(case_count(20_000)):
        _, (token,) = _core.ops.verify(
            backend, logits, [0], [-1], _core.SamplingParams(temperature=1.0, seed=seed)
        )
        counts[token] += 1
    law = exact_law(logits[0], set(), Choice(temperature=1.0))
    assert np.sum(counts > 5) > 50
    assert chi_square(counts, law) > 1e-4
