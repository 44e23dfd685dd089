"""Weights in blocks: which types are chosen, blocks taken as they are, exported and read back.

What the blocks mean is the package gguf's word here.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loading_util as util
from medusa_ext import Engine, _core, cli
from medusa_ext.loading import LoadError, export, inspect, load_model, open_checkpoint
from medusa_ext.loading.blocks import (
    BLOCKS,
    dequantise,
    expand,
    quantise,
    round_bf16,
    scales_are_finite,
)
from medusa_ext.loading.files import SafetensorsTensors
from medusa_ext.loading.stored import Stored, weight_bytes

KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q4_K")
# 256 inputs everywhere, for q4_k; llama, because its rows of q and k move.
SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
STACKED = [f"layers.1.{name}_proj.weight" for name in ("q", "k", "v")]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return util.make_model(tmp_path_factory.mktemp("base"), **SIZES)


@pytest.fixture(scope="module")
def files(base, tmp_path_factory) -> dict[str, Path]:
    """A GGUF file of each type."""
    folder = tmp_path_factory.mktemp("files")
    return {kind: util.make_gguf(folder / f"{kind}.gguf", base, kind=kind) for kind in KINDS}


def matrices(model: Any) -> list[str]:
    """Names of those that a recorded model was given."""
    return [name for name, values in model.tensors.items() if values.ndim == 2]


def random_rows(kind: str, rows: int = 5, blocks: int = 3) -> np.ndarray:
    block = BLOCKS[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (rows * blocks, block.num_bytes), dtype=np.uint8)
    scales = rng.normal(size=(len(raw), block.scales)).astype(np.float16)
    raw[:, : 2 * block.scales] = scales.view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", BLOCKS)
def test_values_are_those_of_the_package(kind):
    rows = random_rows(kind)
    wanted = gguf.dequantize(rows, gguf.GGMLQuantizationType[kind.upper()])
    np.testing.assert_array_equal(dequantise(kind, rows), wanted)
    np.testing.assert_array_equal(expand(kind, rows, "f16"), wanted.astype(np.float16))
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    assert (BLOCKS[kind].elements, BLOCKS[kind].num_bytes) == sizes


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_scales_that_are_not_finite(kind, value):
    for which in range(BLOCKS[kind].scales):
        rows = random_rows(kind)
        assert scales_are_finite(kind, rows)
        blocks = rows.reshape(-1, BLOCKS[kind].num_bytes)
        blocks[-1, 2 * which : 2 * which + 2] = np.array([value], np.float16).view(np.uint8)
        assert not scales_are_finite(kind, rows)


# Which types


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_taken_as_they_are(files, base, kind):
    loaded = util.record(files[kind])
    assert (loaded.stored.text, loaded.stored.dtype) == (kind.lower(), "bf16")
    names = matrices(loaded.model)
    assert len(names) == 2 + 7 * SIZES["num_hidden_layers"]
    assert loaded.model.blocks == dict.fromkeys(names, kind.lower())
    stored = gguf.GGMLQuantizationType[kind]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(files[kind]).tensors}
    for name, key in [
        ("embed_tokens.weight", "token_embd.weight"),
        ("layers.1.v_proj.weight", "blk.1.attn_v.weight"),
        ("layers.1.down_proj.weight", "blk.1.ffn_down.weight"),
    ]:
        np.testing.assert_array_equal(loaded.model.raw[name], tensors[key].data)
    for name, heads in (("q", 4), ("k", 2)):  # undone: what the maker did to the rows
        own = loaded.model.tensors[f"layers.1.{name}_proj.weight"]
        wanted = gguf.dequantize(tensors[f"blk.1.attn_{name}.weight"].data, stored)
        np.testing.assert_array_equal(util.pairs_from_halves(own, heads), wanted)
        assert not np.array_equal(own, wanted)
    # Gains stay f32, and no heads came along.
    assert loaded.model.types["norm.weight"] == "float32"


def types_of(path: Path, **options: Any) -> Stored:
    return open_checkpoint(path, options.pop("heads", None)).stored(**options)


def test_parts_of_one_matrix_agree_or_are_expanded(base, tmp_path):
    """As files of the mixture Q4_K_M have them: v and down of some layers in Q6_K."""
    path = util.make_gguf(
        tmp_path / "m.gguf",
        base,
        kind="Q4_K",
        kinds={
            "blk.1.attn_v.weight": "Q6_K",
            "blk.0.ffn_up.weight": "Q8_0",
            "blk.1.ffn_down.weight": "Q6_K",
            "token_embd.weight": "Q6_K",
            "blk.0.attn_output.weight": "Q8_0",
        },
    )
    loaded = util.record(path)
    expanded = {
        *STACKED,
        "layers.0.gate_proj.weight",
        "layers.0.up_proj.weight",
        "layers.1.down_proj.weight",
        "embed_tokens.weight",
    }
    assert set(matrices(loaded.model)) - set(loaded.model.blocks) == expanded
    assert all(loaded.model.types[name] == "bf16" for name in expanded)
    assert loaded.model.blocks["layers.0.o_proj.weight"] == "q8_0"
    assert loaded.model.blocks["layers.0.q_proj.weight"] == "q4_k"
    assert loaded.stored.text == "bf16, q4_k, q8_0"


def test_rows_that_no_blocks_fill_stay_floats(tmp_path):
    """48 inputs of down_proj: no multiple of 32."""
    folder = util.make_model(tmp_path / "hf")
    for weights, text in (("q8", "q8_0, f32"), ("q4", "q4_1, f32")):
        loaded = util.record(folder, weights=weights)
        assert set(matrices(loaded.model)) - set(loaded.model.blocks) == {
            f"layers.{layer}.down_proj.weight" for layer in range(3)
        }
        assert set(loaded.stored.text.split(", ")) == set(text.split(", "))
        assert loaded.model.types["layers.0.q_proj.weight"] == "float32"  # quantised by the builder


def test_heads_are_guesses_and_stay_in_8_bits(base, tmp_path):
    heads = util.make_heads(tmp_path / "heads", "A", hidden=256)
    names = [name for name in util.record(base, heads).model.tensors if name.startswith("heads.")]
    own = {name for name in names if not name.endswith("bias")}
    assert len(own) == 6
    for weights, kind in (("q8", "q8_0"), ("q4", "q4_1")):
        stored = types_of(base, heads=heads, weights=weights)
        assert {stored.blocks[name] for name in own} == {"q8_0"}
        assert stored.blocks["lm_head.weight"] == stored.blocks["embed_tokens.weight"] == kind
        assert not any(name.endswith((".bias", "norm.weight")) for name in stored.blocks)
    assert not types_of(base, heads=heads).blocks


def test_heads_beside_blocks_are_quantised(files, tmp_path):
    """They only guess."""
    heads = util.make_heads(tmp_path / "heads", "A", hidden=256)
    stored = types_of(files["Q4_1"], heads=heads)
    assert stored.text in ("q8_0, q4_1", "q4_1, q8_0")
    assert {kind for name, kind in stored.blocks.items() if name.startswith("heads.")} == {"q8_0"}


def test_blocks_of_another_type_are_quantised_anew(files):
    """From f32 values, not from values rounded to bf16."""
    before = util.record(files["Q4_0"])
    loaded = util.record(files["Q4_0"], weights="q8")
    assert set(loaded.model.blocks.values()) == {"q8_0"}
    for name, values in before.model.tensors.items():
        assert loaded.model.types[name] == "float32"
        np.testing.assert_array_equal(loaded.model.tensors[name], values)
    same = util.record(files["Q8_0"], weights="q8")
    assert same.model.types["layers.0.o_proj.weight"] == "q8_0"  # as they are


def test_floats_and_dtype(base, files):
    def chosen(path: Path, **options: str) -> tuple[str, str]:
        stored = types_of(path, **options)
        return stored.text, stored.dtype

    assert chosen(base) == ("f32", "f32")
    assert chosen(base, weights="f16") == chosen(base, weights="f16", dtype="f16") == ("f16", "f16")
    assert chosen(base, weights="q8") == ("q8_0", "f32")
    assert chosen(base, weights="q8", dtype="bf16") == ("q8_0", "bf16")
    assert chosen(files["Q4_K"], dtype="f16") == ("q4_k", "f16")
    assert chosen(files["Q4_K"], weights="f32") == ("f32", "f32")
    assert chosen(files["Q4_K"], kind="cuda") == ("bf16", "bf16")
    assert chosen(files["Q4_K"], kind="cuda", dtype="f16") == ("f16", "f16")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"weights": "f16", "dtype": "bf16"},
            ValueError,
            'weights="f16" and dtype="bf16" contradict each other',
        ),
        ({"weights": "q4_0"}, ValueError, "weights must be 'auto' or 'q8' or 'q4' or 'bf16'"),
        ({"weights": 8}, ValueError, "got 8"),
        ({"dtype": "q8"}, ValueError, "dtype must be 'auto' or 'bf16'"),
        (
            {"weights": "q4", "kind": "cuda"},
            NotImplementedError,
            'use weights="auto" or device="cpu"',
        ),
    ],
)
def test_what_is_refused(base, options, error, words):
    with pytest.raises(error) as caught:
        types_of(base, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    if "kind" not in options:  # before anything is read
        with pytest.raises(error, match=r"must be|contradict"):
            load_model("no such model", backend=_core.Backend(threads=1), **options)


def test_a_damaged_scale_is_refused(files, tmp_path):
    path = tmp_path / "m.gguf"
    content = bytearray(files["Q4_1"].read_bytes())
    tensors = gguf.GGUFReader(files["Q4_1"]).tensors
    tensor = next(one for one in tensors if one.name == "blk.0.ffn_up.weight")
    content[tensor.data_offset + 2 : tensor.data_offset + 4] = np.float16(np.nan).tobytes()
    path.write_bytes(content)
    with pytest.raises(LoadError, match=r"m\.gguf: tensor blk\.0\.ffn_up\.weight holds scales"):
        util.record(path)


# The one-file form


@pytest.mark.parametrize("kind", KINDS)
def test_exports_keep_blocks(files, tmp_path, kind):
    out = export(files[kind], None, tmp_path / "m.safetensors")
    before, after = util.record(files[kind]), util.record(out)
    assert after.stored == before.stored
    assert after.model.raw.keys() == before.model.raw.keys()
    for name, raw in before.model.raw.items():
        np.testing.assert_array_equal(after.model.raw[name], raw)
    for name, values in before.model.tensors.items():
        np.testing.assert_array_equal(after.model.tensors[name], values)
    # Expanded where there are no products for them, as from the GGUF file.
    floats = [util.record(path, weights="bf16") for path in (files[kind], out)]
    for name, values in floats[0].model.tensors.items():
        np.testing.assert_array_equal(floats[1].model.tensors[name], values)
    seen = [inspect(files[kind]), inspect(out)]
    assert seen[0].stored_types == seen[1].stored_types
    assert seen[0].weight_bytes == seen[1].weight_bytes
    assert abs(out.stat().st_size - files[kind].stat().st_size) < 40_000  # headers, tokenizers
    again = export(out, None, tmp_path / "again.safetensors")
    assert again.read_bytes() == out.read_bytes()


def test_exported_mixtures(base, tmp_path):
    path = util.make_gguf(
        tmp_path / "m.gguf", base, kind="Q4_0", kinds={"blk.1.attn_v.weight": "Q8_0"}
    )
    out = export(path, None, tmp_path / "m.safetensors")
    blocks = json.loads(SafetensorsTensors(out).metadata["medusa_ext.blocks"])
    assert not set(STACKED) & set(blocks)
    assert blocks["layers.0.q_proj.weight"] == "q4_0"
    assert util.record(out).stored == util.record(path).stored
    floats = export(path, None, tmp_path / "f.safetensors", weights="f16")
    assert "medusa_ext.blocks" not in SafetensorsTensors(floats).metadata
    assert types_of(floats).text == "f16"
    with pytest.raises(ValueError, match="weights must be 'auto' or 'q8'"):
        export(path, None, tmp_path / "q.safetensors", weights="q3")


def test_damaged_blocks_are_refused_by_both_readers(files, tmp_path):
    good = export(files["Q4_0"], None, tmp_path / "good.safetensors")
    metadata, tensors = SafetensorsTensors(good).metadata, load_file(good)
    bad, backend = tmp_path / "bad.safetensors", _core.Backend(threads=1)
    name = "layers.0.down_proj.weight"
    blocks = json.loads(metadata["medusa_ext.blocks"])

    def refused(found: object, changed: dict[str, np.ndarray] | None = None) -> None:
        text = found if isinstance(found, str) else json.dumps(found)
        save_file(tensors | (changed or {}), bad, metadata | {"medusa_ext.blocks": text})
        for read in (util.record, lambda path: _core.load_model(str(path), "bf16", backend)):
            with pytest.raises(ValueError, match=r"bad\.safetensors: ") as error:
                read(bad)
            assert "\n" not in str(error.value)
            errors.append(str(error.value))

    errors: list[str] = []
    for text in ("", "[]", "{", '{"a": ', json.dumps(blocks)[:-9], "null", "[" * 100_000):
        refused(text)
    assert all("medusa_ext.blocks" in error for error in errors)
    errors.clear()
    refused(blocks | {"nothing.weight": "q4_0"})
    assert all("nothing.weight" in error for error in errors)
    errors.clear()
    without = {key: kind for key, kind in blocks.items() if key != name}
    for wrong in ("q5_0", 4, None, ["q4_0"], "bf16", "i32", ""):
        refused(without | {name: wrong})
    refused(without)
    refused(without | {name: "q8_0"})  # 144 bytes a row are no multiple of 34
    refused(blocks, {name: tensors[name].reshape(-1)})
    refused(blocks, {name: tensors[name][:, :-18]})
    refused(blocks, {name: tensors[name][1:]})
    refused(blocks, {name: tensors[name].view(np.int8)})
    assert all(name in error for error in errors), errors
    errors.clear()
    refused(blocks | {"norm.weight": "q4_0"})
    assert all("norm.weight" in error for error in errors)


# The memory plan


def test_planned_bytes_of_blocks(tmp_path):
    """By hand: 96 inputs are packed as 128, 5 and 80 outputs as 32 and 96."""
    config = {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16}
    folder = util.make_model(
        tmp_path / "hf", num_attention_heads=3, num_key_value_heads=1, **config
    )
    checkpoint = open_checkpoint(folder, util.make_heads(tmp_path / "E", "E", hidden=96, vocab=5))
    outputs = 2 * 320 + 96 + 192 + 96  # embedding and lm_head, q k v, gate and up, down
    floats = 96 * 48 + 3 * 96  # o, whose 48 inputs no blocks fill, and gains
    for weights, num_bytes in (("q8", 34), ("q4", 20)):
        stored = checkpoint.stored(weights)
        model = outputs * 128 // 32 * num_bytes + 4 * floats
        heads = 3 * (96 + 32) * 128 // 32 * 34 + 4 * 3 * 96 + 4 * 5  # biases, token map
        assert weight_bytes(checkpoint.entries, stored) == (model, heads)


# Loaded


def candidates(model: _core.Model, hidden: np.ndarray, width: int) -> np.ndarray:
    """Of its three heads, [3, R, width]."""
    ids = np.full((3, len(hidden), width), -1, np.int32)
    _core.head_candidates(model, hidden, ids, np.empty(ids.shape, np.float32))
    return ids


def scores(model: _core.Model) -> np.ndarray:
    tokens = list(range(3, 40))
    logits = np.full((len(tokens), util.VOCAB), np.nan, np.float32)
    _core.score(model, tokens, 16, logits, None)
    assert np.isfinite(logits).all()
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_resident_bytes_are_those_planned(files, tmp_path, kind):
    """Exactly, as blocks are counted with their padding; 320 rows and 256 inputs pad nothing."""
    backend = _core.Backend(threads=1)
    checkpoint = open_checkpoint(files[kind], util.make_heads(tmp_path / "B", "B", hidden=256))
    loaded = load_model(files[kind], tmp_path / "B", backend=backend)
    planned = weight_bytes(checkpoint.entries, loaded.stored)
    assert sum(planned) == loaded.model.weight_bytes
    assert set(loaded.stored.text.split(", ")) == {"q8_0", kind.lower()}


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_resident_bytes_of_odd_sizes(tmp_path, weights):
    """Rows and outputs that are padded; the 5 ids of the token map are in no Buffer."""
    config = {"hidden_size": 96, "intermediate_size": 96, "head_dim": 16}
    folder = util.make_model(
        tmp_path / "hf", num_attention_heads=4, num_key_value_heads=1, **config
    )
    heads = util.make_heads(tmp_path / "E", "E", hidden=96, vocab=5)
    checkpoint = open_checkpoint(folder, heads)
    loaded = load_model(folder, heads, weights=weights, backend=_core.Backend(threads=1))
    planned = weight_bytes(checkpoint.entries, loaded.stored)
    assert sum(planned) == loaded.model.weight_bytes + 4 * 5
    plain = load_model(folder, None, weights=weights, backend=_core.Backend(threads=1))
    assert planned[0] == plain.model.weight_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_all_readers_store_the_same_bits(files, tmp_path, kind):
    """From the GGUF file, from an export in Python, and from an export in C++."""
    backend = _core.Backend(threads=1)
    out = export(files[kind], None, tmp_path / "m.safetensors")
    models = [load_model(path, backend=backend).model for path in (files[kind], out)]
    models.append(_core.load_model(str(out), "bf16", backend))
    assert len({model.weight_bytes for model in models}) == 1
    logits = [scores(model) for model in models]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])
    floats = scores(load_model(files[kind], weights="f32", backend=backend).model)
    # The blocks' own values, but for rows of x rounded to 8 bits.
    assert np.abs(floats - logits[0]).mean() < 0.05 * np.abs(floats).mean()


def test_quantised_in_loading_as_the_package_does(base, tmp_path):
    """What q8 and q4 make of floats is what a GGUF file of that type holds."""
    backend = _core.Backend(threads=1)
    for weights, kind in (("q8", "Q8_0"), ("q4", "Q4_1")):
        path = util.make_gguf(tmp_path / f"{kind}.gguf", base, kind=kind)
        mine = load_model(base, weights=weights, backend=backend)
        theirs = load_model(path, dtype="f32", backend=backend)
        assert mine.stored.text == theirs.stored.text == kind.lower()
        np.testing.assert_array_equal(scores(mine.model), scores(theirs.model))


@pytest.mark.parametrize("weights", ["q8", "q4"])
@pytest.mark.parametrize("source", ["f32", "bf16", "f16", "Q4_0", "Q4_K"])
def test_quantised_in_export_as_in_loading(files, tmp_path, source, weights):
    """Heads too, a group of zeros, and one too small for a scale."""
    torch_names = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
    path = files.get(source)
    if path is None:
        path = util.make_model(tmp_path / "hf", dtype=torch_names[source], **SIZES)
        state = util.read_weights(path)
        state["model.layers.0.mlp.up_proj.weight"][3, 32:64] = 0
        state["model.layers.0.mlp.up_proj.weight"][3, 64:96] *= 1e-37
        util.write_weights(path, state)
    heads = util.make_heads(tmp_path / "heads", "B", hidden=256)
    backend = _core.Backend(threads=1)
    loaded = load_model(path, heads, weights=weights, backend=backend)
    out = export(path, heads, tmp_path / "m.safetensors", weights=weights)
    assert types_of(out, heads="auto") == replace(loaded.stored, weights="auto")
    model = _core.load_model(str(out), loaded.stored.dtype, backend)
    np.testing.assert_array_equal(scores(model), scores(loaded.model))
    hidden = np.random.default_rng(0).standard_normal((20, 256)).astype(np.float32)
    np.testing.assert_array_equal(*(candidates(one, hidden, 32) for one in (model, loaded.model)))


@pytest.mark.parametrize(("kind", "package"), [("q8_0", "Q8_0"), ("q4_1", "Q4_1")])
def test_quantised_as_the_package_does(kind, package):
    """Halves among them, which q8_0 rounds away from zero, and the greatest values there are."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 96)).astype(np.float32)
    x[:20] = rng.integers(-127, 128, (20, 96)) / 2
    x[:20, ::32] = 127
    x[20:30] *= 1e4
    x[30:40] *= 1e-7
    wanted = gguf.quantize(x, gguf.GGMLQuantizationType[package])
    np.testing.assert_array_equal(quantise(kind, x, "f32"), wanted)
    bits = round_bf16(x)
    widened = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(quantise(kind, bits, "bf16"), quantise(kind, widened, "f32"))


