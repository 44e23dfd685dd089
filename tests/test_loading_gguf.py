"""GGUF files: configuration, tensors and tokenizers, the demo model among them."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from medusa_ext import _core
from medusa_ext.loading import LoadError, load_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
import loading_util as util
from medusa_ext.loading.gguf import GgufFile, round_bf16
from medusa_ext.loading.gguf_tokenizer import build
from medusa_ext.loading.tokenizer import wrap

TEXTS = [
    "Hello, world!",
    "  leading, trailing  and   inner spaces  ",
    "12345 and 3.14159, 2024-01-01",
    "don't we'll I'M it's",
    "naïve café Zürich Straße",
    "日本語のテキスト 한국어 עברית العربية",
    "emoji 👋🏽 family 👩‍👩‍👧 flag 🇩🇪 e\u0301",
    "tabs\tand\nnewlines\r\n\n\nend",
    "def f(x):\n    return x**2  # <= squares\n",
    "x²+½ №5 ①",
    "",
    " ",
    "\u0000\u0001\ufffd",
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """One directory per family, with quantisable sizes."""
    folder = tmp_path_factory.mktemp("sources")
    return {family: util.make_model(folder / family, family, head_dim=16, hidden_size=64, intermediate_size=96) for family in util.FAMILIES}


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "f32"), ("F16", "f16"), ("BF16", "bf16")])
@pytest.mark.parametrize("family", util.FAMILIES)
def test_same_as_the_directory(sources, tmp_path, family, kind, dtype):
    path = util.make_gguf(tmp_path / "m.gguf", sources[family], kind=kind)
    ours, theirs = util.record(path), util.record(sources[family])
    assert ours.weights_dtype == dtype
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
    """bf16 in memory by default; the rounding is torch's, the blocks are the package's."""
    path = util.make_gguf(tmp_path / "m.gguf", sources["qwen3"], kind=kind)
    stored = gguf.GGMLQuantizationType[kind]
    state = util.read_weights(sources["qwen3"])
    wanted = {}
    for name, values in state.items():
        values = values.numpy()
        wanted[util.gguf_name(name)] = gguf.dequantize(gguf.quantize(values, stored), stored) if values.ndim == 2 else values
    names = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
    for dtype in ("auto", *names):
        loaded = util.record(path, dtype=dtype)
        assert loaded.weights_dtype == ("bf16" if dtype == "auto" else dtype)
        for name, key in (("embed_tokens.weight", "token_embd.weight"), ("layers.1.down_proj.weight", "blk.1.ffn_down.weight")):
            rounded = torch.tensor(wanted[key]).to(names[loaded.weights_dtype]).float()
            np.testing.assert_array_equal(loaded.model.tensors[name].astype(np.float32), rounded)
        assert loaded.model.types["norm.weight"] in ("float32", "f32")


def test_rounding_to_bf16_is_torchs():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], np.float32([0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8])])
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
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_llama3_factors_are_a_tensor(tmp_path):
    plain = util.make_model(tmp_path / "plain")
    scaled = util.make_model(tmp_path / "scaled", rope="llama3")
    wanted = np.float32(util.record(scaled).config["rope"]["inv_freq"])
    factors = np.float32(util.record(plain).config["rope"]["inv_freq"]) / wanted
    path = util.make_gguf(tmp_path / "m.gguf", plain, rope_freqs=factors)
    np.testing.assert_allclose(np.float32(util.record(path).config["rope"]["inv_freq"]), wanted, rtol=3 * 2**-24)


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
    with pytest.raises(LoadError, match="architecture 'gpt2' is not supported; supported are llama"):
        util.record(tmp_path / "m.gguf")


def test_every_truncation_is_refused(sources, tmp_path):
    path = util.make_gguf(tmp_path / "m.gguf", sources["llama"])
    content = path.read_bytes()
    with_data = GgufFile(path).reader.data_offset
    rng = np.random.default_rng(0)
    cuts = [0, 3, 4, 8, 20, 24, with_data - 1, with_data, len(content) - 1]
    cuts += rng.integers(24, with_data, 60).tolist() + rng.integers(with_data, len(content), 10).tolist()
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(LoadError) as error:
            util.record(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert "tensor output" in str(error.value) or "tensor blk" in str(error.value)
    gc.collect()
    assert util.mappings_of(tmp_path) == []


def test_damaged_headers_never_crash(sources, tmp_path):
    """Random bytes in the header: loaded or refused in one line, never anything else."""
    path = util.make_gguf(tmp_path / "m.gguf", sources["llama"])
    content = path.read_bytes()
    end = GgufFile(path).reader.data_offset
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        # Most of the header is vocabulary; half of the damage goes into the keys and the tensor table.
        where = rng.integers(4, 700) if rng.random() < 0.5 else rng.integers(end - 1500, end)
        damaged[where : where + 2] = rng.integers(0, 256, 2, dtype=np.uint8).tobytes()
        path.write_bytes(damaged)
        try:
            util.record(path)
        except LoadError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


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


# Tokenizers


def write_tokenizer(path: Path, fill) -> Path:
    """A GGUF file that holds a tokenizer and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_tokenizer(path: Path):
    return wrap(*build(GgufFile(path)))


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "default"])
def test_byte_level_vocabularies(tmp_path, pre):
    """Every text survives the way there and back, and is cut where the vocabulary's training cut it."""
    path = write_tokenizer(tmp_path / "t.gguf", lambda w: util.add_gguf_tokenizer(w, util.make_tokenizer(), pre))
    tokenizer = open_tokenizer(path)
    for text in TEXTS:
        wanted = __import__("unicodedata").normalize("NFC", text) if pre == "qwen2" else text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == wanted
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab 1234")
    numbers = [piece for piece, _ in pieces[1:]]
    assert numbers == {
        "gpt-2": ["Ġ1234"],
        "smollm": ["Ġ", "1", "2", "3", "4"],
        "llama-bpe": ["Ġ", "123", "4"],
        "qwen2": ["Ġ", "1", "2", "3", "4"],
        "default": ["Ġ", "123", "4"],
    }[pre]


