"""Records, the rows that heads learn from, and the cache of hidden states."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loading_util import make_model
from medusa_ext import Engine
from medusa_ext.distill.records import Record
from medusa_ext.loading import LoadError, open_checkpoint
from medusa_ext.training import hidden_cache
from medusa_ext.training.data import Data, read_data
from medusa_ext.training.hidden_cache import make_rows, open_hidden_states
from medusa_ext.training.medusa2 import token_labels
from training_util import cycle, make_data, write_records

K = 3


def read(path: Path, **changes: Any) -> Data:
    return read_data([path], **{"vocab_size": 320, "max_context": 64, "held_out": 0.2} | changes)


def good() -> dict[str, Any]:
    return {"input_ids": [3, 4, 5, 6], "assistant_mask": [0, 1, 1, 1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": [3, 4, 320, 6]}, "token 320 is outside the model's vocabulary of 320"),
        ({"input_ids": [3, -1, 4, 5]}, "token -1 is outside"),
        ({"input_ids": [3, 4]}, "0 or 1 for each of the 2 input_ids"),
        ({"input_ids": None}, "input_ids is missing or no list"),
        ({"input_ids": [3, 4.0, 5, 6]}, "input_ids is missing or no list"),
        ({"input_ids": [3, 2**70, 5, 6]}, "beyond 64 bits"),
        ({"assistant_mask": [0, 1, 2, 1]}, "must hold 0 or 1"),
        ({"assistant_mask": "0111"}, "assistant_mask is missing or no list"),
        (
            {"input_ids": [3] * 65, "assistant_mask": [1] * 65},
            r"65 tokens; the model's context holds 64: .* with --max-length",
        ),
    ],
)
def test_bad_records_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in (good(), good() | change)) + "\n")
    with pytest.raises(LoadError, match=rf"data\.jsonl, line 2.*{message}"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"\n\n", "holds no records"),
        (b'{"input_ids": [1', "line 1 is not JSON"),
        (b"[1, 2]", r"line 1 holds \[1, 2\]; wanted a record"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=message):
        read(path)
    with pytest.raises(LoadError, match=r"cannot read .*none\.jsonl"):
        read(tmp_path / "none.jsonl")


def test_records_that_the_model_did_not_write(tmp_path: Path) -> None:
    """They are left out and counted; nothing else is an error that says so."""
    silent = ([5, 6, 7], [0, 0, 0])
    only_first = ([5, 6, 7], [1, 0, 0])  # no position stands before that token
    path = write_records(
        tmp_path / "a.jsonl", [silent, *[(cycle(i, 9), [1] * 9) for i in range(3)]]
    )
    data = read(path)
    assert (len(data.records), data.skipped) == (3, 1)
    path = write_records(tmp_path / "b.jsonl", [silent, only_first])
    with pytest.raises(LoadError, match="0 of 2 records hold a token that the model wrote"):
        read(path)


def test_long_records_are_cut_where_asked(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", [(cycle(i, 90), [1] * 90) for i in range(3)])
    assert {len(record.ids) for record in read(path, max_length=50).records} == {50}
    assert {len(record.ids) for record in read(path, max_length=80).records} == {64}


def test_the_split_stays_when_data_grows(tmp_path: Path) -> None:
    few, many = make_data(tmp_path / "few.jsonl", 40), make_data(tmp_path / "many.jsonl", 60)
    small, large = read(few), read(many)
    assert (small.held_out == large.held_out[:40]).all()
    assert 0 < small.held_out.sum() < 20
    twice = read_data([few, few], vocab_size=320, max_context=64, held_out=0.2)
    assert (twice.held_out[:40] == twice.held_out[40:]).all()
    for share in (1e-9, 1 - 1e-9):  # both parts hold something, however small the share
        assert 0 < read(few, held_out=share).held_out.sum() < 40


def test_frequent_tokens_are_counted_where_the_model_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that are learned from count; prompts and what is set aside do not."""
    rng = np.random.default_rng(2)
    lines = []
    for _ in range(40):
        ids = (rng.integers(0, 20, 12) ** 2 % 320).tolist()
        lines.append((ids, rng.integers(0, 2, 12).tolist()))
    data = read(write_records(tmp_path / "data.jsonl", lines))
    counts = dict.fromkeys(range(320), 0)
    for record, out in zip(data.records, data.held_out, strict=True):
        for token, own in zip(record.ids.tolist(), record.generated.tolist(), strict=True):
            counts[token] += own and not out
    wanted = sorted(counts, key=lambda token: (-counts[token], token))
    assert data.held_out.any()
    assert data.frequent_tokens(320) == wanted
    monkeypatch.setattr("medusa_ext.training.data.DRAFT_TOKENS", 9)
    assert data.frequent_tokens(320) == wanted[:26]  # a twelfth
    monkeypatch.setattr("medusa_ext.training.data.DRAFT_TOKENS", 30)
    assert data.frequent_tokens(320) == wanted[:30]


