"""Fewer rows for Medusa heads: the frequent tokens of each head's own lm_head, no others are read.

A head reads its whole lm_head in every step, and with a vocabulary of 128 thousand tokens the heads
read nearly a third as much as the model. They only guess, so a token that they never propose costs
a little acceptance and never changes the output. Source: FR-Spec, arXiv:2502.14856.

No published heads say how frequent their tokens are, so the order of ids stands in for it:
byte-pair vocabularies list single bytes first, then merges as they were learnt, the commonest pair
first.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.files import ArrayTensors
from medusa_ext.loading.heads import Heads
from medusa_ext.loading.plan import Entry, chosen_rows


def keep_frequent(heads: Heads, size: int, vocab_size: int, always: Iterable[int]) -> Heads:
    """The same heads with at most `size` rows in each lm_head.

    Args:
        heads: as they were found; nothing has been read.
        size: rows to keep, at most the vocabulary.
        vocab_size: V of the model.
        always: ids that are kept however rare: special and added tokens, end of sequence.

    Raises:
        LoadError: the heads share the model's lm_head, or the size is impossible.
    """
    if heads.config["shared_lm_head"]:
        raise LoadError(
            f"head_vocab is {size}, but the heads in {heads.info.path} use the model's own lm_head,"
            " which must stay whole; leave head_vocab out"
        )
    if size > vocab_size:
        raise LoadError(
            f"head_vocab is {size}; the model's vocabulary has {vocab_size} tokens: give at most "
            "that, or leave head_vocab out"
        )
    stored = _stored_ids(heads, vocab_size)
    kept = np.isin(stored, list(always))
    num_kept = int(kept.sum())
    if size <= num_kept:
        raise LoadError(
            f"head_vocab is {size}; the {num_kept} special and added tokens are always kept, so "
            f"give more than {num_kept}"
        )
    if size >= len(stored):  # heads that were cut before may have fewer
        return heads
    others = np.flatnonzero(~kept)
    by_id = others[np.argsort(stored[others], kind="stable")]
    rows = np.sort(np.concatenate([np.flatnonzero(kept), by_id[: size - num_kept]]))

    entries = [_cut(entry, rows) for entry in heads.entries if entry.name != "heads.token_map"]
    ids = ArrayTensors(heads.info.path)
    ids.arrays["token_map"] = stored[rows]
    entries.append(Entry("heads.token_map", (size,), ids, "token_map"))
    return Heads(
        replace(heads.info, head_vocab=size), {**heads.config, "head_vocab": size}, entries
    )


def _stored_ids(heads: Heads, vocab_size: int) -> NDArray[np.int32]:
    """Vocabulary ids of the rows that the heads have now."""
    for entry in heads.entries:
        if entry.name == "heads.token_map":
            ids: NDArray[np.int32] = entry.read("")[0]
            return ids
    return np.arange(vocab_size, dtype=np.int32)


def _cut(entry: Entry, rows: NDArray[np.intp]) -> Entry:
    if not entry.name.endswith(".lm_head.weight"):
        return entry
    return replace(
        entry, shape=(len(rows), entry.shape[1]), convert=chosen_rows(rows, entry.convert)
    )
