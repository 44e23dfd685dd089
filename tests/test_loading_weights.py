"""Weights of Hugging Face directories: every layout and type, and every way they can be wrong."""

import gc
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import loading_util as util
from medusa_ext import _core
from medusa_ext.loading import LoadError, files, inspect, load_model
from medusa_ext.loading.hf import stored_name

TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def assert_same_weights(loaded, state) -> None:
    """What was recorded equals a state dict bit for bit."""
    for name, values in loaded.model.tensors.items():
        np.testing.assert_array_equal(values.astype(np.float32), state[stored_name(name)].float())


@pytest.fixture
def model(tmp_path) -> Path:
    return util.make_model(tmp_path / "model", tokenizer=False)


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_layout(tmp_path, family, dtype, shards, pickled):
    util.make_model(tmp_path, family, dtype=dtype, shards=shards, pickled=pickled, tokenizer=False)
    state = util.random_state(util.make_config(family), 0, getattr(torch, dtype))
    loaded = util.record(tmp_path)
    short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    assert loaded.stored.dtype == loaded.model.dtype == short
    assert_same_weights(loaded, state)
    assert len(loaded.model.tensors) == len(state)
    del loaded
    gc.collect()
    assert util.mappings_of(tmp_path) == []


@pytest.mark.parametrize(
    ("how", "apart"), [("old", True), ("old", False), ("compressed", False), ("swapped", False)]
)
def test_pickles_that_cannot_be_mapped(tmp_path, monkeypatch, how, apart):
    """They are rewritten to a temporary file, of which nothing is left."""
    folder, temporary = tmp_path / "model", tmp_path / "temporary"
    temporary.mkdir()
    util.make_model(folder, pickled=True, tokenizer=False)
    state = util.random_state(util.make_config(), 0, torch.float32)
    path, plain = folder / "pytorch_model.bin", tmp_path / "plain.bin"
    if how == "old":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(state, plain)
        packing = zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", packing) as target:
            for name in source.namelist():
                content = source.read(name)
                if how == "swapped" and "/data/" in name:
                    content = np.frombuffer(content, np.float32).byteswap().tobytes()
                elif how == "swapped" and name.endswith("/byteorder"):
                    content = {b"little": b"big", b"big": b"little"}[content]
                target.writestr(name, content)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    if apart:
        monkeypatch.delitem(sys.modules, "torch")  # so that a process of its own opens it
    loaded = util.record(folder)
    assert_same_weights(loaded, state)
    assert len(loaded.model.tensors) == len(state)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(LoadError):
        util.record(folder)
    del loaded
    gc.collect()
    assert util.mappings_of(tmp_path) == list(temporary.iterdir()) == []


def test_a_transposed_pickle_is_read_by_value(tmp_path):
    util.make_model(tmp_path, pickled=True, tokenizer=False)
    state = util.random_state(util.make_config(), 0, torch.float32)
    state = {
        name: value.T.contiguous().T if value.ndim == 2 else value for name, value in state.items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_weights(util.record(tmp_path), state)


def test_auto_dtype_is_what_most_bytes_are(tmp_path):
    util.make_model(tmp_path, dtype="bfloat16", tokenizer=False)
    state = util.read_weights(tmp_path)
    mixed = {name: value.float() if value.ndim == 1 else value for name, value in state.items()}
    util.write_weights(tmp_path, mixed)
    loaded = util.record(tmp_path)
    assert loaded.stored.dtype == "bf16"
    assert loaded.model.types["norm.weight"] == "float32"
    assert util.record(tmp_path, dtype="f16").stored.dtype == "f16"
    with pytest.raises(ValueError, match="dtype must be 'auto' or 'bf16' or 'f16' or 'f32'"):
        util.record(tmp_path, dtype="int8")


@pytest.mark.parametrize("copy", ["none", "equal"])
def test_tied_embeddings(tmp_path, copy):
    util.make_model(tmp_path, tie_word_embeddings=True, tokenizer=False)
    state = util.read_weights(tmp_path)
    if copy == "equal":
        util.write_weights(
            tmp_path, state | {"lm_head.weight": state["model.embed_tokens.weight"] + 0}
        )
    loaded = util.record(tmp_path)
    assert "lm_head.weight" not in loaded.model.tensors
    assert loaded.config["tied_embeddings"]


def test_tied_embeddings_stored_as_lm_head_alone(tmp_path):
    util.make_model(tmp_path, tie_word_embeddings=True, tokenizer=False)
    state = util.read_weights(tmp_path)
    matrix = state.pop("model.embed_tokens.weight")
    util.write_weights(tmp_path, state | {"lm_head.weight": matrix})
    np.testing.assert_array_equal(
        util.record(tmp_path).model.tensors["embed_tokens.weight"], matrix
    )


def test_tied_by_config_but_different_in_the_file(tmp_path):
    util.make_model(tmp_path, tie_word_embeddings=True, tokenizer=False)
    state = util.read_weights(tmp_path)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * 2
    util.write_weights(tmp_path, state)
    with pytest.warns(UserWarning, match="not tied"):
        loaded = util.record(tmp_path)
    assert not loaded.config["tied_embeddings"]
    np.testing.assert_array_equal(loaded.model.tensors["lm_head.weight"], state["lm_head.weight"])
    reference = util.reference_model(tmp_path)  # transformers agrees
    np.testing.assert_array_equal(reference.lm_head.weight.detach(), state["lm_head.weight"])


def test_rotary_buffers_of_old_files_are_ignored(model):
    state = util.read_weights(model)
    util.write_weights(
        model, state | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    )
    assert_same_weights(util.record(model), state)


def test_missing_tensor(model):
    state = util.read_weights(model)
    del state["model.layers.1.mlp.up_proj.weight"]
    util.write_weights(model, state)
    with pytest.raises(LoadError) as error:
        util.record(model)
    for part in ("model.safetensors", "model.layers.1.mlp.up_proj.weight", "missing", "[48, 32]"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "extra"]
)
def test_unexpected_tensor(model, name):
    util.write_weights(model, util.read_weights(model) | {name: torch.ones(2, 3)})
    with pytest.raises(LoadError) as error:
        util.record(model)
    for part in ("model.safetensors", name, "unexpected", "[2, 3]"):
        assert part in str(error.value)


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("shape", [(32, 31), (32,), (1, 32, 32), (0, 32)])
def test_wrong_shape(model, shape, pickled):
    name = "model.layers.2.self_attn.o_proj.weight"
    state = util.read_weights(model) | {name: torch.ones(shape)}
    (model / "model.safetensors").unlink()
    util.write_weights(model, state, pickled=pickled)
    with pytest.raises(LoadError) as error:
        util.record(model)
    found = "[" + ", ".join(map(str, shape)) + "]"
    for part in ("model.", name, found, "[32, 32]"):
        assert part in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