def test_labels_are_the_tokens_ahead_in_the_same_turn(tmp_path: Path) -> None:
    """Against plain loops, for the rows of the cache and the batches of whole records."""
    rng = np.random.default_rng(2)
    records = []
    for _ in range(30):
        length = int(rng.integers(4, 30))
        turns = np.repeat(rng.integers(0, 2, 8), 4)[:length]
        records.append((rng.integers(3, 320, length).tolist(), turns.tolist()))
    data = read(write_records(tmp_path / "a.jsonl", records))
    rows = make_rows(data)
    at = 0
    for record, out in zip(data.records, data.held_out, strict=True):
        whole = token_labels(record, K)
        for t in range(len(record.ids)):
            expected = []
            for ahead in range(1, K + 2):
                inside = t + ahead < len(record.ids)
                written = inside and record.generated[t + 1 : t + ahead + 1].all()
                expected.append(record.ids[t + ahead] if written else -100)
            assert whole[t].tolist() == expected
            if expected[0] >= 0:
                assert rows.token[at] == expected[0]
                assert rows.labels(np.array([at]), K)[0].tolist() == expected[1:]
                assert (at in rows.usable(held_out=bool(out))) == (expected[1] >= 0)
                assert at not in rows.usable(held_out=not out)
                at += 1
    assert at == len(rows.token)


@pytest.mark.parametrize(("part", "out"), [("to learn from", False), ("set aside", True)])
def test_both_parts_have_something_to_guess(tmp_path: Path, part: str, out: bool) -> None:
    data = read(write_records(tmp_path / "a.jsonl", [(cycle(i, 9), [1] * 9) for i in range(9)]))
    for index in np.flatnonzero(data.held_out == out):
        ids = data.records[index].ids
        data.records[index] = Record(ids, np.arange(9) == 4)
    with pytest.raises(LoadError, match=rf"a\.jsonl: no answer of the records {part} holds two"):
        make_rows(data)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Data]:
    """A model, and data of several shards."""
    monkeypatch.setattr(hidden_cache, "_SHARD_ROWS", 200)
    make_model(tmp_path / "model")
    return tmp_path, read(make_data(tmp_path / "data.jsonl", 30))


def test_hidden_states_are_the_engines(cached: tuple[Path, Data]) -> None:
    folder, data = cached
    states = open_hidden_states(open_checkpoint(folder / "model"), data, folder / "cache")
    rows = make_rows(data)
    assert len(states.shards) > 2
    assert len(states) == len(rows.token)
    with Engine(folder / "model", heads=None, threads=1) as engine:
        expected = [
            engine.score(record.ids.tolist(), return_hidden=True)[1][:-1][record.generated[1:]]
            for record in data.records
        ]
    wanted = torch.from_numpy(np.concatenate(expected)).to(torch.bfloat16)
    order = np.random.default_rng(0).permutation(len(wanted))
    assert torch.equal(states.read(order), wanted[order])


def test_the_cache_goes_on_where_it_was(
    cached: tuple[Path, Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that fails leaves whole shards alone, which are not computed again."""
    folder, data = cached
    checkpoint, cache = open_checkpoint(folder / "model"), folder / "cache"
    sync, done = hidden_cache.write_tensors.__globals__["os"].fsync, []

    def full(descriptor: int) -> None:
        if len(done) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)
        done.append(descriptor)

    monkeypatch.setattr("medusa_ext.training.files.os.fsync", full)
    with pytest.raises(LoadError, match="No space left on device; nothing was left half-written"):
        open_hidden_states(checkpoint, data, cache)
    first = {path: path.stat().st_mtime_ns for path in cache.glob("*") if path.suffix}
    assert len(first) == 1
    assert not list(cache.glob("*.partial"))
    assert not list(cache.glob(".*.partial"))

    monkeypatch.setattr("medusa_ext.training.files.os.fsync", sync)
    computed = []
    open_hidden_states(
        checkpoint, data, cache, progress=lambda done, total: computed.append((done, total))
    )
    assert 0 < len(computed) < len(data.records)
    assert computed[-1][0] == computed[-1][1] < sum(len(one.ids) for one in data.records)
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())

    monkeypatch.setattr(hidden_cache, "load_checkpoint", None)  # nothing is missing now
    open_hidden_states(checkpoint, data, cache)


def test_another_model_has_another_cache(cached: tuple[Path, Data]) -> None:
    folder, data = cached
    cache = folder / "cache"
    open_hidden_states(open_checkpoint(folder / "model"), data, cache)
    before = len(list(cache.glob("*.safetensors")))
    make_model(folder / "other", seed=1)
    open_hidden_states(open_checkpoint(folder / "other"), data, cache)
    assert len(list(cache.glob("*.safetensors"))) == 2 * before
