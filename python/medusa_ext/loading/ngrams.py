"""ngrams.safetensors, which lies beside Medusa heads: what follows what in text of the model's.

A head guesses a token without knowing those between. The table says how much likelier than by
itself a token b is after the guesses a0 and a before it, by counts c of what the model wrote:

    gain(b | a0, a) ~ log P(b | a0 a) / P(b)
    p(b) = (u(b) + 1/2) / (N + V/2)                    u(b) of all N tokens are b
    r2(a, b) = (c(a, b) / p(b) + k) / (c(a) + k)
    r3(a0, a, b) = (c(a0, a, b) / p(b) + k r2(a, b)) / (c(a0, a) + k)

Gains are log r3. Where a and b are no entry, r2 is k / (c(a) + k); where a0, a and b are none, r3
is r2 k / (c(a0, a) + k); of pairs without entries it is r2, and of an unknown a 1.

Source: Kim et al., arXiv:2404.09221, which rescores drafts by n-grams. Entries are chosen by
weighted difference: Seymore and Rosenfeld, "Scalable backoff language models", ICSLP 1996.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from medusa_ext.loading.errors import LoadError, shape_text
from medusa_ext.loading.files import write_whole
from medusa_ext.options import shown

if TYPE_CHECKING:  # both import this module
    from medusa_ext.distill.records import Record
    from medusa_ext.loading.checkpoint import Checkpoint

NGRAMS_FILE = "ngrams.safetensors"
NGRAMS_KEY = "medusa_ext.ngrams"  # its bytes in the one-file form, as base64
MAX_ENTRIES = 60_000
STEP = 1 / 8  # nats

_K = 4.0  # how much an estimate without the context weighs, as a count
_MAX_BYTES = 16 << 20
_MAX_TOKENS = 10_000_000
_REPAIR = "make it again with `medusa-ext calibrate ... --ngrams`, or remove it"
_FORMAT = {"format": "medusa_ext.ngrams", "version": "1"}
# Arrays of one length stand together; gains are i8, the others the smallest type that holds them.
_LENGTHS = (
    ("contexts", "counts", "unseen"),
    ("tokens", "gains", "pair_counts", "pair_unseen"),
    ("pair_tokens", "pair_gains"),
)
_GAINS = ("unseen", "gains", "pair_unseen", "pair_gains")
_WORDS = {"int8": "I8", "uint8": "U8", "uint16": "U16", "int32": "I32"}


@dataclass(frozen=True)
class Ngrams:
    """The table. Gains are in steps of STEP; sum(counts) is E, sum(pair_counts) is P.

    Attributes:
        contexts: [C] i32, tokens whose successors are known, rising.
        counts: [C] i32, number of successors of each, 1 or more.
        unseen: [C] i8, gain of all other tokens after it.
        tokens: [E] i32, successors, context after context, the most frequent first.
        gains: [E] i8.
        pair_counts: [E] i32, number of successors of the pair (context, token).
        pair_unseen: [E] i8, what is added to the gain after the token alone for all others.
        pair_tokens: [P] i32, successors, pair after pair, the most frequent first.
        pair_gains: [P] i8.
        vocab_size: V of the model.
    """

    contexts: NDArray[np.int32]
    counts: NDArray[np.int32]
    unseen: NDArray[np.int8]
    tokens: NDArray[np.int32]
    gains: NDArray[np.int8]
    pair_counts: NDArray[np.int32]
    pair_unseen: NDArray[np.int8]
    pair_tokens: NDArray[np.int32]
    pair_gains: NDArray[np.int8]
    vocab_size: int

    @property
    def digest(self) -> str:
        """Of all of it: 16 hexadecimal digits."""
        return hashlib.sha256(_to_bytes(self)).hexdigest()[:16]

    def gain(self, before: int, last: int, token: int) -> int:
        """Of `token` after the tokens `before` and `last`, in steps; plain, not fast."""
        known = self._entries(last)
        if not known:
            return 0
        at = next((entry for entry in known if self.tokens[entry] == token), None)
        if at is None:
            two = int(self.unseen[np.searchsorted(self.contexts, last)])
        else:
            two = int(self.gains[at])
        pair = next((e for e in self._entries(before) if self.tokens[e] == last), None)
        if pair is None or not self.pair_counts[pair]:
            return two
        for entry in _part(self.pair_counts, pair):
            if self.pair_tokens[entry] == token:
                return int(self.pair_gains[entry])
        return two + int(self.pair_unseen[pair])

    def _entries(self, context: int) -> range:
        place = int(np.searchsorted(self.contexts, context))
        known = place < len(self.contexts) and self.contexts[place] == context
        return _part(self.counts, place) if known else range(0)


def _part(counts: NDArray[np.int32], place: int) -> range:
    """Which of the entries that stand one part after the other are of this part."""
    end = int(counts[: place + 1].sum())
    return range(end - int(counts[place]), end)


def count_ngrams(
    records: Iterable[Record], vocab_size: int, max_entries: int = MAX_ENTRIES
) -> Ngrams:
    """Count in what the model wrote, and keep what is worth most.

    An n-gram counts where the model wrote its last token; the others may be the prompt's. Entries
    are seen twice or more and are the first by count times the gain that their loss would cost.
    Of those, three tokens go where the first two are no entry: their place is at that one. The
    first 10 million tokens count: some 85 bytes are needed for each, and more say little more.

    Args:
        records: of the model's text.
        vocab_size: V of the model.
        max_entries: successors of tokens and of pairs, together.
    """
    none: NDArray[np.int64] = np.zeros(0, np.int64)
    written, last, after_one, pairs, after_two = ([none] for _ in range(5))
    seen = 0
    for record in records:
        if seen >= _MAX_TOKENS:
            break
        seen += len(record.ids)
        ids, mask = record.ids.astype(np.int64), record.generated
        written.append(ids[mask])
        last.append(ids[:-1][mask[1:]])
        after_one.append(ids[1:][mask[1:]])
        pairs.append((ids[:-2] * vocab_size + ids[1:-1])[mask[2:]])
        after_two.append(ids[2:][mask[2:]])
    uses = np.bincount(np.concatenate(written), minlength=vocab_size)
    return _table(
        (uses + 0.5) / (uses.sum() + 0.5 * vocab_size),
        _Counts.of(last, after_one, vocab_size),
        _Counts.of(pairs, after_two, vocab_size),
        max_entries,
    )


def _table(share: NDArray[np.float64], two: _Counts, three: _Counts, max_entries: int) -> Ngrams:
    """Weigh what was counted and choose; `share` [V] is p."""
    vocab_size = len(share)
    # Where the last two of three tokens stand in `two`: these were seen at least as often.
    context = np.searchsorted(two.contexts, three.contexts % vocab_size)[three.context]
    shorter = np.searchsorted(
        two.context * vocab_size + two.tokens, context * vocab_size + three.tokens
    )
    ratio = (two.counts / share[two.tokens] + _K) / (two.totals[two.context] + _K)
    pair_ratio = (three.counts / share[three.tokens] + _K * ratio[shorter]) / (
        three.totals[three.context] + _K
    )
    gain, pair_gain = np.log(ratio), np.log(pair_ratio)
    unseen, pair_unseen = two.unseen(), three.unseen()
    lost = two.counts * (gain - unseen[two.context])
    pair_lost = three.counts * (pair_gain - gain[shorter] - pair_unseen[three.context])
    kept = np.zeros(len(lost) + len(pair_lost), bool)
    kept[np.argsort(-np.concatenate([lost, pair_lost]), kind="stable")[:max_entries]] = True

    # Pairs stand at the entry that is the same two tokens, -1: none.
    rows = two.order(kept[: len(lost)], two.context)
    places, counts = np.unique(two.context[rows], return_counts=True)
    entries = two.contexts[two.context[rows]] * vocab_size + two.tokens[rows]
    _, entry, pair = np.intersect1d(
        entries, three.contexts, assume_unique=True, return_indices=True
    )
    entry_of = np.full(len(three.contexts), -1)
    entry_of[pair] = entry
    owner = entry_of[three.context]
    pair_rows = three.order(kept[len(lost) :] & (owner >= 0), owner)
    pair_counts = np.bincount(owner[pair_rows], minlength=len(rows))
    entry_unseen = np.zeros(len(rows))
    entry_unseen[entry] = pair_unseen[pair]
    entry_unseen[pair_counts == 0] = 0
    return Ngrams(
        two.contexts[places].astype(np.int32),
        counts.astype(np.int32),
        _steps(unseen[places]),
        two.tokens[rows].astype(np.int32),
        _steps(gain[rows]),
        pair_counts.astype(np.int32),
        _steps(entry_unseen),
        three.tokens[pair_rows].astype(np.int32),
        _steps(pair_gain[pair_rows]),
        vocab_size,
    )


@dataclass(frozen=True)
class _Counts:
    """Of contexts, one or two tokens as a number each, and of what followed twice or more."""

    contexts: NDArray[np.int64]  # [C], rising
    totals: NDArray[np.int64]  # [C], how often each was followed by anything
    context: NDArray[np.int64]  # [M], place in `contexts`, rising
    tokens: NDArray[np.int64]  # [M], rising within a context
    counts: NDArray[np.int64]  # [M]

    @staticmethod
    def of(
        contexts: list[NDArray[np.int64]], tokens: list[NDArray[np.int64]], vocab_size: int
    ) -> _Counts:
        """Count pieces of text, a context for each token."""
        # Places are far smaller than pairs: times V they fit 64 bits for every vocabulary.
        known, place = np.unique(np.concatenate(contexts), return_inverse=True)
        keys, counts = np.unique(place * vocab_size + np.concatenate(tokens), return_counts=True)
        keys, counts = keys[counts > 1], counts[counts > 1]
        totals = np.bincount(place, minlength=len(known))
        return _Counts(known, totals, keys // vocab_size, keys % vocab_size, counts)

    def unseen(self) -> NDArray[np.float64]:
        """[C], the logarithm of what is left for tokens that did not follow, in nats."""
        left: NDArray[np.float64] = np.log(_K / (self.totals + _K))
        return left

    def order(self, kept: NDArray[np.bool_], part: NDArray[np.int64]) -> NDArray[np.intp]:
        """Those that are kept by part, falling count and token."""
        rows = np.flatnonzero(kept)
        return rows[np.lexsort((self.tokens[rows], -self.counts[rows], part[rows]))]


def _steps(nats: NDArray[np.float64]) -> NDArray[np.int8]:
    return np.clip(np.rint(nats / STEP), -128, 127).astype(np.int8)


def find_ngrams(checkpoint: Checkpoint) -> Ngrams | None:
    """Return the table that a model's heads carry, None where they carry none.

    One that is damaged is a warning: it is of no use, but guesses never change the output.
    """
    info, vocab_size = checkpoint.heads_info, checkpoint.config["vocab_size"]
    try:
        if info is not None and info.format == "export":
            text = (checkpoint.metadata or {}).get(NGRAMS_KEY)
            return None if text is None else from_text(text, str(info.path), vocab_size)
        if info is not None and (info.path / NGRAMS_FILE).is_file():
            path = info.path / NGRAMS_FILE
            return read_ngrams(path, str(path), vocab_size)
    except LoadError as error:
        warnings.warn(f"{error}; it is not used", stacklevel=3)
    return None


def save_ngrams(path: Path, ngrams: Ngrams) -> None:
    """Write the file; LoadError where the disk refuses, and nothing stays."""
    write_whole(path, _to_bytes(ngrams))


def to_text(ngrams: Ngrams) -> str:
    """The file as text, for metadata."""
    return base64.b64encode(_to_bytes(ngrams)).decode()


def from_text(text: str, where: str, vocab_size: int) -> Ngrams:
    """Take back what `to_text` made; otherwise as `read_ngrams`."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise LoadError(f"{where}: {NGRAMS_KEY} is no base64 ({error}); {_REPAIR}") from None
    return read_ngrams(data, f"{where}: {NGRAMS_KEY}", vocab_size)