def test_special_tokens_and_template(tmp_path):
    path = write_tokenizer(tmp_path / "t.gguf", lambda w: util.add_gguf_tokenizer(w, util.make_tokenizer()))
    tokenizer = open_tokenizer(path)
    messages = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    reference = util.make_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == reference
    assert ids[0] == 1  # <|im_start|>, whole
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi\nassistant\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


@pytest.mark.parametrize("adds", [True, False])
def test_begin_of_sequence(tmp_path, adds):
    def fill(writer):
        util.add_gguf_tokenizer(writer, util.make_tokenizer())
        writer.kv_data[0]["tokenizer.ggml.add_bos_token"].value = adds

    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "t.gguf", fill))
    assert (tokenizer("hi")["input_ids"][0] == 1) == adds
    assert tokenizer("hi", add_special_tokens=False)["input_ids"][0] != 1


PIECES = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "hell", "hello", "lo", "▁he", "▁w", "or", "▁wor", "ld", "▁world", "▁hello"]


def fill_sentencepiece(writer) -> None:
    tokens = PIECES + WORDS
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(PIECES) + [-float(rank) for rank in range(len(WORDS))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(WORDS))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def sentencepiece(text: str) -> list[str]:
    """SentencePiece's BPE, by its definition: join the neighbours whose union scores best, leftmost first."""
    score = {word: -rank for rank, word in enumerate(WORDS)}
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [(score[a + b], -i) for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False)) if a + b in score]
        if not joins:
            break
        at = -max(joins)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    out = []
    for piece in pieces:
        out += [piece] if piece in score else [f"<0x{byte:02X}>" for byte in piece.encode()]
    return out


