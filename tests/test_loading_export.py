"""The one-file form: written, read back by Python and by C++, and refused where it is damaged."""

import errno
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import loading_util as util
from medusa_ext import _core
from medusa_ext.loading import LoadError, export, inspect, load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return util.make_model(tmp_path_factory.mktemp("base"), "qwen2", dtype="bfloat16")


def test_reading_it_back_changes_nothing(base, tmp_path):
    out = export(base, None, tmp_path / "m.safetensors")
    before, after = util.record(base), util.record(out)
    assert after.config == before.config
    assert after.eos_ids == before.eos_ids
    assert after.stored.dtype == before.stored.dtype == "bf16"
    assert after.chat_template == before.chat_template == util.CHAT_TEMPLATE
    assert before.model.tensors.keys() == after.model.tensors.keys()
    for name, values in before.model.tensors.items():
        np.testing.assert_array_equal(after.model.tensors[name], values)
    text = "Hello <|im_end|> wörld 123"
    assert after.tokenizer(text)["input_ids"] == before.tokenizer(text)["input_ids"]
    ids = before.tokenizer(text)["input_ids"]
    for skip in (False, True):
        options = {"skip_special_tokens": skip}
        assert after.tokenizer.decode(ids, **options) == before.tokenizer.decode(ids, **options)
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(after.tokenizer, name) == getattr(before.tokenizer, name)
    del before, after
    gc.collect()
    assert util.mappings_of(tmp_path) == []


@pytest.mark.parametrize("letter", "ABCDEF")
def test_heads_go_along(base, tmp_path, letter):
    folder = util.make_heads(tmp_path / letter, letter, base=base)
    model, heads = (folder, "auto") if letter in "DF" else (base, folder)
    out = export(model, heads, tmp_path / "m.safetensors")
    before, after = util.record(model, heads), util.record(out)
    assert after.config == before.config
    assert (after.heads_info.format, after.heads_info.num_heads) == ("export", 3)
    assert before.model.tensors.keys() == after.model.tensors.keys()
    for name, values in before.model.tensors.items():
        np.testing.assert_array_equal(after.model.tensors[name], values)
    plain = util.record(out, None)
    assert plain.heads_info is None
    assert not any(name.startswith("heads.") for name in plain.model.tensors)
    # Other heads may be put on an exported model.
    others = util.make_heads(tmp_path / "others", "C", num_heads=2)
    assert util.record(out, others).heads_info.num_heads == 2


def test_truncated_vocabulary_goes_along(base, tmp_path):
    folder = util.make_heads(tmp_path / "E", "E", vocab=7)
    out = export(base, folder, tmp_path / "m.safetensors")
    np.testing.assert_array_equal(util.record(out).model.tensors["heads.token_map"], np.arange(7))
    assert _core.load_model(str(out), "bf16", _core.Backend(threads=1)).weight_bytes > 0


@pytest.mark.parametrize("family", util.FAMILIES)
def test_cpp_reads_it_by_itself(tmp_path, family):
    """The model that C++ loads from the file alone computes the same bits as Python's."""
    folder = util.make_model(tmp_path / "hf", family, rope="llama3")
    heads = util.make_heads(tmp_path / "heads", "B")
    out = export(folder, heads, tmp_path / "m.safetensors")
    backend = _core.Backend(threads=1)
    models = [
        load_model(folder, heads, backend=backend).model,
        _core.load_model(str(out), "f32", backend),
    ]
    models.append(load_model(out, backend=backend).model)
    assert len({json.dumps(json.loads(model.config), sort_keys=True) for model in models}) == 1
    tokens = list(range(3, 40))
    logits = [np.full((len(tokens), util.VOCAB), np.nan, np.float32) for _ in models]
    for model, out_logits in zip(models, logits, strict=True):
        _core.score(model, tokens, 16, out_logits, None)
    assert np.isfinite(logits[0]).all()
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


def test_blocks_are_written_as_bf16_where_asked(tmp_path):
    """As GPUs need them; what `auto` writes is in test_loading_blocks.py."""
    folder = util.make_model(tmp_path / "hf", hidden_size=64, intermediate_size=96)
    source = util.make_gguf(tmp_path / "m.gguf", folder, kind="Q4_0")
    out = export(source, None, tmp_path / "m.safetensors", weights="bf16")
    with safe_open(out, "np") as file:
        metadata = file.metadata()
        assert json.loads(metadata["medusa_ext.config"])["family"] == "llama"
        assert {
            file.get_slice(name).get_dtype() for name in file.offset_keys() if "proj" in name
        } == {"BF16"}
        assert file.get_slice("norm.weight").get_dtype() == "F32"
    before, after = util.record(source, weights="bf16"), util.record(out)
    assert before.stored.text == after.stored.text == "bf16"
    for name, values in before.model.tensors.items():
        np.testing.assert_array_equal(after.model.tensors[name], values)
    assert (
        after.tokenizer("hello there")["input_ids"] == before.tokenizer("hello there")["input_ids"]
    )
    seen = inspect(out)
    assert (seen.format, seen.dtype, seen.num_parameters) == (
        "medusa_ext export",
        "bf16",
        inspect(source).num_parameters,
    )


