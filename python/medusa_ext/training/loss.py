"""Cross-entropy over a large vocabulary without its logits: no [rows, V] in f32 beyond one chunk.

loss = sum_i scale_i sum_v q_iv (log q_iv - log p_iv)   p = softmax(x W^T + x2 W2^T), the term log q
                                                        only where q is a whole distribution

The gradient of the logits is scale (p - q), known as soon as they are: each chunk of rows makes its
share of dX (and of dW where W is trained) at once and lets its logits go. Products are in bf16 or
f32 with sums in f32, the softmax is in f32.

Flops    4 d V a row (6 d V where W is trained); memory  about 10 bytes * _CHUNK_ELEMENTS
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 1 << 23  # of logits at once
_CPU_ROWS = 192  # at once: more leave the caches, fewer read the weights too often
_CANDIDATES = 64


@dataclass(frozen=True)
class Target:
    """What N rows should predict: a token each, mixed with a distribution, or one altogether.

    Attributes:
        labels: [N] i64, or None where `teacher` says all.
        ids, weights: [N, m] i64 and f32, summing to 1: likely tokens of the base model.
        share: of (ids, weights) in the mixture; the labels have the rest.
        teacher: the base model's hidden states [N, d] and lm_head [V, d]; its whole distribution.
    """

    labels: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    share: float = 0.0
    teacher: tuple[torch.Tensor, torch.Tensor] | None = None


def cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: Target,
    scale: torch.Tensor,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of cross-entropies (KL divergences where the target is a teacher's).

    Args:
        x: [N, d].
        weight: [V, d]; gets a gradient where it wants one.
        target: of the N rows.
        scale: [N] f32, the weight of each row.
        low_rank: x2 [N, r] and W2 [V, r], added to the logits: a LoRA update of W.
        dtype: of products; None: that of W.

    Returns:
        The sum, a scalar with gradients, and [N] f32 of its terms before scaling.
    """
    x2, weight2 = low_rank if low_rank is not None else (None, None)
    with torch.autocast(x.device.type, enabled=False):
        found: tuple[torch.Tensor, torch.Tensor] = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
            x, weight, x2, weight2, target, scale, dtype or weight.dtype
        )
    return found


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - of torch
        x: torch.Tensor,
        weight: torch.Tensor,
        x2: torch.Tensor | None,
        weight2: torch.Tensor | None,
        target: Target,
        scale: torch.Tensor,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (x, weight, x2, weight2)
        grads = [
            torch.zeros(value.shape, dtype=torch.float32, device=value.device)
            if value is not None and needed
            else None
            for value, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        x, weight = x.to(dtype), weight.to(dtype)
        if x2 is not None and weight2 is not None:
            x2, weight2 = x2.to(dtype), weight2.to(dtype)
        terms = torch.empty(len(x), dtype=torch.float32, device=x.device)
        rows = max(1, _CHUNK_ELEMENTS // len(weight))
        if x.device.type == "cpu":
            rows = min(rows, _CPU_ROWS)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            logits = (x[part] @ weight.t()).float()
            if x2 is not None and weight2 is not None:
                logits += x2[part] @ weight2.t()
            terms[part] = _to_gradient(logits, target, part)
            if not any(grad is not None for grad in grads):
                continue
            gradient = logits.mul_(scale[part, None]).to(dtype)
            del logits
            _add(grads, gradient, part, x, weight, x2, weight2)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(terms)
        return (terms * scale).sum(), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        return (*(None if g is None else g * upstream for g in ctx.saved_tensors), None, None, None)


def _add(
    grads: list[torch.Tensor | None],
    gradient: torch.Tensor,
    part: slice,
    x: torch.Tensor,
    weight: torch.Tensor,
    x2: torch.Tensor | None,
    weight2: torch.Tensor | None,
) -> None:
    """Add what the gradient of some rows' logits [n, V] gives each input."""
    for index, (left, right) in enumerate(((x, weight), (x2, weight2))):
        rows, columns = grads[2 * index], grads[2 * index + 1]
        if rows is not None and right is not None:
            rows[part] = (gradient @ right).float()
        if columns is not None and left is not None:
            columns += gradient.t() @ left[part]


def _to_gradient(logits: torch.Tensor, target: Target, part: slice) -> torch.Tensor:
    """Turn logits [n, V] f32 into p - q in place; the rows' terms [n]."""
    index = torch.arange(len(logits), device=logits.device)
    top = logits.max(-1, keepdim=True).values
    logits -= top
    terms = torch.zeros(len(logits), device=logits.device)
    if target.teacher is not None:
        hidden, lm_head = target.teacher
        log_q = torch.log_softmax((hidden[part].to(lm_head.dtype) @ lm_head.t()).float(), -1)
        q = log_q.exp()
        terms += (q * (log_q - logits)).sum(-1)
    if target.labels is not None:
        labels = target.labels[part]
        terms -= (1 - target.share) * logits[index, labels]
    if target.ids is not None and target.weights is not None:
        ids, weights = target.ids[part], target.share * target.weights[part]
        terms -= (weights * logits.gather(1, ids)).sum(-1)
    total = logits.exp_().sum(-1, keepdim=True)
    terms += total[:, 0].log()  # q sums to 1
    logits /= total
    if target.teacher is not None:
        logits -= q
    if target.labels is not None:
        logits[index, labels] -= 1 - target.share
    if target.ids is not None and target.weights is not None:
        logits.scatter_add_(1, ids, -weights)
    return terms


@torch.no_grad()
def likely_tokens(
    hidden: torch.Tensor, lm_head: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The base model's likeliest tokens at T positions and their shares, which sum to 1.

    Args:
        hidden: [T, d].
        lm_head: [V, d].
        count: m, tokens kept of each; what the others had is shared out among these.

    Returns:
        Ids [T, m] i64 and weights [T, m] f32.
    """
    ids, weights = [], []
    for part in torch.split(hidden, max(1, _CHUNK_ELEMENTS // len(lm_head))):
        values, found = (part.to(lm_head.dtype) @ lm_head.t()).float().topk(count)
        ids.append(found)
        weights.append(values.softmax(-1))
    return torch.cat(ids), torch.cat(weights)


@torch.no_grad()
def judge(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How well N rows guess: the rank of the right token, and the cross-entropy.

    Products in bf16 find the likeliest _CANDIDATES tokens, f32 puts them in order: logits in bf16
    tie too often. Where the right token is not among them, its rank is their number.

    Args:
        x: [N, d].
        weight: [V, d].
        labels: [N] i64.
        low_rank: as in `cross_entropy`.

    Returns:
        [N] i64, 0 for the likeliest token, and [N] f32.
    """
    dtype = weight.dtype
    x = x.float()
    if low_rank is not None:
        x = torch.cat((x, low_rank[0].float()), 1)
        weight = torch.cat((weight, low_rank[1].to(dtype)), 1)
    ranks, terms = [], []
    rows = max(1, _CHUNK_ELEMENTS // max(len(weight), _CANDIDATES * weight.shape[1]))
    for part, label in zip(torch.split(x, rows), torch.split(labels, rows), strict=True):
        logits = part.to(dtype) @ weight.t()
        found = logits.topk(min(_CANDIDATES, len(weight))).indices
        tried = torch.cat((found, label[:, None]), 1)
        scores = (part[:, None] * weight[tried].float()).sum(-1)  # equal rows give equal sums
        others, own = scores[:, :-1], scores[:, -1:]
        better = (others > own) | ((others == own) & (found < label[:, None]))
        rank = (better & (found != label[:, None])).sum(-1)
        inside = (found == label[:, None]).any(-1)
        ranks.append(torch.where(inside, rank, found.shape[1]))
        terms.append(logits.float().logsumexp(-1) - own[:, 0])
    return torch.cat(ranks), torch.cat(terms)