def test_type_that_is_not_read(model, dtype, pickled):
    state = util.read_weights(model)
    state["model.norm.weight"] = state["model.norm.weight"].to(dtype)
    (model / "model.safetensors").unlink()
    util.write_weights(model, state, pickled=pickled)
    with pytest.raises(LoadError, match=r"model\.norm\.weight is stored as"):
        util.record(model)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("num_hidden_layers", 4, "layers.3"),
        ("num_hidden_layers", 2, "layers.2"),
        ("vocab_size", 319, "[320, 32]"),
        ("intermediate_size", 96, "[48, 32]"),
        ("num_key_value_heads", 4, "k_proj"),
        ("attention_bias", True, "q_proj.bias"),
        ("model_type", "qwen3", "q_norm"),
        ("tie_word_embeddings", True, None),
    ],
)
def test_config_that_lies(model, key, value, part):
    util.edit_config(model, **{key: value})
    if part is None:  # both matrices are there and differ
        with pytest.warns(UserWarning, match="not tied"):
            util.record(model)
        return
    with pytest.raises(LoadError) as error:
        util.record(model)
    assert part in str(error.value)
    assert str(model) in str(error.value)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
def test_truncated_file(tmp_path, kept, pickled):
    util.make_model(tmp_path, pickled=pickled, tokenizer=False)
    path = tmp_path / ("pytorch_model.bin" if pickled else "model.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(LoadError) as error:
        util.record(tmp_path)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    assert "code" not in str(error.value)
    gc.collect()
    assert util.mappings_of(tmp_path) == []


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{" * 1000,
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 8], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99999999]}}',
        b'{"a": {"shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": 1}',
        b"\xff\xfe",
    ],
)
def test_corrupt_header(model, header):
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(LoadError) as error:
        util.record(model)
    assert str(path) in str(error.value)


def test_shard_that_is_missing_or_lacks_a_tensor(tmp_path):
    util.make_model(tmp_path, shards=3, tokenizer=False)
    index = tmp_path / "model.safetensors.index.json"
    described = json.loads(index.read_text())
    names = list(described["weight_map"])
    util.write_json(
        index,
        {"weight_map": described["weight_map"] | {"ghost": described["weight_map"][names[0]]}},
    )
    with pytest.raises(LoadError, match="ghost is missing"):
        util.record(tmp_path)
    util.write_json(
        index, {"weight_map": described["weight_map"] | {names[0]: "../model.safetensors"}}
    )
    with pytest.raises(LoadError, match="same directory"):
        util.record(tmp_path)
    for broken in ({}, {"weight_map": {}}, {"weight_map": [1]}):
        util.write_json(index, broken)
        with pytest.raises(LoadError, match="weight_map"):
            util.record(tmp_path)
    util.write_json(index, described)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(LoadError, match=r"model-00002-of-00003\.safetensors is missing"):
        util.record(tmp_path)


def test_directory_without_weights(tmp_path):
    util.make_model(tmp_path, tokenizer=False)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"holds no weights; wanted one of model\.safetensors"):
        util.record(tmp_path)


