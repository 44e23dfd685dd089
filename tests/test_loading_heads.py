"""Medusa heads in formats A to F, with every trap that published files set."""

import json
import os
import pickle
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

import loading_util as util
from medusa_ext import _core
from medusa_ext.loading import LoadError, export, inspect, load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return util.make_model(tmp_path_factory.mktemp("base"), tokenizer=False)


@pytest.fixture
def make(tmp_path, base):
    """`make(letter, **options)` -> (model, heads) to load: D and F are one directory."""

    def build(letter: str, **options):
        folder = util.make_heads(tmp_path / letter, letter, base=base, **options)
        return (folder, "auto") if letter in "DF" else (base, folder)

    return build


def weights_file(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt"))


def edit(folder: Path, change) -> None:
    """Rewrite the weights as `change(state)` leaves them."""
    path = weights_file(folder)
    pickled = path.suffix == ".pt"
    state = torch.load(path, weights_only=True) if pickled else load_file(path)
    change(state)
    (torch.save if pickled else save_file)(state, path)


def folder_of(pair) -> Path:
    model, heads = pair
    return model if heads == "auto" else heads


def name_in(letter: str, name: str) -> str:
    """A tensor in the original spelling, as this format spells it."""
    prefix = {"D": "medusa_head.", "F": "medusa_heads."}.get(letter, "")
    return util.vllm_name(name) if letter == "E" else prefix + name


def assert_heads(loaded, state, num_heads: int, num_layers: int) -> None:
    """Every head tensor equals its source; nothing more, nothing less."""
    own = f"0.{num_layers}.weight" in state
    wanted = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            source = f"{head}.{layer}.linear."
            wanted[f"heads.{head}.{layer}.weight"] = state[source + "weight"]
            zeros = torch.zeros(util.make_config()["hidden_size"])
            wanted[f"heads.{head}.{layer}.bias"] = state.get(source + "bias", zeros)
        if own:
            wanted[f"heads.{head}.lm_head.weight"] = state[f"{head}.{num_layers}.weight"]
    found = {
        name: value for name, value in loaded.model.tensors.items() if name.startswith("heads.")
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value.float())
    info, config = loaded.heads_info, loaded.config["heads"]
    assert (info.num_heads, info.num_layers) == (num_heads, num_layers)
    assert (config["num_heads"], config["num_layers"]) == (num_heads, num_layers)
    assert info.shared_lm_head == config["shared_lm_head"] == (not own)


@pytest.mark.parametrize("num_layers", [0, 1, 2])
@pytest.mark.parametrize("num_heads", [1, 5])
@pytest.mark.parametrize("letter", "ABCDEF")
def test_every_format(make, letter, num_heads, num_layers):
    if letter == "C" and num_layers == 0:
        pytest.skip("heads of format C without layers hold nothing at all")
    pair = make(letter, num_heads=num_heads, num_layers=num_layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = util.record(*pair)
    state = util.random_heads(
        num_heads=num_heads, num_layers=num_layers, own_lm_head=letter != "C", bias=letter != "E"
    )
    assert_heads(loaded, state, num_heads, num_layers)
    assert loaded.heads_info.format == letter
    assert loaded.heads_info.path == folder_of(pair)


@pytest.mark.parametrize("letter", "ABCDEF")
def test_the_core_takes_them(make, letter):
    pair = make(letter)
    loaded = load_model(*pair, backend=_core.Backend(threads=1))
    assert json.loads(loaded.model.config)["heads"]["num_heads"] == 3
    seen = inspect(*pair)
    assert seen.heads == loaded.heads_info
    assert seen.weight_bytes == loaded.model.weight_bytes
    tree = _core.TreeSpec.from_paths([[0], [1], [0, 0], [0, 0, 0]])
    _core.medusa_drafter(loaded.model, tree)


@pytest.mark.parametrize("letter", "AB")
def test_heads_that_share_the_lm_head_are_format_c(make, letter):
    loaded = util.record(*make(letter, own_lm_head=False))
    assert loaded.heads_info.format == "C"
    assert loaded.config["heads"]["shared_lm_head"]


def test_shared_heads_copy_nothing(make):
    model, heads = make("C", num_heads=4)
    plain, shared = inspect(model, None), inspect(model, heads)
    assert shared.weight_bytes - plain.weight_bytes == 4 * (32 * 32 + 32) * 4


def test_heads_are_left_out_on_request(make):
    model, _ = make("D")
    assert util.record(model, None).heads_info is None
    assert not any(name.startswith("heads.") for name in util.record(model, None).model.tensors)
    assert util.record(model, "prompt-lookup").config["heads"]["num_heads"] == 0


def test_a_whole_model_may_serve_as_heads_for_another(make, base):
    folder, _ = make("D")
    assert util.record(base, folder).heads_info.format == "D"


def test_model_without_heads(base):
    assert util.record(base, "auto").heads_info is None
    with pytest.raises(LoadError, match="holds no Medusa heads"):
        util.record(base, base)


@pytest.mark.parametrize("letter", "ABCDEF")
@pytest.mark.parametrize("what", ["heads", "layers"])
def test_config_that_lies_about_counts_is_a_warning(make, letter, what):
    pair = make(letter, num_heads=5, num_layers=1)
    folder = folder_of(pair)
    if letter == "F":
        inner = {"num_medusa_heads": 5, "num_medusa_layers": 1} | {f"num_medusa_{what}": 2}
        util.edit_config(folder, medusa=inner)
    else:
        key = {"heads": "num_heads", "layers": "num_hidden_layers"}[what]
        util.edit_config(folder, **{key if letter == "E" else f"medusa_num_{what}": 2})
    with pytest.warns(UserWarning, match=f"announces 2 Medusa {what}, the weights hold"):
        loaded = util.record(*pair)
    assert (loaded.heads_info.num_heads, loaded.heads_info.num_layers) == (5, 1)


def test_config_that_announces_heads_the_weights_lack(base, tmp_path):
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    util.edit_config(tmp_path, medusa_num_heads=3)
    with pytest.warns(UserWarning, match="announces 3 Medusa heads, but the weights hold none"):
        assert util.record(tmp_path).heads_info is None


@pytest.mark.parametrize("letter", "AB")
def test_heads_without_a_config(make, letter):
    pair = make(letter)
    (folder_of(pair) / "config.json").unlink()
    assert util.record(*pair).heads_info.num_heads == 3


@pytest.mark.parametrize("letter", "ABCDEF")
def test_heads_for_another_hidden_size(make, letter):
    with pytest.raises(LoadError) as error:
        util.record(*make(letter, hidden=48))
    assert "hidden size 48" in str(error.value)
    assert "the model has 32" in str(error.value)


@pytest.mark.parametrize("letter", "ABDF")
def test_heads_for_another_vocabulary(make, letter):
    with pytest.raises(LoadError) as error:
        util.record(*make(letter, vocab=300))
    assert "[300, 32], wanted [320, 32]" in str(error.value)


@pytest.mark.parametrize("letter", "ABCDEF")
@pytest.mark.parametrize("name", ["1.0.linear.weight", "1.0.linear.bias", "1.1.weight"])
def test_missing_tensor(make, letter, name):
    if (letter, name) in (("C", "1.1.weight"), ("E", "1.0.linear.bias")):
        pytest.skip("this format has no such tensor")
    pair = make(letter)
    folder = folder_of(pair)
    edit(folder, lambda state: state.pop(name_in(letter, name)))
    with pytest.raises(LoadError) as error:
        util.record(*pair)
    assert "missing" in str(error.value)
    assert str(folder) in str(error.value)
    assert name_in(letter, name) in str(error.value)


def test_missing_head_in_the_middle(make):
    pair = make("B", num_heads=3)

    def drop(state):
        for name in [name for name in state if name.startswith("1.")]:
            del state[name]

    edit(folder_of(pair), drop)
    with pytest.raises(
        LoadError, match=r"1\.0\.linear\.weight is missing; wanted shape \[32, 32\]"
    ):
        util.record(*pair)


@pytest.mark.parametrize("letter", "ABCDEF")
@pytest.mark.parametrize(
    ("name", "shape"),
    [("2.0.linear.weight", (32, 31)), ("2.0.linear.bias", (1, 32)), ("2.1.weight", (320, 31))],
)
def test_wrong_shape(make, letter, name, shape):
    if (letter, name) in (("C", "2.1.weight"), ("E", "2.0.linear.bias")):
        pytest.skip("this format has no such tensor")
    pair = make(letter)
    stored = name_in(letter, name)
    edit(folder_of(pair), lambda state: state.update({stored: torch.ones(shape)}))
    with pytest.raises(LoadError) as error:
        util.record(*pair)
    text = str(error.value)
    assert stored in text
    assert "wanted" in text
    assert str(weights_file(folder_of(pair))) in text


@pytest.mark.parametrize("letter", "ABCDEF")
@pytest.mark.parametrize("name", ["0.0.linear.scale", "0.0.0.weight", "x.0.linear.weight"])
def test_surplus_tensor(make, letter, name):
    pair = make(letter)
    stored = {"D": "medusa_head.", "F": "medusa_heads."}.get(letter, "") + name
    edit(folder_of(pair), lambda state: state.update({stored: torch.ones(3)}))
    with pytest.raises(LoadError) as error:
        util.record(*pair)
    assert stored in str(error.value)
    assert "[3]" in str(error.value)


def test_projection_of_another_depth(make):
    pair = make("B", num_layers=2)
    edit(folder_of(pair), lambda state: state.update({"1.1.weight": state.pop("1.2.weight")}))
    with pytest.raises(LoadError, match=r"1\.1\.weight is out of place; wanted 1\.2\.weight"):
        util.record(*pair)


@pytest.mark.parametrize(
    ("letter", "name"),
    [
        ("B", "99999999.0.linear.weight"),  # no such head
        ("B", "00.0.linear.weight"),  # a second spelling of head 0
        ("B", "0.0.weight"),  # a second projection of head 0
        ("E", "lm_head.weight"),
        ("E", "lm_heads.weight"),
    ],
)
def test_names_that_are_out_of_place(make, letter, name):
    pair = make(letter)
    edit(folder_of(pair), lambda state: state.update({name: torch.ones(32, 32)}))
    with pytest.raises(LoadError) as error:
        util.record(*pair)
    assert "is no part of Medusa heads" in str(error.value)


@pytest.mark.parametrize("letter", "AB")
@pytest.mark.parametrize("kept", [0, 8, 0.5, 0.99])
def test_truncated(make, letter, kept):
    pair = make(letter)
    path = weights_file(folder_of(pair))
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(LoadError) as error:
        util.record(*pair)
    assert path.name in str(error.value)


def test_pickle_that_would_run_code(make, tmp_path):
    pair = make("A")
    target = tmp_path / "it ran"

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(target),))

    weights_file(folder_of(pair)).write_bytes(pickle.dumps({"0.0.linear.weight": Bomb()}))
    with pytest.raises(LoadError, match=r"medusa_lm_head\.pt"):
        util.record(*pair)
    assert not target.exists()