@pytest.mark.filterwarnings("error")
def test_groups_too_small_for_a_scale_are_zero():
    """Where 1 / d is beyond f32; the next greater ones have an inverse."""
    tiny = np.float32(1e-38) * np.array([0, 1, 1e-3, -1, 1e-7, 0.5, 0.1, -0.3], np.float32)
    x = np.tile(tiny, 12)[None]
    x[0, 64:] *= 1e5
    for kind, q in (("q8_0", 127), ("q4_1", 15)):
        blocks = quantise(kind, x, "f32").reshape(3, -1)
        assert not dequantise(kind, blocks[:2]).any()
        values = blocks[2, 2:].view(np.int8) if kind == "q8_0" else blocks[2, 4:] & 15
        assert values.max() == q


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("weights", "kind"), [("q8", "q8_0"), ("q4", "q4_1")])
@pytest.mark.parametrize("value", [1e9, -1e9, 3e38, np.inf, -np.inf, np.nan])
def test_values_that_no_block_holds(base, tmp_path, weights, kind, value):
    """Refused by export and by loading alike, in one line, and nothing is left behind."""
    folder = util.make_model(tmp_path / "hf", **SIZES)
    state = util.read_weights(folder)
    state["model.layers.1.self_attn.o_proj.weight"][7, 40] = value
    state["model.layers.1.self_attn.o_proj.weight"][7, 41] = -3e38 if value == 3e38 else 0
    util.write_weights(folder, state)
    wanted = (
        rf"^{folder}.*: tensor .*o_proj\.weight.* holds a value that is no finite number, or too "
        rf'large for {kind}; the file is damaged, or wants weights="bf16" or "f32"$'
    )
    with pytest.raises(LoadError, match=wanted):
        export(folder, None, tmp_path / "m.safetensors", weights=weights)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(LoadError, match=wanted):
        load_model(folder, None, weights=weights, backend=_core.Backend(threads=1))