class Bomb:
    """Unpickling this runs code."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickle_that_would_run_code(tmp_path, how):
    util.make_model(tmp_path, pickled=True, tokenizer=False)
    target, path = tmp_path / "it ran", tmp_path / "pytorch_model.bin"
    state = torch.load(path, weights_only=True) | {"bomb": Bomb(target)}
    pickle.loads(pickle.dumps(Bomb(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()  # it would
    if how == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps({"bomb": Bomb(target)}))
    with pytest.raises(LoadError) as error:
        util.record(tmp_path)
    assert path.name in str(error.value)
    if how == "torch":
        assert "mkdir, and code in checkpoints is never run" in str(error.value)
    assert "\n" not in str(error.value)
    assert not target.exists()


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": 1}, torch.ones(2), {"model": {"a": torch.ones(1)}}]
)
def test_pickle_of_something_else(tmp_path, content):
    util.make_model(tmp_path, pickled=True, tokenizer=False)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match="wanted tensors by name"):
        util.record(tmp_path)


def test_pickle_without_torch(tmp_path, monkeypatch):
    util.make_model(tmp_path, pickled=True, tokenizer=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(LoadError, match=r"medusa-ext\[torch\]"):
        util.record(tmp_path)


@pytest.mark.parametrize(
    ("make", "form"),
    [
        (lambda: torch.ones(32, device="meta"), "meta"),
        (lambda: torch.ones(32).to_sparse(), "sparse_coo"),
        (lambda: torch.ones(32, dtype=torch.cfloat).conj(), "conjugated"),
    ],
)
def test_pickled_tensor_without_plain_values(tmp_path, make, form):
    util.make_model(tmp_path, pickled=True, tokenizer=False)
    torch.save({"odd": make()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match=rf"pytorch_model\.bin: tensor odd .*{form}"):
        util.record(tmp_path)


@pytest.mark.parametrize("program", ["false", "echo", "no such program"])
def test_pickle_whose_opener_dies_or_prints_nonsense(tmp_path, monkeypatch, program):
    util.make_model(tmp_path, pickled=True, tokenizer=False)
    monkeypatch.setattr(sys, "executable", shutil.which(program) or str(tmp_path / program))
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(LoadError, match=r"pytorch_model\.bin cannot be read as a checkpoint"):
        util.record(tmp_path)


def test_pickle_that_shrinks_while_it_is_opened(tmp_path, monkeypatch):
    """Every place is checked against what was mapped, element by element."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({}, path)
    size = path.stat().st_size
    for shape, strides, offset, fits in [
        ([2, 3], [3, 1], size - 24, True),
        ([2, 3], [3, 1], size - 23, False),
        ([2, 3], [4, 1], size - 24, False),
        ([2, 0], [4, 1], 0, True),
        ([1], [1], size, False),
        ([1], [1], -1, False),
    ]:
        places = {"a": ["float32", 4, shape, strides, offset]}
        monkeypatch.setattr(files, "_ask_torch", lambda *_, answer=places: answer)
        if fits:
            assert files.PickledTensors(path).read("a", "")[0].shape == tuple(shape)
        else:
            with pytest.raises(LoadError, match="tensor a does not lie inside the file"):
                files.PickledTensors(path)


def test_torch_stays_out_of_this_process(tmp_path):
    """And whatever is called torch in the working directory is not imported."""
    util.make_model(tmp_path, pickled=True, tokenizer=False)
    for name in ("torch", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken from the working directory')")
    code = (
        "import os, sys; from medusa_ext import _core; from medusa_ext.loading import load_model\n"
        "os.chdir(sys.argv[1])\n"
        "load_model('.', backend=_core.Backend(threads=1)); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_the_core_gets_the_same_weights(tmp_path):
    """The real builder, once per family: logits equal those of transformers."""
    tokens = np.random.default_rng(0).integers(0, util.VOCAB, 40)
    for family in util.FAMILIES:
        folder = util.make_model(tmp_path / family, family, shards=2, tokenizer=False)
        model = load_model(folder, backend=_core.Backend(threads=1)).model
        logits = np.full((40, util.VOCAB), np.nan, np.float32)
        _core.score(model, tokens.tolist(), 16, logits, None)
        with torch.no_grad():
            wanted = util.reference_model(folder)(torch.tensor(tokens)[None]).logits[0].numpy()
        # f32 sums of at most 48 products in another order, three layers deep.
        np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max(), rtol=0)


def test_inspect_agrees_with_what_is_loaded(tmp_path):
    for family in util.FAMILIES:
        folder = util.make_model(tmp_path / family, family, dtype="bfloat16", tokenizer=False)
        seen, model = inspect(folder), load_model(folder, backend=_core.Backend(threads=1)).model
        assert seen.weight_bytes == model.weight_bytes
        assert seen.cache_bytes_per_1000_tokens == 1000 * model.kv_bytes_per_token
        assert seen.num_parameters == sum(
            value.numel() for value in util.read_weights(folder).values()
        )
        assert (seen.family, seen.dtype, seen.heads) == (family, "bf16", None)
        json.dumps(seen.to_dict())


def test_importing_the_loader_is_light():
    code = "import sys, medusa_ext.loading; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "transformers", "huggingface_hub", "gguf", "tokenizers"]
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
