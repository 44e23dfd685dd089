"""What follows what: counted, chosen, written and read; carried wherever heads go."""

import base64
import errno
import math
import shutil
import warnings
from collections import Counter, defaultdict
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

import loading_util as util
from medusa_ext.distill.records import Record
from medusa_ext.loading import LoadError, convert, export, ngrams, open_checkpoint
from medusa_ext.loading.files import SafetensorsTensors
from medusa_ext.loading.ngrams import (
    MAX_ENTRIES,
    NGRAMS_FILE,
    NGRAMS_KEY,
    Ngrams,
    count_ngrams,
    find_ngrams,
    read_ngrams,
    save_ngrams,
)

V = 12
ARRAYS = [field.name for field in fields(Ngrams) if field.name != "vocab_size"]


def random_records(seed: int, count: int = 40) -> list[Record]:
    """Text in which some tokens follow others often; the model wrote some runs of it."""
    rng = np.random.default_rng(seed)
    likely = rng.dirichlet(np.full(V, 0.3), size=(V, V)).cumsum(-1)
    records = []
    for length in rng.integers(0, 60, count):
        ids = [int(rng.integers(V - 2)), 0]  # the last but one begins nothing
        while len(ids) < length:
            ids.append(min(int((likely[ids[-2], ids[-1]] < rng.random()).sum()), V - 1))
        runs = rng.integers(2, size=length // 5 + 1, dtype=np.int8)
        mask = np.repeat(runs, 5)[:length].astype(bool)
        records.append(Record(np.array(ids[:length], np.int32), mask))
    return records


class Reference:
    """The estimates of the module in dictionaries and f64, and what is kept of them."""

    def __init__(self, records: list[Record], max_entries: int) -> None:
        self.uses: Counter[int] = Counter()
        self.after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for record in records:
            ids = record.ids.tolist()
            for i in np.flatnonzero(record.generated).tolist():
                self.uses[ids[i]] += 1
                for length in (1, 2):
                    if i >= length:
                        self.after[tuple(ids[i - length : i])][ids[i]] += 1
        found = [
            (self.lost((*context, token)), (*context, token))
            for context, counts in self.after.items()
            for token, count in counts.items()
            if count >= 2
        ]
        found.sort(key=lambda entry: (-entry[0], len(entry[1]), entry[1]))
        kept = {gram for _, gram in found[:max_entries]}
        self.twos = {gram for gram in kept if len(gram) == 2}
        self.threes = {gram for gram in kept if len(gram) == 3 and gram[:2] in self.twos}
        self.orphans = len(kept) - len(self.twos) - len(self.threes)

    def ratio(self, gram: tuple[int, ...]) -> float:
        *context, token = gram
        share = (self.uses[token] + 0.5) / (sum(self.uses.values()) + 0.5 * V)
        counts = self.after[tuple(context)]
        shorter = self.ratio(gram[1:]) if len(gram) == 3 else 1.0
        return (counts[token] / share + 4 * shorter) / (sum(counts.values()) + 4)

    def unseen(self, context: tuple[int, ...]) -> float:
        return 4 / (sum(self.after[context].values()) + 4)

    def lost(self, gram: tuple[int, ...]) -> float:
        *context, token = gram
        without = self.unseen(tuple(context)) * (self.ratio(gram[1:]) if len(gram) == 3 else 1.0)
        count = self.after[tuple(context)][token]
        return count * abs(math.log(self.ratio(gram)) - math.log(without))

    def arrays(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {name: [] for name in ARRAYS}
        for context in sorted({gram[:1] for gram in self.twos}):
            twos = self.listed(context, self.twos)
            found["contexts"] += context
            found["counts"].append(len(twos))
            found["unseen"].append(steps(self.unseen(context)))
            for two in twos:
                threes = self.listed(two, self.threes)
                found["tokens"].append(two[-1])
                found["gains"].append(steps(self.ratio(two)))
                found["pair_counts"].append(len(threes))
                found["pair_unseen"].append(steps(self.unseen(two)) if threes else 0)
                found["pair_tokens"] += [three[-1] for three in threes]
                found["pair_gains"] += [steps(self.ratio(three)) for three in threes]
        return found

    def listed(self, context: tuple[int, ...], grams: set) -> list[tuple[int, ...]]:
        own = [gram for gram in grams if gram[:-1] == context]
        return sorted(own, key=lambda gram: (-self.after[context][gram[-1]], gram[-1]))

    def gain(self, a0: int, a: int, b: int) -> tuple[str, int]:
        """Which rule says it, and what."""
        if not any(gram[0] == a for gram in self.twos):
            return "unknown", 0
        known = (a, b) in self.twos
        two = steps(self.ratio((a, b)) if known else self.unseen((a,)))
        if not any(gram[:2] == (a0, a) for gram in self.threes):
            return ("two" if known else "unseen"), two
        if (a0, a, b) in self.threes:
            return "three", steps(self.ratio((a0, a, b)))
        return "unseen after two", two + steps(self.unseen((a0, a)))


def steps(ratio: float) -> int:
    return max(-128, min(127, round(math.log(ratio) / ngrams.STEP)))


def assert_same(found: Ngrams, wanted: Ngrams) -> None:
    for name in ARRAYS:
        assert getattr(found, name).dtype == getattr(wanted, name).dtype
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), name)
    assert found.vocab_size == wanted.vocab_size