@pytest.mark.parametrize("weights", BLOCKS)
def test_random_models_in_blocks(files, weights):
    """Every matrix whose rows fill blocks, with logits of the usual size."""
    backend = _core.Backend(threads=1)
    checkpoint = open_checkpoint(files["Q8_0"], None)
    config = json.dumps(checkpoint.config)
    model = _core.random_model(config, "f32", 3, backend, weights)
    chosen = open_checkpoint(files[weights.upper()], None).stored(dtype="f32")
    assert model.weight_bytes == sum(weight_bytes(checkpoint.entries, chosen))
    plain = _core.random_model(config, "f32", 3, backend)
    ratio = scores(model).std() / scores(plain).std()
    assert 0.5 < ratio < 2
    if weights == "q8_0":
        assert np.abs(scores(model) - scores(plain)).mean() < 0.05 * scores(plain).std()
    for wrong in ("i32", "q5_0", "bf16"):
        with pytest.raises(ValueError, match=r"choose|give the same type"):
            _core.random_model(config, "f32", 3, backend, wrong)


def test_frequent_rows_of_a_model_in_blocks(files, tmp_path):
    """Copies of rows of the lm_head, for heads without their own: blocks move as whole rows."""
    heads = util.make_heads(tmp_path / "C", "C", hidden=256, num_layers=1)
    recorded = util.record(files["Q4_0"], heads, head_vocab=40)
    ids, name = recorded.model.tensors["heads.token_map"], "heads.draft_lm_head.weight"
    assert recorded.model.blocks[name] == "q4_0"
    np.testing.assert_array_equal(
        recorded.model.raw[name], recorded.model.raw["lm_head.weight"][ids]
    )
    out = export(files["Q4_0"], heads, tmp_path / "m.safetensors", head_vocab=40)
    backend = _core.Backend(threads=1)
    hidden = np.random.default_rng(0).standard_normal((20, 256)).astype(np.float32)
    found = []
    for model in (
        load_model(files["Q4_0"], heads, head_vocab=40, backend=backend).model,
        _core.load_model(str(out), "bf16", backend),
    ):
        found.append(candidates(model, hidden, 8))
    np.testing.assert_array_equal(found[0], found[1])
    assert set(found[0].ravel()) <= set(ids.tolist())


