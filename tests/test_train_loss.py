"""The chunked loss against whole logits in f64, its memory, and what it makes of heads' guesses."""

from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medusa_ext.training import loss as module
from medusa_ext.training.accuracy import head_accuracies, tokens_per_step
from medusa_ext.training.loss import Target, cross_entropy, judge, likely_tokens

N, D, V, R, M = 23, 12, 70, 3, 5


def whole(x: Any, weight: Any, target: Target, scale: Any, low: Any = None) -> torch.Tensor:
    """The same sum from all logits at once."""
    logits = x @ weight.t() + (0 if low is None else low[0] @ low[1].t())
    log_p = logits.log_softmax(-1)
    if target.teacher is not None:
        log_q = (target.teacher[0].double() @ target.teacher[1].double().t()).log_softmax(-1)
        return ((log_q.exp() * (log_q - log_p)).sum(-1) * scale).sum()
    q = torch.nn.functional.one_hot(target.labels, len(weight)).double() * (1 - target.share)
    if target.ids is not None:
        q = q.scatter_add(1, target.ids, target.share * target.weights.double())
    return (-(q * log_p).sum(-1) * scale).sum()


def case(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": draw(N, D),
        "weight": draw(V, D),
        "x2": draw(N, R),
        "weight2": draw(V, R),
        "scale": draw(N).abs(),
        "labels": torch.randint(V, (N,), generator=generator),
        "ids": torch.stack([torch.randperm(V, generator=generator)[:M] for _ in range(N)]),
        "weights": draw(N, M).softmax(-1),
        "hidden": draw(N, D),
    }


TARGETS = {
    "labels": lambda c: Target(c["labels"]),
    "soft": lambda c: Target(c["labels"], c["ids"], c["weights"], 0.3),
    "all soft": lambda c: Target(c["labels"], c["ids"], c["weights"], 1.0),
    "teacher": lambda c: Target(teacher=(c["hidden"], c["weight"])),
}


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
def test_loss_and_gradients(kind: str, low_rank: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five chunks, the last one short; every input gets its gradient."""
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 5 * V)
    given, target = case(), TARGETS[kind](case())
    names = ["x", "weight", *(["x2", "weight2"] if low_rank else [])]
    values = {}
    for dtype in (torch.float32, torch.float64):
        inputs = [given[name].detach().to(dtype, copy=True).requires_grad_() for name in names]
        low = (inputs[2], inputs[3]) if low_rank else None
        scale = given["scale"].to(dtype)
        if dtype == torch.float32:
            total = cross_entropy(inputs[0], inputs[1], target, scale, low)[0]
        else:
            total = whole(inputs[0], inputs[1], target, scale, low)
        (2 * total).backward()
        values[dtype] = [total, *(value.grad for value in inputs)]
    for found, expected in zip(values[torch.float32], values[torch.float64], strict=True):
        # Sums of at most V + N products of size about 5: 100 * 5 * 2**-24 and some.
        torch.testing.assert_close(found.double(), expected.double(), atol=2e-4, rtol=2e-5)


def test_bf16_products_are_near() -> None:
    given = case()
    x = given["x"].clone().requires_grad_()
    target = Target(given["labels"])
    total, terms = cross_entropy(x, given["weight"].bfloat16(), target, given["scale"])
    total.backward()
    exact = given["x"].double().requires_grad_()
    reference = whole(exact, given["weight"].double(), target, given["scale"].double())
    reference.backward()
    # bf16 has 8 bits: logits up to 10 are off by 0.04, gradients by a few percent of the largest.
    assert abs(total.item() - reference.item()) < 0.04 * given["scale"].sum()
    assert (x.grad - exact.grad).abs().max() < 0.05 * exact.grad.abs().max()
    assert terms.dtype == x.grad.dtype == torch.float32


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().size():
                self.size = max(self.size, value.numel())
        return result


def test_no_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 4 * V)
    given = case()
    x = given["x"].clone().requires_grad_()
    with Largest() as largest:
        cross_entropy(x, given["weight"], Target(given["labels"]), given["scale"])[0].backward()
        judge(x, given["weight"], given["labels"])
    assert 4 * V <= largest.size < N * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_rank", [False, True])
def test_judge(dtype: torch.dtype, low_rank: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks as a full sort in f64 gives them, ties to the lower id."""
    monkeypatch.setattr(module, "_CANDIDATES", 40)
    given = case()
    weight = given["weight"].to(dtype)
    weight[9] = weight[4]  # a tie
    labels = given["labels"].clone()
    labels[:6] = torch.tensor([4, 9, 4, 9, 4, 9])
    second = given["weight2"].to(dtype)
    second[9] = second[4]
    low = (given["x2"], second) if low_rank else None
    ranks, terms = judge(given["x"], weight, labels, low)

    logits = given["x"].double() @ weight.double().t()
    if low is not None:
        logits += low[0].double() @ low[1].double().t()
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    expected = np.argmax(order == labels.numpy()[:, None], axis=1)
    reached = expected < 30  # those far down may lie beyond the candidates of bf16
    assert reached.sum() > N / 3
    assert (ranks.numpy()[reached] == expected[reached]).all()
    assert (ranks.numpy()[~reached] >= 25).all()
    entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(
        terms.double(), entropy, atol=1e-5 if low is None else 0.05, rtol=0.02
    )


def test_likely_tokens() -> None:
    given = case()
    ids, weights = likely_tokens(given["hidden"], given["weight"], M)
    logits = given["hidden"] @ given["weight"].t()
    assert (ids == logits.topk(M).indices).all()
    kept = logits.softmax(-1).gather(1, ids)
    torch.testing.assert_close(weights, kept / kept.sum(-1, keepdim=True))


def test_accuracies_have_their_own_counts() -> None:
    ranks = np.array([[0, 6, -1], [2, -1, -1], [7, 0, 0], [64, 64, 64]])
    figures = head_accuracies(ranks)
    assert [figures[f"head0_top{n}"] for n in (1, 5, 10)] == [25.0, 50.0, 75.0]
    assert figures["head1_top1"] == pytest.approx(100 / 3)
    assert figures["head2_top1"] == 50.0


def test_tokens_per_step_is_that_of_the_best_tree() -> None:
    """Against every tree of up to 4 nodes below the root."""
    ranks = np.random.default_rng(1).geometric(0.5, (60, 2)) - 1
    paths = [path for depth in (1, 2) for path in product(range(4), repeat=depth)]
    for count in (1, 2, 3, 4):
        best = 0.0
        for chosen in combinations(paths, count):
            if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
                hits = sum(tuple(row[: len(path)]) == path for path in chosen for row in ranks)
                best = max(best, 1 + hits / len(ranks))
        assert tokens_per_step(ranks, count + 1) == pytest.approx(best)
    assert tokens_per_step(np.full((3, 2), -1), 16) == 1.0
