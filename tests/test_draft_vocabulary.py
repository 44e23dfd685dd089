"""Fewer tokens for heads to choose among: the guesses of all tokens, restricted to these."""

import json
import shutil
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loading_util as util
from calibration_util import calibrated_heads as make_calibrated
from calibration_util import command, make_prompts, with_file, write_lines
from medusa_ext import Engine, _core
from medusa_ext.loading import (
    LoadError,
    blocks,
    convert,
    export,
    inspect,
    load_model,
    open_checkpoint,
)
from medusa_ext.loading.files import SafetensorsTensors
from medusa_ext.loading.head_rows import DRAFT_TOKENS_FILE
from medusa_ext.memory import Guesses, Limits, Sizes, plan

IDS = [7, 300, 2, 45, 44, 160, 9, 201, 33, 250, 18, 77]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return util.make_model(tmp_path / "tiny", intermediate_size=64)  # whole blocks of a GGUF


def heads_with(folder: Path, tokens: object, letter: str = "C") -> Path:
    """Heads with a draft_tokens.json: a list, or text as it stands."""
    util.make_heads(folder, letter)
    text = tokens if isinstance(tokens, str) else json.dumps(tokens)
    (folder / DRAFT_TOKENS_FILE).write_text(text)
    return folder


def model_of(model: Path, heads: Path | str = "auto", **options: object) -> _core.Model:
    return load_model(model, heads, backend=_core.Backend(threads=1), **options).model


def candidates(model: _core.Model, width: int) -> np.ndarray:
    """Of three heads for random hidden states, [3, 50, width]."""
    hidden = np.random.default_rng(5).standard_normal((50, 32)).astype(np.float32)
    ids = np.empty((3, len(hidden), width), np.int32)
    _core.head_candidates(model, hidden, ids, np.empty(ids.shape, np.float32))
    return ids


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_guesses_are_those_of_all_tokens_restricted_to_the_listed(tmp_path, tied, dtype):
    """Bit for bit: a row's product does not depend on the other rows, so the order is the same."""
    base = util.make_model(tmp_path / "model", dtype=dtype, tie_word_embeddings=tied)
    heads = heads_with(tmp_path / "heads", IDS)
    whole = candidates(model_of(base, heads, head_vocab=None), 256)
    found = candidates(model_of(base, heads), len(IDS))
    places = 0
    for all_of_them, few in zip(whole.reshape(-1, 256), found.reshape(-1, len(IDS)), strict=True):
        wanted = all_of_them[np.isin(all_of_them, IDS)]  # the last of 320 are not among 256
        np.testing.assert_array_equal(few[: len(wanted)], wanted)
        places += len(wanted)
        assert sorted(few) == sorted(IDS)
    assert places > 50 * 3 * len(IDS) // 2


@pytest.mark.parametrize("size", [1, 5, 12])
def test_a_number_keeps_the_first_that_are_listed(base, tmp_path, size):
    loaded = util.record(base, heads_with(tmp_path / "heads", IDS), head_vocab=size)
    tensors = loaded.model.tensors
    np.testing.assert_array_equal(tensors["heads.token_map"], IDS[:size])
    np.testing.assert_array_equal(
        tensors["heads.draft_lm_head.weight"], tensors["lm_head.weight"][IDS[:size]]
    )
    assert loaded.config["heads"]["head_vocab"] == loaded.heads_info.head_vocab == size
    assert loaded.config["heads"]["shared_lm_head"]


def test_a_number_beyond_the_list_goes_on_by_id(base, tmp_path):
    """Special tokens first, of which 2 is listed."""
    loaded = util.record(base, heads_with(tmp_path / "heads", IDS), head_vocab=18)
    wanted = [*IDS, 0, 1, 3, 4, 5, 6]
    np.testing.assert_array_equal(loaded.model.tensors["heads.token_map"], wanted)


def test_without_a_list_the_lowest_ids_and_special_tokens(tmp_path):
    model = util.make_model(tmp_path / "model", tokenizer=False)
    util.write_json(model / "generation_config.json", {"eos_token_id": [2, 300]})
    heads = util.make_heads(tmp_path / "heads", "C")
    loaded = util.record(model, heads, head_vocab=6)
    np.testing.assert_array_equal(loaded.model.tensors["heads.token_map"], [2, 300, 0, 1, 3, 4])
    with pytest.raises(LoadError, match=r"the 2 special and added tokens are .* more than 2"):
        util.record(model, heads, head_vocab=2)
    with pytest.raises(LoadError, match="head_vocab is 321; the model's vocabulary has 320"):
        util.record(model, heads, head_vocab=321)