@pytest.mark.parametrize("own_lm_head", [True, False])
def test_heads_of_another_type_than_the_model(files, tmp_path, own_lm_head):
    """bf16 heads before blocks of a shared lm_head, and whatever else stands beside what.

    Guesses never change the output, so the heads' own candidates are compared, with a model all in
    f32 of the same values: nearly all must agree.
    """
    folder = util.make_heads(tmp_path / "heads", "B", hidden=256, own_lm_head=own_lm_head)
    backend = _core.Backend(threads=1)
    hidden = np.random.default_rng(0).standard_normal((50, 256)).astype(np.float32)
    found = {}
    for weights in ("f32", "auto", "q8"):
        model = load_model(files["Q8_0"], folder, weights=weights, backend=backend).model
        found[weights] = candidates(model, hidden, 4)
    for weights in ("auto", "q8"):
        assert (found[weights][..., 0] == found["f32"][..., 0]).mean() > 0.9


# The engine and the command line


def test_an_engine_says_how_its_weights_are_stored(files, base):
    options: dict[str, Any] = {"device": "cpu", "threads": 1}
    with Engine(files["Q4_K"], None, **options) as engine:
        assert (engine.info["weights"], engine.info["dtype"]) == ("q4_k", "bf16")
        assert "weights='q4_k'" in repr(engine)
    with Engine(base, None, weights="q8", dtype="bf16", **options) as engine:
        assert (engine.info["weights"], engine.info["dtype"]) == ("q8_0", "bf16")
    with pytest.raises(ValueError, match=r"contradict each other"):
        Engine(base, None, weights="f16", dtype="f32", **options)


def test_the_command_line_takes_weights(files, base, tmp_path, capsys):
    def inspected(*arguments: str) -> dict[str, Any]:
        assert cli.run(["inspect", "--json", "--device", "cpu", *arguments]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    found = inspected(str(files["Q4_1"]))
    assert (found["weights"], found["dtype"]) == ("q4_1", "bf16")
    assert found["weight_bytes"] == found["memory"]["plan"]["weights"]
    assert inspected(str(files["Q4_1"]), "--weights", "q8")["weights"] == "q8_0"
    out = tmp_path / "m.safetensors"
    assert cli.run(["export", str(base), str(out), "--weights", "q4"]) == 0
    capsys.readouterr()
    assert inspected(str(out))["weights"] == "q4_1"