def test_counts_and_gains_are_those_of_plain_counting():
    """Every three tokens, with all entries and with some; each rule is met, and orphans are."""
    met, orphans = Counter(), 0
    for seed, max_entries in product(range(4), (MAX_ENTRIES, 150, 60, 25, 7, 1, 0)):
        records = random_records(seed)
        table, wanted = count_ngrams(records, V, max_entries), Reference(records, max_entries)
        for name, values in wanted.arrays().items():
            assert getattr(table, name).tolist() == values, (name, max_entries)
            kind = np.int8 if name.endswith(("unseen", "gains")) else np.int32
            assert getattr(table, name).dtype == kind
        for before, last, token in np.ndindex(V, V, V):
            rule, gain = wanted.gain(before, last, token)
            assert table.gain(before, last, token) == gain, (before, last, token, max_entries)
            met[rule] += 1
        assert len(table.tokens) + len(table.pair_tokens) + wanted.orphans <= max_entries
        orphans += wanted.orphans
    assert min(met.values()) > 100
    assert len(met) == 5
    assert orphans > 0


def test_only_what_the_model_wrote_counts():
    ids = np.array([1, 2, 3, 1, 2, 3, 1, 2, 4], np.int32)
    mask = np.array([0, 0, 1, 0, 0, 1, 0, 0, 1], bool)
    table = count_ngrams([Record(ids, mask)], V)
    assert (table.contexts.tolist(), table.tokens.tolist()) == ([2], [3])  # 2 4 stands once
    assert table.pair_tokens.tolist() == []  # 1 2 is no entry, though it stands three times
    assert table.unseen.tolist() == [steps(4 / (3 + 4))]  # 2 4 is in the total
    assert table.gains.tolist() == [steps((2 / (2.5 / (3 + 0.5 * V)) + 4) / (3 + 4))]


def test_gains_end_where_i8_ends(monkeypatch):
    monkeypatch.setattr(ngrams, "STEP", 1 / 160)
    records = random_records(1)
    table, wanted = count_ngrams(records, V), Reference(records, MAX_ENTRIES).arrays()
    for name in ("unseen", "gains", "pair_gains"):
        assert getattr(table, name).tolist() == wanted[name]
    assert table.gains.max() == 127
    assert table.unseen.min() == -128


def test_the_order_of_records_does_not_matter():
    records = random_records(2)
    assert_same(count_ngrams(reversed(records), V, 50), count_ngrams(iter(records), V, 50))


def test_no_text_no_entries(tmp_path):
    table = count_ngrams([], V)
    assert [len(getattr(table, name)) for name in ARRAYS] == [0] * 9
    assert table.gain(1, 2, 3) == 0
    save_ngrams(tmp_path / NGRAMS_FILE, table)
    assert_same(read_ngrams(tmp_path / NGRAMS_FILE, "it", V), table)


def test_a_large_vocabulary():
    """Three tokens as one number would not fit 64 bits."""
    top = 3_000_000
    ids = np.array([top - 1, top - 2, top - 3] * 4, np.int32)
    table = count_ngrams([Record(ids, np.ones(12, bool))], top)
    assert table.contexts.tolist() == [top - 3, top - 2, top - 1]
    assert table.tokens.tolist() == [top - 1, top - 3, top - 2]
    assert table.pair_tokens.tolist() == [top - 2, top - 1, top - 3]
    assert table.gain(top - 1, top - 2, top - 3) == table.pair_gains[2] > table.gains[1] > 0