def test_model_without_a_tokenizer(tmp_path):
    folder = util.make_model(tmp_path / "hf", tokenizer=False)
    out = export(folder, None, tmp_path / "m.safetensors")
    assert util.record(folder).tokenizer is None
    assert util.record(out).tokenizer is None
    assert util.record(out).eos_ids == [2]


@pytest.mark.parametrize(
    "name",
    ["m.bin", "nowhere/m.safetensors", "folder.safetensors"],
    ids=["suffix", "parent", "directory"],
)
def test_impossible_outputs(base, tmp_path, name):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(LoadError, match="cannot export to"):
        export(base, None, tmp_path / name)


def test_a_failure_leaves_nothing_behind(base, tmp_path, monkeypatch):
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"precious")

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medusa_ext.loading.exporting.write_tensors", full)
    with pytest.raises(LoadError, match="No space left on device"):
        export(base, None, out)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    assert out.read_bytes() == b"precious"


FULL_DISK = """
import resource, signal, sys
from medusa_ext.loading import LoadError, export
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    export(sys.argv[1], None, sys.argv[2])
except LoadError as error:
    print(error)
"""


def test_a_full_disk_is_named(base, tmp_path):
    """The weights alone are larger than the limit; the reason is the system's own."""
    out = tmp_path / "m.safetensors"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    finished = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(base), str(out)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert finished.stdout == f"cannot write {out}: {os.strerror(errno.EFBIG)}\n", finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_replaced_at_the_end(base, tmp_path):
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"old")
    export(base, None, out)
    assert util.record(out).config["family"] == "qwen2"
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_files_that_are_no_exports(base, tmp_path):
    with pytest.raises(LoadError, match="for a Hugging Face model give its directory"):
        util.record(base / "model.safetensors")
    good = export(base, None, tmp_path / "m.safetensors")
    with safe_open(good, "pt") as file:
        metadata, tensors = (
            file.metadata(),
            {name: file.get_tensor(name) for name in file.offset_keys()},
        )

    def refused(changed_metadata, changed_tensors=tensors, where="bad.safetensors") -> str:
        save_file(changed_tensors, tmp_path / "bad.safetensors", changed_metadata)
        with pytest.raises(LoadError) as error:
            util.record(tmp_path / "bad.safetensors")
        assert where in str(error.value)
        return str(error.value)

    assert "export format '9'" in refused(metadata | {"medusa_ext.format": "9"})
    for config in ("", "[]", "{}", '{"heads": 1}'):
        assert "medusa_ext.config is damaged" in refused(metadata | {"medusa_ext.config": config})
    for key in ("num_layers", "heads"):
        config = json.loads(metadata["medusa_ext.config"])
        config[key] = 10**9 if key == "num_layers" else config[key] | {"num_heads": 10**9}
        assert "at most" in refused(metadata | {"medusa_ext.config": json.dumps(config)}, where="")
    assert "tokenizer inside" in refused(metadata | {"medusa_ext.tokenizer": "{}"})
    assert "eos_ids" in refused(metadata | {"medusa_ext.eos_ids": "[9999]"})
    assert "eos_ids" in refused(metadata | {"medusa_ext.eos_ids": "nothing"})
    assert "dtype" in refused(metadata | {"medusa_ext.dtype": "int8"})
    assert "norm.weight is missing" in refused(
        metadata, {k: v for k, v in tensors.items() if k != "norm.weight"}
    )
    assert "extra of shape [2] is unexpected" in refused(
        metadata, tensors | {"extra": torch.ones(2)}
    )
    good.write_bytes(good.read_bytes()[:-10])
    with pytest.raises(LoadError, match=r"m\.safetensors"):
        util.record(good)


def test_a_python_only_tokenizer_cannot_be_exported(base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "medusa_ext.loading.checkpoint.Checkpoint.tokenizer", SimpleNamespace(eos_token_id=2)
    )
    with pytest.raises(LoadError, match=r"no tokenizer\.json form"):
        export(base, None, tmp_path / "m.safetensors")