@pytest.mark.parametrize("head_vocab", [None, "auto", 320])
def test_all_tokens(base, tmp_path, head_vocab):
    heads = util.make_heads(tmp_path / "heads", "C")
    if head_vocab is None:
        heads_with(heads, IDS)
    loaded = util.record(base, heads, head_vocab=head_vocab)
    assert loaded.config["heads"]["head_vocab"] == 320
    assert not [name for name in loaded.model.tensors if "draft" in name or "token_map" in name]


def test_lm_heads_of_their_own_lose_rows(base, tmp_path):
    loaded = util.record(base, heads_with(tmp_path / "heads", IDS, "B"))
    np.testing.assert_array_equal(loaded.model.tensors["heads.token_map"], sorted(IDS))
    full = util.random_heads()
    for head in range(3):
        rows = loaded.model.tensors[f"heads.{head}.lm_head.weight"]
        np.testing.assert_array_equal(rows, full[f"{head}.1.weight"][sorted(IDS)])
    assert "heads.draft_lm_head.weight" not in loaded.model.tensors


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_rows_of_a_gguf(base, tmp_path, kind):
    """What the heads get of blocks is what the model has of them."""
    path = util.make_gguf(tmp_path / "model.gguf", base, kind=kind)
    tensors = util.record(path, heads_with(tmp_path / "heads", IDS)).model.tensors
    np.testing.assert_array_equal(
        tensors["heads.draft_lm_head.weight"], tensors["lm_head.weight"][IDS]
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0"])
def test_of_blocks_only_these_rows_are_expanded(base, tmp_path, monkeypatch, kind):
    """Where they cannot stay blocks; an exported file's too, whose rows are chosen among again."""
    path = util.make_gguf(tmp_path / "model.gguf", base, kind=kind)
    heads = heads_with(tmp_path / "heads", IDS)
    checkpoint = open_checkpoint(path, heads)
    *_, copies, _ = checkpoint.entries
    whole = next(entry for entry in checkpoint.entries if entry.name == "lm_head.weight")
    wanted = {dtype: whole.read(dtype)[0][IDS] for dtype in ("f32", "bf16")}
    seen = []
    for module, name in ((gguf, "dequantize"), (blocks, "dequantise")):
        real = getattr(module, name)

        def counted(*arguments: object, real=real) -> np.ndarray:
            values = real(*arguments)
            seen.append(len(values))
            return values

        monkeypatch.setattr(module, name, counted)
    assert copies.name == "heads.draft_lm_head.weight"
    for dtype, values in wanted.items():
        np.testing.assert_array_equal(copies.read(dtype)[0], values)
    assert seen == [len(IDS)] * 2
    seen.clear()
    if kind == "Q5_0":  # exported as bf16
        return
    out = export(path, heads, tmp_path / "few.safetensors")
    few = next(
        entry for entry in open_checkpoint(out, head_vocab=4).entries if "draft" in entry.name
    )
    np.testing.assert_array_equal(few.read("f32")[0], wanted["f32"][:4])
    assert seen == [4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("{}", "is no list of token ids"),
        ("[]", "is no list of token ids"),
        ("[1, 320]", "element 1 is 320; wanted an id of the vocabulary, 0 to 319"),
        ("[-1]", "element 0 is -1"),
        ("[1, true]", "element 1 is true"),
        ("[1.0]", "element 0 is 1.0"),
        ('["a"]', 'element 0 is "a"'),
        ("[NaN]", "element 0 is NaN"),
        ("[5, 6, 5]", "names a token twice"),
        ("[1]" + " " * (16 << 20), "has over 16777216 bytes"),
    ],
)
def test_a_bad_list_is_a_warning_and_not_used(base, tmp_path, text, message):
    heads = heads_with(tmp_path / "heads", text)
    with pytest.warns(UserWarning, match=message) as caught:
        loaded = util.record(base, heads)
    assert str(caught[0].message).startswith(str(heads / DRAFT_TOKENS_FILE))
    assert str(caught[0].message).endswith("make it again, or remove it; it is not used")
    assert loaded.config["heads"]["head_vocab"] == 320
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        util.record(base, heads, head_vocab=None)  # nobody asks