def test_sentencepiece_vocabulary(tmp_path):
    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "t.gguf", fill_sentencepiece))
    rng = np.random.default_rng(0)
    texts = ["hello world", "hello", "", "  two", "é 👋🏽 x", "lo\nll"]
    texts += ["".join(rng.choice(list("helowrd  "), rng.integers(1, 20))) for _ in range(300)]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == (sentencepiece(text) if text else [])
        assert tokenizer.decode(ids) == text
    assert tokenizer("hello")["input_ids"][0] == 1  # <s> by default


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.add_tokenizer_model("bert"), "tokenizer 'bert' is not supported"),
        (lambda w: w.add_tokenizer_pre("tekken"), "pre-tokenizer 'tekken' is not supported"),
        (lambda w: w.add_token_types([1]), "1 token types for 320 tokens"),
        (lambda w: w.add_token_merges(["q zz"]), "vocabulary cannot be used"),
        (lambda w: w.add_bos_token_id(320), "320 is not below the vocabulary size 320"),
        (lambda w: w.add_token_list(["a"] * 320), "'a' stands twice"),
    ],
)
def test_damaged_vocabulary(tmp_path, change, words):
    def fill(writer):
        util.add_gguf_tokenizer(writer, util.make_tokenizer())
        kept = dict(writer.kv_data[0])
        writer.kv_data[0].clear()
        change(writer)
        writer.kv_data[0] = kept | writer.kv_data[0]

    path = write_tokenizer(tmp_path / "t.gguf", fill)
    with pytest.raises(LoadError) as error:
        build(GgufFile(path))
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_no_vocabulary(tmp_path):
    path = write_tokenizer(tmp_path / "t.gguf", lambda w: None)
    with pytest.raises(LoadError, match="holds no vocabulary"):
        build(GgufFile(path))


# The demo model


@pytest.fixture(scope="module")
def reference_tokenizer(demo_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_path.parent, gguf_file=demo_path.name)


@pytest.mark.checkpoint
def test_demo_tokenizer(demo_path, shared_dir, reference_tokenizer):
    """Against the tokenizer that transformers builds, with SmolLM's own cutting: digits one by one, then GPT-2's."""
    tokenizer = open_tokenizer(demo_path)
    reference_tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    lines = (shared_dir / "data" / "mt_bench.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [turn for line in lines for turn in json.loads(line).get("turns", json.loads(line).get("prompt", []))]
    assert len(prompts) >= 80
    for text in TEXTS + prompts:
        ids = tokenizer(text)["input_ids"]
        assert ids == reference_tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    messages = [{"role": "user", "content": "12 x 34?"}, {"role": "assistant", "content": "<|im_end|>"}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids == reference_tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids.count(2) == 4  # system, user, the quoted one, assistant


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
    loaded = util.record("demo", dtype="f32")
    from medusa_ext.loading.hf import stored_name

    assert len(loaded.model.tensors) == 272
    for name, values in loaded.model.tensors.items():
        np.testing.assert_array_equal(values, reference[stored_name(name)])


@pytest.mark.checkpoint
def test_demo_facts():
    loaded = load_model("demo", backend=_core.Backend(threads=1))
    assert loaded.weights_dtype == loaded.model.dtype == "bf16"
    assert loaded.eos_ids == [2]
    assert loaded.heads_info is None
    sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_context")
    assert [loaded.config[size] for size in sizes] == [30, 576, 9, 3, 64, 49152, 8192]
    assert loaded.config["tied_embeddings"]


@pytest.mark.checkpoint
def test_demo_peak_memory():
    """At most 1.25 x the resident weights + 200 MB, in a fresh process."""
    code = (
        "import resource; from medusa_ext import _core; from medusa_ext.loading import load_model\n"
        "loaded = load_model('demo', backend=_core.Backend(threads=1))\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "print(peak, loaded.model.weight_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, weight_bytes = map(int, done.stdout.split())
    assert peak <= 1.25 * weight_bytes + 200e6, f"peak {peak}, weights {weight_bytes}"


def test_reference_pieces_are_what_the_names_say():
    """The Sequence of Digits and ByteLevel that the demo test relies on is SmolLM's published pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder, tokenizer.normalizer = decoders.ByteLevel(), normalizers.NFC()
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a12 b")]
    assert pieces == ["a", "1", "2", "Ġb"]