def read_ngrams(source: Path | bytes, where: str, vocab_size: int) -> Ngrams:
    """Read and check a file, or its bytes.

    Args:
        source: of the table.
        where: names it in errors.
        vocab_size: V of the model.

    Raises:
        LoadError: what is wrong with it, and what to do.
    """
    if isinstance(source, Path):
        try:
            with source.open("rb") as file:
                source = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise LoadError(f"cannot read {where}: {error.strerror}") from None
    try:
        if len(source) > _MAX_BYTES:
            raise ValueError(f"over {_MAX_BYTES} bytes are no table of n-grams")
        return _checked(_arrays(source, vocab_size), vocab_size)
    except ValueError as error:
        raise LoadError(f"{where}: {error}; {_REPAIR}") from None


def _to_bytes(ngrams: Ngrams) -> bytes:
    """The same for the same table; the library's own writer shuffles metadata."""
    metadata = _FORMAT | {"vocab_size": str(ngrams.vocab_size)}
    header: dict[str, object] = {"__metadata__": metadata}
    content = b""
    for name in (name for part in _LENGTHS for name in part):
        array = _packed(getattr(ngrams, name))
        ends = [len(content), len(content) + array.nbytes]
        word = _WORDS[array.dtype.name]
        header[name] = {"dtype": word, "shape": [len(array)], "data_offsets": ends}
        content += array.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content


