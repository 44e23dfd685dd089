"""GGUF files: configuration, tensors and tokenizers, the demo model among them."""

import gc
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import loading_util as util
from medusa_ext import _core
from medusa_ext.loading import LoadError, load_model
from medusa_ext.loading.blocks import round_bf16
from medusa_ext.loading.gguf import GgufFile
from medusa_ext.loading.hf import stored_name


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """One directory per family, with quantisable sizes."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        family: util.make_model(
            folder / family, family, head_dim=16, hidden_size=64, intermediate_size=96
        )
        for family in util.FAMILIES
    }


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "f32"), ("F16", "f16"), ("BF16", "bf16")])
@pytest.mark.parametrize("family", util.FAMILIES)
def test_same_as_the_directory(sources, tmp_path, family, kind, dtype):
    path = util.make_gguf(tmp_path / "m.gguf", sources[family], kind=kind)
    ours, theirs = util.record(path), util.record(sources[family])
    assert ours.stored.dtype == dtype
    assert ours.model.tensors.keys() == theirs.model.tensors.keys()
    precision = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, values in theirs.model.tensors.items():
        if values.ndim == 2:
            values = torch.tensor(values).to(precision).float().numpy()
        np.testing.assert_array_equal(ours.model.tensors[name].astype(np.float32), values)
    same = set(ours.config) - {"family", "rms_norm_eps"}
    assert {key: ours.config[key] for key in same} == {key: theirs.config[key] for key in same}
    assert ours.config["rms_norm_eps"] == pytest.approx(1e-5)
    assert ours.eos_ids == theirs.eos_ids == [2]
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_blocks(sources, tmp_path, kind):
    """Expanded to a float type where it is asked for, or where nothing computes with the blocks.

    The rounding is torch's, the blocks are the package's.
    """
    path = util.make_gguf(tmp_path / "m.gguf", sources["qwen3"], kind=kind)
    stored = gguf.GGMLQuantizationType[kind]
    state = util.read_weights(sources["qwen3"])
    wanted = {}
    for name, values in state.items():
        values = values.numpy()
        wanted[util.gguf_name(name)] = (
            gguf.dequantize(gguf.quantize(values, stored), stored) if values.ndim == 2 else values
        )
    names = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
    as_they_are = kind in ("Q8_0", "Q4_0", "Q4_1")
    for weights in ("auto", *names):
        loaded = util.record(path, weights=weights)
        assert loaded.stored.dtype == ("bf16" if weights == "auto" else weights)
        if weights == "auto" and as_they_are:
            assert loaded.stored.text == kind.lower()
            continue
        assert not loaded.stored.blocks
        for name, key in (
            ("embed_tokens.weight", "token_embd.weight"),
            ("layers.1.down_proj.weight", "blk.1.ffn_down.weight"),
        ):
            rounded = torch.tensor(wanted[key]).to(names[loaded.stored.dtype]).float()
            np.testing.assert_array_equal(loaded.model.tensors[name].astype(np.float32), rounded)
        assert loaded.model.types["norm.weight"] == "float32"


def test_rounding_to_bf16_is_torchs():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate(
        [values[np.isfinite(values)], np.float32([0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8])]
    )
    wanted = torch.tensor(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(round_bf16(values), wanted)


@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_rope_scaling_keys(tmp_path, rope):
    folder = util.make_model(tmp_path / "hf", rope=rope)
    metadata = {"rope.scaling.type": rope, "rope.scaling.factor": 4.0}
    if rope == "yarn":
        metadata["rope.scaling.original_context_length"] = 32
    path = util.make_gguf(tmp_path / "m.gguf", folder, metadata=metadata)
    ours, theirs = util.record(path).config["rope"], util.record(folder).config["rope"]
    assert ours.pop("inv_freq") == theirs.pop("inv_freq")
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_llama3_factors_are_a_tensor(tmp_path):
    plain = util.make_model(tmp_path / "plain")
    scaled = util.make_model(tmp_path / "scaled", rope="llama3")
    wanted = np.float32(util.record(scaled).config["rope"]["inv_freq"])
    factors = np.float32(util.record(plain).config["rope"]["inv_freq"]) / wanted
    path = util.make_gguf(tmp_path / "m.gguf", plain, rope_freqs=factors)
    np.testing.assert_allclose(
        np.float32(util.record(path).config["rope"]["inv_freq"]), wanted, rtol=3 * 2**-24
    )


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"rope.scaling.type": "longrope"}, "'longrope' is not supported"),
        ({"rope.scaling.type": "linear"}, "factor is None"),
        ({"expert_count": 8}, "mixtures of experts"),
        ({"rope.dimension_count": 8}, "rope.dimension_count 8"),
    ],
)
def test_metadata_that_is_not_supported(sources, tmp_path, metadata, words):
    path = util.make_gguf(tmp_path / "m.gguf", sources["llama"], metadata=metadata)
    with pytest.raises(LoadError) as error:
        util.record(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        LoadError, match="architecture 'gpt2' is not supported; supported are llama"
    ):
        util.record(tmp_path / "m.gguf")


def test_every_truncation_is_refused(sources, tmp_path):
    path = util.make_gguf(tmp_path / "m.gguf", sources["llama"])
    content = path.read_bytes()
    with_data = GgufFile(path).reader.data_offset
    rng = np.random.default_rng(0)
    cuts = [0, 3, 4, 8, 20, 24, with_data - 1, with_data, len(content) - 1]
    cuts += (
        rng.integers(24, with_data, 60).tolist()
        + rng.integers(with_data, len(content), 10).tolist()
    )
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(LoadError) as error:
            util.record(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert "tensor output" in str(error.value) or "tensor blk" in str(error.value)
    del error  # its traceback holds the open file
    gc.collect()
    assert util.mappings_of(tmp_path) == []


def test_damaged_headers_never_crash(sources, tmp_path):
    """Random bytes in the header: loaded or refused in one line, never anything else."""
    path = util.make_gguf(tmp_path / "m.gguf", sources["llama"])
    content = path.read_bytes()
    end = GgufFile(path).reader.data_offset
    rng = np.random.default_rng(1)
    lines: list[str] = []
    for _ in range(150):
        damaged = bytearray(content)
        # Most of the header is vocabulary; half of the damage goes into the keys and the tensor
        # table.
        where = rng.integers(4, 700) if rng.random() < 0.5 else rng.integers(end - 1500, end)
        damaged[where : where + 2] = rng.integers(0, 256, 2, dtype=np.uint8).tobytes()
        path.write_bytes(damaged)
        try:
            util.record(path)
        except LoadError as error:
            lines.append(str(error))
    assert len(lines) > 50
    assert not any("\n" in line for line in lines)


def test_missing_surplus_and_misshapen_tensors(tmp_path):
    folder = util.make_model(tmp_path / "hf")
    state = util.read_weights(folder)

    def refused(changed) -> str:
        util.write_weights(folder, changed)
        path = util.make_gguf(tmp_path / "m.gguf", folder)
        with pytest.raises(LoadError) as error:
            util.record(path)
        assert str(path) in str(error.value)
        return str(error.value)

    name = "model.layers.1.mlp.up_proj.weight"
    text = refused({key: value for key, value in state.items() if key != name})
    assert "blk.1.ffn_up.weight is missing; wanted shape [48, 32]" in text
    text = refused(state | {name: torch.ones(48, 64)})
    assert "blk.1.ffn_up.weight has shape [48, 64], wanted [48, 32]" in text
    text = refused(state | {"model.layers.7.mlp.up_proj.weight": torch.ones(4, 4)})
    assert "blk.7.ffn_up.weight of shape [4, 4] is unexpected" in text


def test_scales_that_are_not_finite(sources, tmp_path):
    path = util.make_gguf(tmp_path / "m.gguf", sources["llama"], kind="Q8_0")
    tensor = next(t for t in GgufFile(path).reader.tensors if t.name == "blk.0.ffn_up.weight")
    content = bytearray(path.read_bytes())
    content[tensor.data_offset : tensor.data_offset + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(content)
    with pytest.raises(LoadError, match=r"blk\.0\.ffn_up\.weight holds scales"):
        util.record(path)


def test_without_the_package_gguf(sources, tmp_path, monkeypatch):
    path = util.make_gguf(tmp_path / "m.gguf", sources["llama"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "medusa_ext.loading.gguf")
    monkeypatch.delattr("medusa_ext.loading.gguf", raising=False)
    with pytest.raises(LoadError, match=r"medusa-ext\[demo\]"):
        util.record(path)


# The demo model


@pytest.mark.checkpoint
@pytest.mark.slow
def test_demo_weights_are_transformers(demo_path):
    """Every tensor of the real file, against transformers' own reading of it."""
    from transformers import AutoModelForCausalLM, GgufConfig

    reference = AutoModelForCausalLM.from_pretrained(
        demo_path.parent,
        gguf_file=demo_path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).state_dict()
    loaded = util.record("demo", None, dtype="f32")
    assert len(loaded.model.tensors) == 272
    for name, values in loaded.model.tensors.items():
        np.testing.assert_array_equal(values, reference[stored_name(name)])