@pytest.mark.parametrize(("top", "kind"), [(255, "U8"), (256, "U16"), (70_000, "I32")])
def test_a_file_and_back(tmp_path, top, kind):
    table = count_ngrams(random_records(3), V, 100)
    ids = np.append(np.arange(V - 1), top).astype(np.int32)  # the last token is renamed
    names = ("contexts", "tokens", "pair_tokens")
    renamed = {name: ids[getattr(table, name)] for name in names}
    table = replace(table, vocab_size=top + 1, **renamed)
    path = tmp_path / NGRAMS_FILE
    save_ngrams(path, table)
    assert_same(read_ngrams(path, "it", top + 1), table)
    assert_same(read_ngrams(path.read_bytes(), "it", top + 1), table)
    file = SafetensorsTensors(path).file
    assert file.metadata == {
        "format": "medusa_ext.ngrams",
        "version": "1",
        "vocab_size": str(top + 1),
    }
    assert (file.dtype("tokens"), file.dtype("gains"), file.dtype("counts")) == (kind, "I8", "U8")
    assert load_file(path).keys() == set(ARRAYS)
    first = path.read_bytes()
    save_ngrams(path, table)
    assert path.read_bytes() == first  # to the byte
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_refuses(tmp_path, monkeypatch):
    table, path = count_ngrams(random_records(3), V), tmp_path / NGRAMS_FILE
    path.write_text("precious")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LoadError, match=r"cannot write .*ngrams\.safetensors: No space left"):
        save_ngrams(path, table)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def changed(**arrays):
    """Other values; None leaves an array out."""

    def change(tensors, metadata):
        both = tensors | arrays
        return {name: value for name, value in both.items() if value is not None}, metadata

    return change


def told(**texts):
    def change(tensors, metadata):
        both = metadata | texts
        return tensors, {name: value for name, value in both.items() if value is not None}

    return change


# A table of V tokens to damage: 2 is followed by 5 and 2, 5 by 2; 2 5 by 4 and 3, 5 2 by 5.
GOOD = {
    "contexts": [2, 5],
    "counts": [2, 1],
    "unseen": [-9, -4],
    "tokens": [5, 2, 2],
    "gains": [10, 3, 7],
    "pair_counts": [2, 0, 1],
    "pair_unseen": [-5, -3, -2],  # -3: of no pair
    "pair_tokens": [4, 3, 5],
    "pair_gains": [12, 11, 9],
}
U8, I8, I32 = np.uint8, np.int8, np.int32
DAMAGES = [
    (told(format="other"), r"its format is 'other'; wanted 'medusa_ext\.ngrams'"),
    (told(format=None), "its format is None"),
    (lambda tensors, _: (tensors, None), "its format is None"),
    (told(version="2"), "its version is '2'; wanted '1'"),
    (told(vocab_size="13\n"), "its vocab_size is '13.*', and the model has 12 tokens"),
    (told(vocab_size=None), "its vocab_size is None"),
    (changed(gains=None), "'gains' is missing"),
    (changed(more=np.zeros(1, U8)), "'more' is unknown"),
    (changed(**{"a\nb": np.zeros(1, U8)}), "'a.*b' is unknown"),
    (changed(contexts=np.array([2, 5], np.int64)), r"contexts is int64 of shape \[2\]; wanted .*"),
    (changed(tokens=np.array([5, 2, 2], np.float32)), "tokens is float32 of shape"),
    (changed(unseen=np.array([9, 4], U8)), r"unseen is uint8 of shape \[2\]; wanted .* int8"),
    (changed(tokens=np.array([5, 2, 2], I8)), "tokens is int8 of .* uint8 or uint16 or int32"),
    (changed(counts=np.array([[2, 1]], U8)), r"counts is uint8 of shape \[1, 2\]; wanted one axis"),
    (changed(counts=np.array([2, 1, 0], U8)), "counts has 3 numbers, contexts 2"),
    (changed(unseen=np.array([1], I8)), "unseen has 1 numbers, contexts 2"),
    (changed(gains=np.zeros(4, I8)), "gains has 4 numbers, tokens 3"),
    (changed(pair_counts=np.array([3], U8)), "pair_counts has 1 numbers, tokens 3"),
    (changed(pair_unseen=np.zeros(2, I8)), "pair_unseen has 2 numbers, tokens 3"),
    (changed(pair_gains=np.zeros(2, I8)), "pair_gains has 2 numbers, pair_tokens 3"),
    (changed(contexts=np.array([2, 12], U8)), "contexts holds 12; wanted ids, 0 to 11"),
    (changed(tokens=np.array([5, -1, 2], I32)), "tokens holds -1; wanted ids, 0 to 11"),
    (changed(pair_tokens=np.array([4, 12, 5], U8)), "pair_tokens holds 12; wanted ids"),
    (changed(contexts=np.array([5, 2], U8)), "contexts do not rise"),
    (changed(contexts=np.array([5, 5], U8)), "contexts do not rise"),
    (changed(counts=np.array([3, 0], U8)), "counts holds 0; wanted 1 or more"),
    (changed(counts=np.array([2, 2], U8)), "counts add up to 4, and there are 3 tokens"),
    (changed(pair_counts=np.array([4, 0, -1], I32)), "pair_counts holds -1; wanted 0 or more"),
    (changed(pair_counts=np.array([2, 0, 0], U8)), "pair_counts add up to 2, .* 3 pair_tokens"),
    (changed(pair_counts=np.full(3, 2**31 - 1, I32)), "pair_counts add up to 6442450941, and"),
    (changed(tokens=np.array([5, 5, 2], U8)), "tokens names a successor twice"),
    (changed(pair_tokens=np.array([4, 4, 5], U8)), "pair_tokens names a successor twice"),
]