def test_bytes_that_are_no_text(base, tmp_path):
    heads = heads_with(tmp_path / "heads", "")
    (heads / DRAFT_TOKENS_FILE).write_bytes(b"[1, \xff]")
    with pytest.warns(UserWarning, match="is no JSON"):
        util.record(base, heads)


def test_the_output_stays_the_same(base, tmp_path):
    heads = heads_with(tmp_path / "heads", IDS)
    prompts = make_prompts(6, seed=4)
    made, steps = [], []
    for options in ({"heads": None}, {"heads": heads}, {"heads": heads, "head_vocab": None}):
        with Engine(base, **options, threads=1, max_batch=3, max_context=128) as engine:
            for sampling in ({}, {"temperature": 1.0, "seed": 3}):
                results = engine.generate(prompts, max_new_tokens=60, **sampling)
                made.append([result.token_ids for result in results])
                steps.append(sum(result.stats.steps for result in results))
    assert made[::2] == [made[0]] * 3
    assert made[1::2] == [made[1]] * 3
    assert steps[2] < steps[0]  # some guesses were right


def test_what_is_not_listed_is_never_guessed_right(base, tmp_path):
    """With one token to guess, a step keeps more than one token only where it is that one."""
    prompts = make_prompts(8, seed=4)
    with Engine(base, None, threads=1) as engine:
        texts = [result.token_ids for result in engine.generate(prompts, max_new_tokens=100)]
    used = {token for text in texts for token in text}
    absent = next(token for token in range(320) if token not in used)
    common = max(used, key=lambda token: sum(text.count(token) for text in texts))
    steps = {}
    for token in (absent, common):
        heads = heads_with(tmp_path / f"heads{token}", [token])
        with Engine(base, heads, tree=[[0]], threads=1) as engine:
            results = engine.generate(prompts, max_new_tokens=100)
        assert [result.token_ids for result in results] == texts
        steps[token] = sum(result.stats.steps for result in results)
    assert steps[absent] == sum(map(len, texts))
    assert steps[common] < steps[absent]


def test_an_export_keeps_them(base, tmp_path):
    heads = heads_with(tmp_path / "heads", IDS)
    path = export(base, heads, tmp_path / "few.safetensors")
    real = _core.load_model(str(path), "f32", _core.Backend(threads=1))
    assert json.loads(real.config)["heads"]["head_vocab"] == len(IDS)
    np.testing.assert_array_equal(candidates(real, 5), candidates(model_of(base, heads), 5))
    for model in (model_of(path), model_of(path, head_vocab=40)):  # no more than there are
        np.testing.assert_array_equal(candidates(model, 5), candidates(real, 5))
    few = util.record(path, head_vocab=4)
    np.testing.assert_array_equal(few.model.tensors["heads.token_map"], IDS[:4])
    np.testing.assert_array_equal(
        few.model.tensors["heads.draft_lm_head.weight"],
        few.model.tensors["lm_head.weight"][IDS[:4]],
    )
    whole = util.record(path, head_vocab=None)
    assert whole.config["heads"]["head_vocab"] == 320
    assert "heads.draft_lm_head.weight" not in whole.model.tensors
    again = export(path, "auto", tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("letter", ["B", "C"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids.astype(np.float32), "stored as f32; wanted i32"),
        (lambda ids: ids.astype(np.int64), "stored as i64; wanted i32"),
        (lambda ids: ids.reshape(3, 4), r"has shape \[3, 4\], wanted \[12\]"),
        (lambda ids: ids[:-1], r"has shape \[11\], wanted \[12\]"),
        (lambda _: None, r"missing; wanted shape \[12\]"),
        (lambda ids: np.where(ids == 7, 320, ids), "holds 320; wanted ids of .* 0 to 319"),
        (lambda ids: np.where(ids == 7, -1, ids), "holds -1; wanted ids of .* 0 to 319"),
        (lambda ids: np.where(ids == 7, 300, ids), "names a token twice"),
    ],
)
def test_an_export_whose_ids_are_damaged(base, tmp_path, letter, change, message):
    """One line that names the file and the tensor, whatever is asked for."""
    heads = heads_with(tmp_path / "heads", IDS, letter)
    path = export(base, heads, tmp_path / "bad.safetensors")
    tensors, metadata = load_file(path), SafetensorsTensors(path).metadata
    ids = change(tensors.pop("heads.token_map").astype(np.int32))
    save_file(tensors if ids is None else tensors | {"heads.token_map": ids}, path, metadata)
    for head_vocab in ("auto", 4, 40):
        with pytest.raises(LoadError, match=message) as error:
            open_checkpoint(path, head_vocab=head_vocab)
        assert str(error.value).startswith(f"{path}: tensor heads.token_map ")
        assert "\n" not in str(error.value)