def _packed(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype == np.int8:
        return array
    top = array.max(initial=0)
    return array.astype(np.uint8 if top < 1 << 8 else np.uint16 if top < 1 << 16 else np.int32)


def _arrays(data: bytes, vocab_size: int) -> dict[str, NDArray[Any]]:
    """The arrays by name, their names and types checked; ValueError without the file's name."""
    try:
        found = load(data)
    except (SafetensorError, KeyError) as error:  # a type that numpy lacks is a KeyError
        raise ValueError(f"it is no safetensors file ({error})") from None
    (size,) = struct.unpack_from("<Q", data)
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
    for key, value in _FORMAT.items():
        if metadata.get(key) != value:
            raise ValueError(f"its {key} is {shown(metadata.get(key))}; wanted {value!r}")
    if metadata.get("vocab_size") != str(vocab_size):
        raise ValueError(
            f"its vocab_size is {shown(metadata.get('vocab_size'))}, and the model has "
            f"{vocab_size} tokens"
        )
    wanted = {name for part in _LENGTHS for name in part}
    if found.keys() != wanted:
        name = min(found.keys() ^ wanted)
        raise ValueError(f"{shown(name)} is {'unknown' if name in found else 'missing'}")
    for name, array in found.items():
        kinds = ("int8",) if name in _GAINS else ("uint8", "uint16", "int32")
        if array.dtype.name not in kinds or array.ndim != 1:
            raise ValueError(
                f"{name} is {array.dtype} of shape {shape_text(array.shape)}; wanted one axis of "
                f"{' or '.join(kinds)}"
            )
    return {name: array.astype("i1" if name in _GAINS else "i4") for name, array in found.items()}


def _checked(arrays: dict[str, NDArray[Any]], vocab_size: int) -> Ngrams:
    """The table, if its parts fit each other; ValueError without the file's name."""
    for first, *others in _LENGTHS:
        for name in others:
            if len(arrays[name]) != len(arrays[first]):
                raise ValueError(
                    f"{name} has {len(arrays[name])} numbers, {first} {len(arrays[first])}"
                )
    for name in ("contexts", "tokens", "pair_tokens"):
        wrong = arrays[name][(arrays[name] < 0) | (arrays[name] >= vocab_size)]
        if len(wrong):
            raise ValueError(f"{name} holds {wrong[0]}; wanted ids, 0 to {vocab_size - 1}")
    if (np.diff(arrays["contexts"]) <= 0).any():
        raise ValueError("contexts do not rise")
    for counts, least, tokens in (("counts", 1, "tokens"), ("pair_counts", 0, "pair_tokens")):
        parts, ids = arrays[counts].astype(np.int64), arrays[tokens]
        if (parts < least).any():
            raise ValueError(f"{counts} holds {parts.min()}; wanted {least} or more")
        if parts.sum() != len(ids):
            raise ValueError(f"{counts} add up to {parts.sum()}, and there are {len(ids)} {tokens}")
        keys = np.repeat(np.arange(len(parts)), parts) * vocab_size + ids
        if len(np.unique(keys)) < len(keys):
            raise ValueError(f"{tokens} names a successor twice")
    return Ngrams(**arrays, vocab_size=vocab_size)
