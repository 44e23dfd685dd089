"""Medusa-1: the heads alone, on cached hidden states. Heads are pointwise, so no text is needed."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medusa_ext.loading import Checkpoint
from medusa_ext.training.data import Data
from medusa_ext.training.heads import MedusaHeads, lm_head
from medusa_ext.training.hidden_cache import HiddenStates, Rows
from medusa_ext.training.loss import Target, cross_entropy, judge, likely_tokens
from medusa_ext.training.settings import Settings
from medusa_ext.training.trainer import Sums

_SAMPLE = 1024  # tokens that stand for those beyond `loss_vocab`


class CachedPositions(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Stretches of rows; a list of them is one batch, read in one go."""

    def __init__(
        self,
        hidden: HiddenStates,
        rows: Rows,
        chosen: NDArray[np.int64],
        *,
        num_heads: int,
        run_length: int = 1,
        with_teacher: bool = False,
    ) -> None:
        """chosen: rows to learn from, ascending; run_length of them are one item."""
        self.hidden, self.rows, self.chosen = hidden, rows, chosen
        self.num_heads, self.run_length, self.with_teacher = num_heads, run_length, with_teacher

    def __len__(self) -> int:
        """Items."""
        return -(-len(self.chosen) // self.run_length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """A batch of one item."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The batch of B positions.

        Returns:
            hidden [B, d] bf16 and labels [B, K] i64, -100 for none; with a teacher also its hidden
            states [T, d] and where each label's stands among them, teacher_rows [B, K].
        """
        length = self.run_length
        at = np.concatenate([self.chosen[i * length : (i + 1) * length] for i in indices])
        labels = self.rows.labels(at, self.num_heads)
        batch = {"hidden": self.hidden.read(at), "labels": torch.from_numpy(labels)}
        if self.with_teacher:
            ahead = at[:, None] + 1 + np.arange(self.num_heads)
            needed, place = np.unique(np.where(labels < 0, at[:, None], ahead), return_inverse=True)
            batch["teacher_hidden"] = self.hidden.read(needed)
            batch["teacher_rows"] = torch.from_numpy(place.reshape(ahead.shape))
        return batch


def as_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The collator: `__getitems__` has made a batch already."""
    return batch


def positions(
    hidden: HiddenStates, rows: Rows, settings: Settings, eval_positions: int
) -> tuple[CachedPositions, CachedPositions]:
    """What to learn from, and positions spread evenly over what was set aside."""
    out = rows.usable(held_out=True)
    out = out[np.linspace(0, len(out) - 1, min(eval_positions, len(out))).astype(np.int64)]
    length = settings.run_length or 1
    learn = CachedPositions(
        hidden,
        rows,
        rows.usable(held_out=False),
        num_heads=settings.num_heads,
        run_length=length,
        with_teacher=settings.soft_share > 0,
    )
    return learn, CachedPositions(hidden, rows, out, num_heads=settings.num_heads)


def frequent_tokens(rows: Rows, vocab_size: int, count: int) -> tuple[NDArray[np.int64], float]:
    """The most frequent tokens of the data, ascending, and the share of the data they make up."""
    learned = rows.token[~rows.held_out]
    counts = np.bincount(learned, minlength=vocab_size)
    ids = np.sort(np.argsort(-counts, kind="stable")[:count])
    return ids, float(counts[ids].sum() / max(len(learned), 1))


class HeadsModel(nn.Module):
    """The heads, the frozen lm_head, and the loss; what the Trainer sees."""

    lm_head: torch.Tensor
    place: torch.Tensor | None
    frequent: torch.Tensor | None
    rest: torch.Tensor | None

    def __init__(
        self,
        heads: MedusaHeads,
        projection: torch.Tensor,
        settings: Settings,
        frequent: NDArray[np.int64] | None = None,
    ) -> None:
        """projection: the model's lm_head [V, d]; frequent: ids that the loss is confined to."""
        super().__init__()
        self.heads, self.settings, self.sums = heads, settings, Sums()
        self.progress = 0.0
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        projection = projection.to(dtype)
        place = ids = rest = None
        if frequent is not None and len(frequent) < len(projection):
            ids = torch.from_numpy(frequent)
            place = torch.full((len(projection),), -100)
            place[ids] = torch.arange(len(ids))
            rest = (place < 0).nonzero()[:, 0]
        self.register_buffer("lm_head", projection, persistent=False)
        self.register_buffer("place", place, persistent=False)  # id -> its number in `frequent`
        self.register_buffer("frequent", ids, persistent=False)
        self.register_buffer("rest", rest, persistent=False)

    def take_sums(self) -> dict[str, float]:
        """Mean loss of each head since the last call."""
        return self.sums.take()

    def gradient_checkpointing_enable(self, **_: object) -> None:
        """The Trainer may ask; heads hold too little for it to matter."""

    activation_checkpointing_enable = gradient_checkpointing_enable  # its name in transformers 5

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        teacher_hidden: torch.Tensor | None = None,
        teacher_rows: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss; without gradients also the rank that each head gives the right token [B, K].

        Arguments as `CachedPositions` makes them. A rank of -1 stands where there is no label.
        """
        outputs = self.heads(hidden)
        if self.training:
            return {"loss": self._loss(outputs, labels, teacher_hidden, teacher_rows)}
        ranks = torch.full_like(labels, -1)
        loss = torch.zeros((), device=hidden.device)
        for head, x in enumerate(outputs):
            valid = labels[:, head] >= 0
            if valid.any():
                right = labels[valid, head]
                ranks[valid, head], terms = judge(x[valid], self._projection(head), right)
                loss += self._share(head) * terms.mean()
        return {"loss": loss, "ranks": ranks}

    def _share(self, head: int) -> float:
        return float(self.settings.head_decay**head)

    def _projection(self, head: int) -> torch.Tensor:
        own = self.heads.projections
        return own[head] if len(own) else self.lm_head

    def _draw(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Ids that a step's loss knows, and what to add to their logits [n, 1]; None for all.

        The frequent ones, and a sample that stands for the rest: without it nothing would teach a
        head not to guess a rare token.
        """
        if self.frequent is None or self.rest is None:
            return None, None
        sample, count = self.rest, len(self.rest)
        if count > _SAMPLE:
            sample = sample[torch.randint(count, (_SAMPLE,)).to(sample.device)]
        chosen = torch.cat((self.frequent, sample))
        lift = torch.zeros((len(chosen), 1), device=chosen.device)
        lift[len(self.frequent) :] = math.log(count / len(sample))
        return chosen, lift

    def _loss(
        self,
        outputs: Sequence[torch.Tensor],
        labels: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
        teacher_rows: torch.Tensor | None,
    ) -> torch.Tensor:
        soft = None
        if teacher_hidden is not None:
            known = self.lm_head if self.frequent is None else self.lm_head[self.frequent]
            soft = likely_tokens(teacher_hidden, known, min(self.settings.soft_top_k, len(known)))
        chosen, lift = self._draw()
        shared = None if len(self.heads.projections) else _rows(self.lm_head, chosen)
        if self.place is not None:
            labels = torch.where(labels >= 0, self.place[labels], labels)
        loss = torch.zeros((), device=labels.device)
        for head, x in enumerate(outputs):
            valid = labels[:, head] >= 0
            count = int(valid.sum())
            scale = torch.full((count,), self._share(head) / max(count, 1), device=labels.device)
            target = Target(labels[valid, head])
            if soft is not None and teacher_rows is not None:
                which = teacher_rows[valid, head]
                share = self.settings.soft_share
                target = Target(labels[valid, head], soft[0][which], soft[1][which], share)
            weight = _rows(self.heads.projections[head], chosen) if shared is None else shared
            low = None if lift is None else (torch.ones_like(lift[:1]).expand(count, 1), lift)
            dtype = self.lm_head.dtype
            part, terms = cross_entropy(x[valid], weight, target, scale, low, dtype)
            loss = loss + part
            if count:
                self.sums.add([(f"head{head}_loss", terms.mean())])
        return loss


def _rows(weight: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    return weight if chosen is None else weight[chosen]


def build(
    checkpoint: Checkpoint, heads: MedusaHeads, rows: Rows, settings: Settings
) -> tuple[HeadsModel, float]:
    """The model to train, and the share of the data's tokens that its loss knows."""
    frequent, share = None, 1.0
    if settings.loss_vocab:
        vocab_size = checkpoint.config["vocab_size"]
        frequent, share = frequent_tokens(rows, vocab_size, settings.loss_vocab)
    return HeadsModel(heads, lm_head(checkpoint), settings, frequent), share


def cache_folder(data: Data, given: str | os.PathLike[str] | None) -> Path:
    """Where hidden states are kept: beside the data unless it is given."""
    return Path(given) if given is not None else data.paths[0].with_suffix(".hidden")
