"""Typical acceptance: the published cases, and random ones against the reference."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import reference
from medusa_ext import _core
from util import normal, path_to, random_node_tokens, random_parents


def typical(temperature: float, epsilon: float, delta: float) -> _core.SamplingParams:
    return _core.SamplingParams(
        temperature=temperature, acceptance="typical", epsilon=epsilon, delta=delta
    )


def test_published_cases(backend: _core.Backend, shared_dir: Path) -> None:
    cases = json.loads((shared_dir / "cases" / "typical_acceptance.json").read_text())
    arrays = np.load(shared_dir / "cases" / "typical_acceptance.npz", allow_pickle=False)
    assert len(cases) == 200
    depth = 0
    for case, start, end in zip(cases, arrays["offsets"], arrays["offsets"][1:], strict=False):
        logits, tokens = arrays["logits"][start:end], case["node_tokens"]
        node_of = {tuple(path): i + 1 for i, path in enumerate(case["choices"])} | {(): 0}
        parents = [-1] + [node_of[tuple(path[:-1])] for path in case["choices"]]
        params = typical(case["temperature"], case["epsilon"], case["delta"])
        path, emitted = _core.ops.verify(backend, logits, tokens, parents, params)
        assert list(path) == case["accepted_nodes"]
        assert [tokens[node] for node in path] == case["accepted_tokens"]
        assert list(emitted) == [*case["accepted_tokens"][1:], int(np.argmax(logits[path[-1]]))]
        depth += len(path) > 3
    assert depth > 20


def test_random_cases(backend: _core.Backend, case_count: Callable[[int], int]) -> None:
    deep = shallow = 0
    for seed in range(case_count(600)):
        rng = np.random.default_rng(seed)
        vocab, num_nodes = int(rng.choice([30, 100])), int(rng.choice([1, 5, 20, 60]))
        parents = random_parents(rng, num_nodes, rng.choice([0.1, 0.5]))
        tokens = random_node_tokens(rng, parents, max(vocab, num_nodes))
        vocab = max(vocab, num_nodes)
        logits = normal(rng, num_nodes, vocab, scale=rng.choice([0.3, 1, 3]))
        for node in range(1, num_nodes):
            logits[parents[node], tokens[node]] += rng.choice([0, 3, 5])
        temperature = float(np.float32(rng.choice([0, 0.5, 0.7, 1, 2])))
        epsilon, delta = float(rng.choice([0.01, 0.09, 0.3])), float(rng.choice([0.1, 0.3, 0.6]))
        want = reference.typical(logits, tokens, parents, temperature, epsilon, delta)
        path, emitted = _core.ops.verify(
            backend, logits, tokens, parents, typical(temperature, epsilon, delta)
        )
        assert list(path) == want, seed
        assert list(emitted) == [tokens[v] for v in want[1:]] + [int(np.argmax(logits[want[-1]]))]
        deep += len(want) > 3
        shallow += len(want) == 1
    assert min(deep, shallow) > case_count(30)


def test_wide_rows(backend: _core.Backend) -> None:
    """Rows that no block reads at once, their last ids too."""
    rng = np.random.default_rng(9)
    vocab = 9001
    parents, tokens = [-1, 0, 0, 1, 3], [5, 4000, vocab - 1, vocab - 2, 4097]
    logits = normal(rng, 5, vocab)
    logits[[0, 0, 1, 3], tokens[1:]] += np.float32([11, 11.5, 12, 12])
    want = reference.typical(logits, tokens, parents, 0.9, 0.09, 0.3)
    path, emitted = _core.ops.verify(backend, logits, tokens, parents, typical(0.9, 0.09, 0.3))
    assert list(path) == want == [0, 1, 3, 4]
    assert list(emitted) == [*tokens[1:2], *tokens[3:], int(np.argmax(logits[4]))]

    # No token stands out, so that the entropy of the whole row is the judge.
    flat = normal(rng, 2, vocab)
    for logit, want in [(-3, [0]), (1, [0, 1])]:
        flat[0, 8999] = logit
        assert reference.typical(flat, [5, 8999], [-1, 0], 0.9, 0.09, 0.3) == want
        path, _ = _core.ops.verify(backend, flat, [5, 8999], [-1, 0], typical(0.9, 0.09, 0.3))
        assert list(path) == want


def test_ends_and_limits_cut_the_path(backend: _core.Backend) -> None:
    logits = np.zeros((4, 5), np.float32)
    logits[[0, 1, 2, 3], [1, 2, 3, 4]] = 9
    params = typical(1.0, 0.09, 0.3)
    for eos, max_tokens, want in [
        ([], 9, [1, 2, 3, 4]),
        ([2], 9, [1, 2]),
        ([], 2, [1, 2]),
        ([4], 9, [1, 2, 3, 4]),
    ]:
        path, emitted = _core.ops.verify(
            backend, logits, [0, 1, 2, 3], [-1, 0, 1, 2], params, eos_ids=eos, max_tokens=max_tokens
        )
        assert list(path) == [0, 1, 2, 3][: len(want)]
        assert list(emitted) == want


def test_the_threshold_is_strict(backend: _core.Backend) -> None:
    """Two ids at one half each: probability 0.5 is not above an epsilon of 0.5."""
    logits = np.full((2, 4), -1e9, np.float32)
    logits[:, :2] = 0
    for epsilon, want in [(0.5, [0]), (0.4999, [0, 1])]:
        path, _ = _core.ops.verify(backend, logits, [3, 1], [-1, 0], typical(1.0, epsilon, 10.0))
        assert list(path) == want


def test_the_likeliest_of_the_deepest_wins(backend: _core.Backend) -> None:
    """Not the first, and not by its last token alone: the sum over the path decides."""
    logits = np.full((5, 6), -20, np.float32)
    logits[0, [1, 2]] = np.log([0.35, 0.65])  # root: 1 or 2
    logits[1, [3]] = np.log(0.55)
    logits[1, [4]] = np.log(0.45)
    logits[2, [3, 4]] = np.log([0.6, 0.4])
    parents = [-1, 0, 0, 1, 2]
    path, _ = _core.ops.verify(backend, logits, [0, 1, 2, 3, 3], parents, typical(1.0, 0.09, 1.0))
    assert list(path) == path_to(parents, 4)


def test_no_randomness(backend: _core.Backend) -> None:
    """The published rule draws no number: the seed changes nothing."""
    logits = normal(np.random.default_rng(1), 3, 20)
    results = {
        repr(
            _core.ops.verify(
                backend, logits, [0, 1, 2], [-1, 0, 1],
                _core.SamplingParams(temperature=1.0, acceptance="typical", seed=seed),
            )
        )
        for seed in range(20)
    }  # fmt: skip
    assert len(results) == 1


def test_negative_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="epsilon"):
        typical(1.0, -0.1, 0.3)