def good() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    arrays = {
        name: np.array(values, I8 if name.endswith(("unseen", "gains")) else U8)
        for name, values in GOOD.items()
    }
    return arrays, {"format": "medusa_ext.ngrams", "version": "1", "vocab_size": "12"}


def refused(path: Path, words: str) -> bool:
    """As a file and as bytes, in one line that says what to do."""
    for source in (path, path.read_bytes()):
        with pytest.raises(LoadError, match=words) as error:
            read_ngrams(source, "this table", V)
        text = str(error.value)
        assert text.startswith("this table: ")
        assert text.endswith("make it again with `medusa-ext calibrate ... --ngrams`, or remove it")
        assert "\n" not in text
    return True


def test_the_table_to_damage_is_good(tmp_path):
    save_file(good()[0], tmp_path / "good", good()[1])
    table = read_ngrams(tmp_path / "good", "it", V)
    assert {name: getattr(table, name).tolist() for name in ARRAYS} == GOOD
    gains = {(2, 5, 4): 12, (2, 5, 3): 11, (2, 5, 2): 7 - 5, (2, 5, 6): -4 - 5, (5, 2, 5): 9}
    gains |= {
        (9, 2, 5): 10,
        (9, 2, 8): -9,
        (2, 2, 8): -9,
        (2, 1, 5): 0,
        (9, 9, 9): 0,
        (2, 12, 2): 0,
    }
    assert {grams: table.gain(*grams) for grams in gains} == gains


@pytest.mark.parametrize(("change", "words"), DAMAGES)
def test_a_damaged_table(tmp_path, change, words):
    tensors, metadata = change(*good())
    save_file(tensors, tmp_path / NGRAMS_FILE, metadata)
    assert refused(tmp_path / NGRAMS_FILE, words)


def test_files_that_are_no_tables(tmp_path):
    path = tmp_path / NGRAMS_FILE
    save_file(good()[0], path, good()[1])
    whole = path.read_bytes()
    for content in (b"", b"{}", whole[:7], whole[:40], whole[:-1], whole + b"\0", whole[8:]):
        path.write_bytes(content)
        assert refused(path, r"it is no safetensors file \(")
    half = {name: torch.tensor(values, dtype=torch.bfloat16) for name, values in GOOD.items()}
    save_torch(half, path, good()[1])  # of no type that NumPy has
    assert refused(path, "it is no safetensors file|is bfloat16")
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    assert refused(path, "over 16777216 bytes are no table")
    path.unlink()
    for place in (path, tmp_path):
        with pytest.raises(LoadError, match="cannot read this table: "):
            read_ngrams(place, "this table", V)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return util.make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def heads(tmp_path) -> Path:
    """Heads with a table."""
    folder = util.make_heads(tmp_path / "heads", "C")
    save_ngrams(folder / NGRAMS_FILE, table_of_heads())
    return folder