@pytest.mark.parametrize("suffix", ["linear.input_scale", "linear.weight_scale"])
def test_fp8_heads_are_refused(make, suffix):
    pair = make("F")
    edit(folder_of(pair), lambda state: state.update({f"medusa_heads.0.0.{suffix}": torch.ones(1)}))
    with pytest.raises(LoadError, match="FP8"):
        util.record(*pair)


def test_fp8_weights_are_refused(make):
    pair = make("F")
    name = "medusa_heads.0.0.linear.weight"
    edit(folder_of(pair), lambda state: state.update({name: state[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(LoadError, match="FP8"):
        util.record(*pair)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("letter", "AB")
def test_types_of_heads(make, letter, dtype):
    loaded = util.record(*make(letter, dtype=dtype))
    assert_heads(loaded, util.random_heads(dtype=dtype), 3, 1)
    assert loaded.stored.dtype == "f32"  # the base model's


# Format E alone


def test_e_with_biases(make):
    assert_heads(util.record(*make("E", bias=True)), util.random_heads(bias=True), 3, 1)


def test_e_announced_biases_that_are_missing(make):
    pair = make("E")
    util.edit_config(folder_of(pair), medusa_fc_bias=True)
    with pytest.raises(LoadError, match="bias is missing"):
        util.record(*pair)


def test_e_with_a_prefix(make):
    loaded = util.record(*make("E", prefix="medusa_heads."))
    assert_heads(loaded, util.random_heads(bias=False), 3, 1)


def test_e_original_lm_head_is_shared(make):
    pair = make("E")
    util.edit_config(folder_of(pair), original_lm_head=True)

    def keep_first(state):
        del state["lm_heads.1.weight"], state["lm_heads.2.weight"]

    edit(folder_of(pair), keep_first)
    loaded = util.record(*pair)
    assert loaded.config["heads"]["shared_lm_head"]
    assert not any("lm_head" in name for name in loaded.model.tensors if name.startswith("heads."))
    edit(folder_of(pair), lambda state: state.pop("lm_heads.0.weight"))
    assert util.record(*pair).config["heads"]["shared_lm_head"]
    util.edit_config(folder_of(pair), original_lm_head=False)
    with pytest.raises(LoadError, match=r"lm_heads\.0\.weight is missing"):
        util.record(*pair)


IDS = torch.tensor([5, 3, 319, 0, 100])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_e_truncated_vocabulary(make, cut, original, dtype):
    """Rows of the projections are cut to token_map, whether the file did so already or not."""
    pair = make("E")
    full = util.random_heads(bias=False)

    def change(state):
        state["token_map"] = IDS.to(dtype)
        for head in range(3):
            if original and head:
                del state[f"lm_heads.{head}.weight"]
            elif cut:
                state[f"lm_heads.{head}.weight"] = state[f"lm_heads.{head}.weight"][IDS].clone()

    edit(folder_of(pair), change)
    util.edit_config(folder_of(pair), truncated_vocab_size=5, original_lm_head=original)
    loaded = util.record(*pair)
    assert loaded.config["heads"]["head_vocab"] == loaded.heads_info.head_vocab == 5
    np.testing.assert_array_equal(loaded.model.tensors["heads.token_map"], IDS)
    assert loaded.model.tensors["heads.token_map"].dtype == np.int32
    for head in range(3):
        wanted = full[f"{0 if original else head}.1.weight"][IDS]
        np.testing.assert_array_equal(loaded.model.tensors[f"heads.{head}.lm_head.weight"], wanted)
    real = load_model(*pair, backend=_core.Backend(threads=1))
    assert inspect(*pair).weight_bytes <= real.model.weight_bytes  # which pads 5 rows


def test_e_truncated_without_a_map_means_the_first_ids(make):
    pair = make("E", vocab=7)
    loaded = util.record(*pair)
    np.testing.assert_array_equal(loaded.model.tensors["heads.token_map"], np.arange(7))


def test_e_map_of_the_whole_vocabulary_is_no_map(make):
    pair = make("E")
    edit(folder_of(pair), lambda state: state.update(token_map=torch.arange(320).flip(0)))
    assert_heads(util.record(*pair), util.random_heads(bias=False), 3, 1)


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([1, 1]),
        torch.tensor([-1, 2]),
        torch.tensor([320, 2]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([1.0, 2.0]),
        torch.tensor([[1, 2]]),
    ],
)
def test_e_bad_map(make, ids):
    pair = make("E")
    edit(folder_of(pair), lambda state: state.update(token_map=ids))
    with pytest.raises(LoadError, match="token_map"):
        util.record(*pair)


def test_e_map_that_does_not_fit_the_rows(make):
    pair = make("E", vocab=7)
    edit(folder_of(pair), lambda state: state.update(token_map=torch.arange(9)))
    with pytest.raises(LoadError, match="has 7 rows, token_map has 9"):
        util.record(*pair)


def test_e_larger_vocabulary_than_the_model(make):
    with pytest.raises(LoadError, match="guess 321 tokens, the model's vocabulary has 320"):
        util.record(*make("E", vocab=321))


def test_heads_given_as_a_file_or_nowhere(base, tmp_path):
    path = tmp_path / "heads.safetensors"
    path.touch()
    with pytest.raises(LoadError, match="is a file; give a directory"):
        util.record(base, path)
    with pytest.raises(LoadError, match="no such path"):
        util.record(base, tmp_path / "nowhere")
    with pytest.raises(LoadError, match="holds no Medusa heads; wanted medusa_lm_head"):
        util.record(base, tmp_path)


def test_published_initialisation(make):
    """A is zero at initialisation, b is not: the block is not the identity, and b must be kept."""
    pair = make("B")

    def initialise(state):
        for name in state:
            if name.endswith("linear.weight"):
                state[name].zero_()

    edit(folder_of(pair), initialise)
    tensors = util.record(*pair).model.tensors
    stored = load_numpy(weights_file(folder_of(pair)))
    assert not tensors["heads.0.0.weight"].any()
    np.testing.assert_array_equal(tensors["heads.0.0.bias"], stored["0.0.linear.bias"])


# head_vocab: fewer rows of each head's own lm_head


def kept_ids(size: int, *always: int) -> list[int]:
    """The lowest ids beside those that are always kept."""
    others = [token for token in range(util.VOCAB) if token not in always]
    return sorted([*always, *others[: size - len(always)]])


@pytest.mark.parametrize("letter", "ABDEF")
def test_head_vocab_keeps_the_lowest_ids(make, letter):
    model, heads = make(letter)
    loaded = util.record(model, heads, head_vocab=40)
    full = util.random_heads(bias=letter != "E")
    wanted = kept_ids(40, 2)
    np.testing.assert_array_equal(loaded.model.tensors["heads.token_map"], wanted)
    assert loaded.model.tensors["heads.token_map"].dtype == np.int32
    for head in range(3):
        rows = loaded.model.tensors[f"heads.{head}.lm_head.weight"]
        np.testing.assert_array_equal(rows, full[f"{head}.1.weight"][wanted])
        block = loaded.model.tensors[f"heads.{head}.0.weight"]
        np.testing.assert_array_equal(block, full[f"{head}.0.linear.weight"])
    assert loaded.config["heads"]["head_vocab"] == loaded.heads_info.head_vocab == 40
    real = load_model(model, heads, head_vocab=40, backend=_core.Backend(threads=1))
    whole = load_model(model, heads, backend=_core.Backend(threads=1))
    assert real.model.weight_bytes <= whole.model.weight_bytes - 3 * (320 - 64) * 32 * 4
    saved = inspect(model, heads).weight_bytes - inspect(model, heads, head_vocab=40).weight_bytes
    assert saved == 3 * (320 - 40) * 32 * 4 - 40 * 4


def test_head_vocab_keeps_special_tokens_and_ends(tmp_path):
    """However rare: what ends a text, special tokens, and added ones that are not special."""
    model = util.make_model(tmp_path / "model", tokenizer=False)
    util.write_json(model / "generation_config.json", {"eos_token_id": [2, 300]})
    tokenizer = util.make_tokenizer()
    special, added = tokenizer.convert_ids_to_tokens([311, 305])
    tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    tokenizer.add_tokens([added])
    assert len(tokenizer) == util.VOCAB
    tokenizer.save_pretrained(model)
    heads = util.make_heads(tmp_path / "heads", "B")
    loaded = util.record(model, heads, head_vocab=8)
    wanted = kept_ids(8, 0, 1, 2, 300, 305, 311)
    np.testing.assert_array_equal(loaded.model.tensors["heads.token_map"], wanted)
    with pytest.raises(LoadError, match=r"6 special and added tokens are .* more than 6"):
        util.record(model, heads, head_vocab=6)


@pytest.mark.parametrize("size", [3, 4, 5, 200, 320])
def test_head_vocab_of_heads_that_were_cut_before(make, size):
    """It counts the rows that there are: a larger number changes nothing."""
    pair = make("E")

    def change(state):
        state["token_map"] = IDS

    edit(folder_of(pair), change)
    util.edit_config(folder_of(pair), truncated_vocab_size=5)
    loaded = util.record(*pair, head_vocab=size)
    wanted = {3: [5, 3, 0], 4: [5, 3, 0, 100]}.get(size, IDS.tolist())  # in the order of the rows
    full = util.random_heads(bias=False)
    np.testing.assert_array_equal(loaded.model.tensors["heads.token_map"], wanted)
    for head in range(3):
        rows = loaded.model.tensors[f"heads.{head}.lm_head.weight"]
        np.testing.assert_array_equal(rows, full[f"{head}.1.weight"][wanted])


def test_head_vocab_of_the_whole_vocabulary_changes_nothing(make):
    loaded = util.record(*make("B"), head_vocab=util.VOCAB)
    assert_heads(loaded, util.random_heads(), 3, 1)


def test_head_vocab_that_is_impossible(make, base):
    with pytest.raises(LoadError, match="head_vocab is 321; the model's vocabulary has 320 tokens"):
        util.record(*make("B"), head_vocab=321)
    with pytest.raises(LoadError, match=r"1 special and added tokens .* so give more than 1"):
        util.record(*make("A"), head_vocab=1)
    for heads in (None, "auto", "prompt-lookup"):
        with pytest.raises(LoadError, match="head_vocab 100 needs Medusa heads, and there are no"):
            util.record(base, heads, head_vocab=100)


@pytest.mark.parametrize("letter", "AB")
def test_head_vocab_reads_the_rows_it_keeps_alone(tmp_path, letter):
    """No copy of a whole lm_head is made: NumPy's memory stays below one."""
    vocab = 20_000
    model = util.make_model(tmp_path / "model", tokenizer=False, vocab_size=vocab)
    heads = util.make_heads(tmp_path / "heads", letter, vocab=vocab)
    backend = _core.Backend(threads=1)
    load_model(model, heads, backend=backend)  # imports
    tracemalloc.start()
    try:
        load_model(model, heads, head_vocab=500, backend=backend)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < vocab * 32 * 4


def test_head_vocab_survives_an_export(make, tmp_path):
    """The file holds the rows that were kept; a second cut keeps some of them."""
    model, heads = make("B")
    path = export(model, heads, tmp_path / "cut.safetensors", head_vocab=60)
    loaded = util.record(path)
    np.testing.assert_array_equal(loaded.model.tensors["heads.token_map"], kept_ids(60, 2))
    again = util.record(path, head_vocab=30)
    np.testing.assert_array_equal(again.model.tensors["heads.token_map"], kept_ids(30, 2))
    full = util.random_heads()
    for head in range(3):
        rows = again.model.tensors[f"heads.{head}.lm_head.weight"]
        np.testing.assert_array_equal(rows, full[f"{head}.1.weight"][kept_ids(30, 2)])