@pytest.mark.checkpoint
def test_demo_facts():
    loaded = load_model("demo", None, backend=_core.Backend(threads=1))
    assert loaded.stored.dtype == loaded.model.dtype == "bf16"
    assert loaded.eos_ids == [2]
    assert loaded.heads_info is None
    sizes = (
        "num_layers",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "vocab_size",
        "max_context",
    )
    assert [loaded.config[size] for size in sizes] == [30, 576, 9, 3, 64, 49152, 8192]
    assert loaded.config["tied_embeddings"]


@pytest.fixture(scope="module")
def pickled_demo(demo_path, tmp_path_factory) -> Path:
    """The demo model as a directory with a pytorch_model.bin, in bf16."""
    folder, loaded = tmp_path_factory.mktemp("pickled"), util.record("demo", None)
    state = {
        stored_name(name): torch.from_numpy(values).bfloat16()
        for name, values in loaded.model.tensors.items()
    }
    torch.save(state, folder / "pytorch_model.bin")
    loaded.tokenizer.save_pretrained(folder)
    config = loaded.config
    sizes = {
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_context",
        "rms_norm_eps": "rms_norm_eps",
        "tie_word_embeddings": "tied_embeddings",
    }
    util.write_json(
        folder / "config.json",
        {"model_type": "llama"} | {theirs: config[ours] for theirs, ours in sizes.items()},
    )
    return folder


@pytest.mark.checkpoint
@pytest.mark.parametrize("pickled", [False, True], ids=["gguf", "pickle"])
def test_demo_peak_memory(pickled, request):
    """At most 1.25 x the resident weights + 200 MB, in a fresh process."""
    code = (
        "import sys; from pathlib import Path; from medusa_ext import _core\n"
        "from medusa_ext.loading import load_model\n"
        "loaded = load_model(sys.argv[1], backend=_core.Backend(threads=1))\n"
        "status = Path('/proc/self/status').read_text().split('VmHWM:')[1]\n"
        "print(1024 * int(status.split()[0]), loaded.model.weight_bytes)"
    )
    model = str(request.getfixturevalue("pickled_demo")) if pickled else "demo"
    done = subprocess.run(
        [sys.executable, "-c", code, model], capture_output=True, text=True, check=True
    )
    peak, weight_bytes = map(int, done.stdout.split())
    assert peak <= 1.25 * weight_bytes + 200e6, f"peak {peak}, weights {weight_bytes}"