def table_of_heads() -> Ngrams:
    return replace(count_ngrams(random_records(5), V), vocab_size=util.VOCAB)


def found(model: Path, heads: Path | str | None = "auto") -> Ngrams:
    """The table of a model's heads; a warning is an error."""
    table = find_ngrams(open_checkpoint(model, heads))
    assert table is not None
    return table


def test_heads_and_their_table(base, heads):
    assert_same(found(base, heads), table_of_heads())
    shutil.copyfile(heads / NGRAMS_FILE, base / NGRAMS_FILE)  # of nobody
    try:
        assert find_ngrams(open_checkpoint(base)) is None
    finally:
        (base / NGRAMS_FILE).unlink()
    (heads / NGRAMS_FILE).unlink()
    assert find_ngrams(open_checkpoint(base, heads)) is None


def test_a_damaged_one_is_a_warning_and_not_used(base, heads, tmp_path):
    path = heads / NGRAMS_FILE
    save_ngrams(path, replace(table_of_heads(), vocab_size=V))
    checkpoint = open_checkpoint(base, heads)
    with pytest.warns(UserWarning, match="vocab_size is '12', and the model has 320") as caught:
        assert find_ngrams(checkpoint) is None
    (warning,) = caught
    assert str(warning.message).startswith(f"{path}: ")
    assert str(warning.message).endswith("--ngrams`, or remove it; it is not used")
    with pytest.warns(UserWarning, match="vocab_size is '12'"):
        out = export(base, heads, tmp_path / "m.safetensors")
    assert NGRAMS_KEY not in SafetensorsTensors(out).metadata


def test_an_export_keeps_it(base, heads, tmp_path):
    out = export(base, heads, tmp_path / "m.safetensors")
    metadata = SafetensorsTensors(out).metadata
    assert base64.b64decode(metadata[NGRAMS_KEY]) == (heads / NGRAMS_FILE).read_bytes()
    assert_same(found(out), table_of_heads())
    assert find_ngrams(open_checkpoint(out, None)) is None
    again = export(out, "auto", tmp_path / "again.safetensors")
    assert again.read_bytes() == out.read_bytes()
    plain = export(out, None, tmp_path / "plain.safetensors")
    assert NGRAMS_KEY not in SafetensorsTensors(plain).metadata


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no*base64", r"medusa_ext\.ngrams is no base64 \("),
        ("ä", r"medusa_ext\.ngrams is no base64 \("),
        ("", r"medusa_ext\.ngrams: it is no safetensors file"),
        (base64.b64encode(b"abc").decode(), r"medusa_ext\.ngrams: it is no safetensors file"),
    ],
)
def test_a_damaged_one_in_an_export(base, heads, tmp_path, text, words):
    out = export(base, heads, tmp_path / "m.safetensors")
    tensors, metadata = load_file(out), SafetensorsTensors(out).metadata
    save_file(tensors, out, metadata | {NGRAMS_KEY: text})
    checkpoint = open_checkpoint(out)
    with pytest.warns(UserWarning, match=words) as caught:
        assert find_ngrams(checkpoint) is None
    assert str(caught[0].message).startswith(f"{out}: ")
    assert str(caught[0].message).endswith("or remove it; it is not used")


@pytest.mark.filterwarnings("ignore:config.json of the heads says")
@pytest.mark.parametrize("letter", "ABCDEF")
def test_converted_heads_keep_it(base, heads, tmp_path, letter):
    """And nobody takes that of the base model."""
    content = (heads / NGRAMS_FILE).read_bytes()
    model = shutil.copytree(base, tmp_path / "base")
    (model / NGRAMS_FILE).write_bytes(b"of other heads")
    out = convert(heads, tmp_path / "out", letter, base=model)
    assert (out / NGRAMS_FILE).read_bytes() == content
    whole = letter in "DF"
    assert_same(found(out) if whole else found(base, out), table_of_heads())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model that stays behind
        back = convert(out, tmp_path / "back", "B", base=None if whole or letter != "C" else model)
    assert (back / NGRAMS_FILE).read_bytes() == content
    (heads / NGRAMS_FILE).unlink()
    without = convert(heads, tmp_path / "without", letter, base=model)
    assert not list(without.glob("ngrams*"))