def test_memory_and_inspection(base, tmp_path):
    heads = heads_with(tmp_path / "heads", IDS)
    few, whole = (inspect(base, heads, head_vocab=value) for value in ("auto", None))
    assert few.weight_bytes - whole.weight_bytes == len(IDS) * (32 * 4 + 4)
    assert few.num_parameters == whole.num_parameters
    assert {**few.stored_types, "i32": 0} == {**whole.stored_types, "i32": 0}
    assert few.weight_bytes <= model_of(base, heads).weight_bytes
    limits = Limits(max_batch=2).within(128)
    sizes = [
        Sizes(found, "cpu", found.stored(dtype="f32"), limits, Guesses(4, 3))
        for found in (open_checkpoint(base, heads, head_vocab=value) for value in ("auto", None))
    ]
    saved = plan(sizes[1]).workspace - plan(sizes[0]).workspace
    assert saved == 2 * 3 * 4 * (320 - len(IDS))


def test_calibration_is_of_what_will_be_guessed(tmp_path, tmp_path_factory):
    """Tokens that are not listed are no head's candidate."""
    calibrated = make_calibrated(tmp_path_factory.getbasetemp())
    heads = with_file(calibrated, tmp_path / "heads")
    whole = sum(calibrated.content["heads"][0])
    texts = [json.loads(line) for line in calibrated.data.read_text().splitlines()]
    counts = np.bincount([token for text in texts for token in text["input_ids"]])
    listed = np.argsort(-counts, kind="stable")[:20].tolist()
    write_lines(heads / DRAFT_TOKENS_FILE, [listed])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens, and of the tree that no longer fits
        assert command(calibrated, heads, "--data", calibrated.data, "--nodes", 4) == 0
    content = json.loads((heads / "calibration.json").read_text())
    assert max(rank for path in content["tree"] for rank in path) < 20
    assert 0.05 < sum(content["heads"][0]) < whole


def test_converted_heads_keep_the_list(base, tmp_path):
    heads = heads_with(tmp_path / "heads", IDS)
    out = convert(heads, tmp_path / "out", "E", base=base)
    assert json.loads((out / DRAFT_TOKENS_FILE).read_text()) == IDS
    shutil.rmtree(out)
    (base / DRAFT_TOKENS_FILE).write_text("[3]")  # of other heads
    (heads / DRAFT_TOKENS_FILE).unlink()
    out = convert(heads, tmp_path / "out", "D", base=base)
    assert not (out / DRAFT_TOKENS_FILE).exists()


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "many", "", [4], np.zeros(2)])
def test_head_vocab_that_is_no_number(base, value):
    wanted = 'head_vocab must be "auto", None or an integer of 1 or more, got'
    for call in (
        lambda: open_checkpoint(base, head_vocab=value),
        lambda: Engine(base, head_vocab=value),
    ):
        with pytest.raises(ValueError, match=wanted):
            call()


def test_the_builder_wants_both_or_none(base, tmp_path):
    """The copies and their ids, where the configuration says so."""
    loaded = util.record(base, heads_with(tmp_path / "heads", IDS))
    config = loaded.config

    def build(head_vocab: int, without: tuple[str, ...]) -> str:
        wanted = config | {"heads": config["heads"] | {"head_vocab": head_vocab}}
        builder = _core.ModelBuilder(json.dumps(wanted), "f32", _core.Backend(threads=1))
        for name, value in loaded.model.tensors.items():
            if name not in without:
                builder.add(name, value)
        return builder.finish().config

    both = ("heads.draft_lm_head.weight", "heads.token_map")
    assert json.loads(build(len(IDS), ()))["heads"]["head_vocab"] == len(IDS)
    for whole in (0, 320):
        build(whole, both)
        with pytest.raises(ValueError, match="no place for it"):
            build(whole, ())
    for name in both:
        with pytest.raises(ValueError, match=f"1 tensors are missing: {name}"):
            build(len(IDS), (name,))
    with pytest.raises(ValueError, match="found shape"):
        build(len(IDS) - 1, ())
    for size in (-1, 321):
        with pytest.raises(ValueError, match=f"head_vocab: found {size}, wanted 0 to 320"):
            build(size, both)
