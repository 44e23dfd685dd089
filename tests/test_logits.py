"""Logits and greedy text against transformers, with the same weights in float32."""

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loading_util import ROPE_VARIANTS
from medusa_ext import _core
from medusa_ext.loading import load_model
from util import U, assert_same_bits

if find_spec("torch") is None:
    pytest.skip("torch, the reference, is not installed", allow_module_level=True)

import torch
import transformers

# Both programs are off from the exact logits by what f32 sums in some order cost: a unit or two of
# the largest term in each of about 30 products in a row, amplified by sharp attention. transformers
# itself is off by up to 67 units of a row's largest logit on these models (against float64), ours
# by up to 81, and the two differ by up to 76.
TINY_BOUND = 120 * U
# The same for thirty layers and longer sums: measured 133 units.
DEMO_BOUND = 250 * U
# In bf16 every weight and every input of a product is rounded, which costs 0.0016 of it on average
# (root mean square; one unit roundoff is 2^-8). A layer does so about 11 times in a row with
# independent signs: thirty layers give sqrt(330) * 0.0016 = 0.03 of the logits' spread. Measured
# 0.041 on random tokens, which are far from any text, and 0.025 on plain ones.
BF16_SPREAD = 0.06
# Where weights lie in blocks, 32 values of a row share a step of 1/127 of their greatest, some 2.1
# standard deviations: 2.1 / 127 / sqrt(12) = 0.0048 of them. Four products a layer: sqrt(120) *
# 0.0048 = 0.053. Measured 0.124 on random tokens and 0.065 on plain ones.
BLOCKS_SPREAD = 0.18

VOCAB, LENGTH = 97, 100
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha-tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-biases-head_dim": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "qwen3-windows": (
        "qwen3",
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
}


def save_tiny_model(
    path: Path, family: str, rope: str, spelling: str
) -> transformers.PreTrainedModel:
    """A random model of three layers, saved as a Hugging Face directory in either spelling of the
    RoPE options.
    """
    model_type, options = FAMILIES[family]
    rope_parameters = {"rope_type": rope, "rope_theta": 1000.0, **ROPE_VARIANTS[rope]}
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 70,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64 if rope == "dynamic" else 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = transformers.AutoConfig.for_model(
        model_type, **{**sizes, **options, "rope_parameters": rope_parameters}
    )
    model = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        .float()
        .eval()
    )
    generator = torch.Generator().manual_seed(len(family) * 100 + len(rope))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Attention is sharp enough for positions to matter, and every norm and bias does
            # something.
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            else:
                scale = 1.0 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5
                parameter.copy_(scale * noise)
    model.save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    assert written["rope_parameters"]["rope_type"] == rope
    if spelling == "rope_scaling":
        parameters = written.pop("rope_parameters")
        written["rope_theta"] = parameters.pop("rope_theta")
        written["rope_scaling"] = None if rope == "default" else parameters
    (path / "config.json").write_text(json.dumps(written))
    save_tokenizer(path)
    return model


def save_tokenizer(path: Path) -> None:
    """A word for each id, because a model directory is loaded whole."""
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0"
    ).save_pretrained(path)


def load(path: Path, dtype: str, backend: _core.Backend) -> _core.Model:
    return load_model(path, None, dtype=dtype, backend=backend, local_files_only=True).model


def score(model: _core.Model, tokens: list[int], chunk: int) -> np.ndarray:
    logits = np.full((len(tokens), json.loads(model.config)["vocab_size"]), np.nan, np.float32)
    _core.score(model, tokens, chunk, logits, None)
    return logits


def reference_logits(
    model: transformers.PreTrainedModel, tokens: list[int], last: int = 0
) -> np.ndarray:
    """Of all tokens, or of the last few."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), logits_to_keep=last).logits[0].numpy()


def check_logits(got: np.ndarray, want: np.ndarray, bound: float) -> None:
    """Every logit within bound times the largest of its row."""
    error = np.abs(got.astype(np.float64) - want).max(axis=1)
    share = error / np.abs(want).max(axis=1)
    worst = int(share.argmax())
    assert share[worst] <= bound, (
        f"position {worst}: {share[worst]:.3g} of the largest logit, bound {bound:.3g}"
    )


def cases() -> Iterator[tuple[str, str, str]]:
    """Every family with plain RoPE, every RoPE variant with two families, in both spellings."""
    for family in FAMILIES:
        yield family, "default", "rope_parameters"
    yield "llama", "default", "rope_scaling"
    for rope in ROPE_VARIANTS:
        if rope != "default":
            yield "llama", rope, "rope_parameters"
            yield "llama", rope, "rope_scaling"
            yield "qwen3", rope, "rope_parameters"


@pytest.mark.parametrize(("family", "rope", "spelling"), list(cases()))
def test_tiny_models(
    backend: _core.Backend, tmp_path: Path, family: str, rope: str, spelling: str
) -> None:
    reference = save_tiny_model(tmp_path, family, rope, spelling)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, LENGTH).tolist()
    model = load(tmp_path, "f32", backend)
    whole = score(model, tokens, LENGTH)
    check_logits(whole, reference_logits(reference, tokens), TINY_BOUND)
    for chunk in (1, 3, 64, int(rng.integers(5, 60))):
        assert_same_bits(score(model, tokens, chunk), whole, f"chunks of {chunk}")


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_tiny_model_in_16_bits(backend: _core.Backend, tmp_path: Path, dtype: str) -> None:
    """The reference gets the rounded weights, so that only activations and cache may differ."""
    reference = save_tiny_model(tmp_path, "qwen3-windows", "default", "rope_parameters")
    kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.dim() > 1:  # norms stay in f32
                parameter.copy_(parameter.to(kind).float())
            assert "bias" not in name
    tokens = np.random.default_rng(2).integers(0, VOCAB, LENGTH).tolist()
    model = load(tmp_path, dtype, backend)
    whole = score(model, tokens, LENGTH)
    want = reference_logits(reference, tokens)
    # Three layers of 7 roundings (inputs of 4 products, q, K, V), each of at most one unit roundoff
    # of its numbers and independent: sqrt(21) of them, twice over for the sharp softmax. f16 rounds
    # only K and V.
    unit = {"f16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    check_logits(whole, want, 2 * np.sqrt(21) * unit)
    for chunk in (1, 17):
        assert_same_bits(score(model, tokens, chunk), whole, f"chunks of {chunk}")


# The demo model.


@pytest.fixture(scope="module")
def demo_reference(demo_path: Path) -> transformers.PreTrainedModel:
    """The demo model in transformers, its blocks expanded to f32 by the package gguf."""
    import gguf

    reader = gguf.GGUFReader(demo_path)
    heads, kv_heads = 9, 3
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        rms_norm_eps=float(reader.get_field("llama.attention.layer_norm_rms_epsilon").contents()),
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    weights = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in (
                "attn_q",
                "attn_k",
            ):  # stored with the two of each rotated pair side by side
                count = heads if parts[2] == "attn_q" else kv_heads
                values = values.reshape(count, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
            name = f"model.layers.{parts[1]}.{names[parts[2]]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[
                parts[0]
            ]
        weights[name] = torch.from_numpy(np.array(values))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True, strict=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are no weights
    return model.eval()


@pytest.fixture(scope="module")
def demo_f32(demo_path: Path) -> Any:
    """Model and tokenizer, on the best instruction set; the tiny models run on all."""
    return load_model(demo_path, None, weights="f32", backend=_core.Backend())


def prompts(shared_dir: Path, tokenizer: Any, count: int) -> list[list[int]]:
    """The shortest first turns of MT-Bench, to save time, as chat prompts of the demo model."""
    lines = (shared_dir / "data" / "mt_bench.jsonl").read_text().splitlines()
    questions = sorted((json.loads(line)["turns"][0] for line in lines), key=len)[:count]
    return [
        tokenizer.encode(
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
            add_special_tokens=False,
        )
        for question in questions
    ]


# Ids in no order: the bounds must hold for any text.
TEXT = np.random.default_rng(7).integers(3, 49152, 100).tolist()


@pytest.mark.checkpoint
def test_demo_model_in_f32(demo_f32: Any, demo_reference: transformers.PreTrainedModel) -> None:
    want = reference_logits(demo_reference, TEXT)
    whole = score(demo_f32.model, TEXT, len(TEXT))
    check_logits(whole, want, DEMO_BOUND)
    assert_same_bits(score(demo_f32.model, TEXT, 37), whole)


def check_spread(
    model: _core.Model, reference: transformers.PreTrainedModel, chunk: int, share: float
) -> None:
    """The error of all logits, as a share of their spread; the same bits in chunks."""
    want = reference_logits(reference, TEXT).astype(np.float64)
    whole = score(model, TEXT, len(TEXT))
    error = np.sqrt(np.mean((whole - want) ** 2))
    spread = np.sqrt(np.mean((want - want.mean(axis=1, keepdims=True)) ** 2))
    assert error <= share * spread, f"{error / spread:.4f} of the spread"
    assert_same_bits(score(model, TEXT, chunk), whole)


@pytest.mark.checkpoint
def test_demo_model_in_bf16(demo_path: Path, demo_reference: transformers.PreTrainedModel) -> None:
    loaded = load_model(demo_path, None, weights="bf16", backend=_core.Backend())
    check_spread(loaded.model, demo_reference, 41, BF16_SPREAD)


@pytest.mark.checkpoint
def test_demo_model_in_its_own_blocks(
    demo_path: Path, demo_reference: transformers.PreTrainedModel
) -> None:
    """The weights are exact; rows are rounded to 8 bits before every product."""
    loaded = load_model(demo_path, None, backend=_core.Backend())
    assert loaded.stored.text == "q4_1, q8_0"
    check_spread(loaded.model, demo_reference, 41, BLOCKS_SPREAD)


@pytest.mark.checkpoint
@pytest.mark.slow
def test_greedy_text_of_the_demo_model(
    demo_f32: Any,
    shared_dir: Path,
    demo_reference: transformers.PreTrainedModel,
    case_count: Callable[[int], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """64 greedy tokens after each of 20 prompts.

    The reference reads prompt and text in one pass: each of our tokens must be its argmax given all
    before it. By induction that is the text that the reference would have written itself, at a
    fraction of the time. Where the reference's top two logits differ by less than twice the bound
    on a logit, either may win; such a place is printed.
    """
    length = 64
    texts = prompts(shared_dir, demo_f32.tokenizer, min(case_count(20), 80))
    assert len(texts) >= 20
    session = _core.Session(demo_f32.model, None, max_batch=20, max_context=1024)
    ids = [session.submit(tokens, max_new_tokens=length) for tokens in texts]
    written: dict[int, list[int]] = {request: [] for request in ids}
    while not session.idle:
        for event in session.step():
            written[event.request] += event.tokens

    close = 0
    for request, prompt in zip(ids, texts, strict=True):
        text = written[request]
        assert len(text) == length
        logits = reference_logits(demo_reference, prompt + text[:-1], length)
        for place, (token, row) in enumerate(zip(text, logits, strict=True)):
            if token != row.argmax():
                gap = float(row.max() - row[token])
                allowed = 2 * DEMO_BOUND * float(np.abs(row).max())
                with capsys.disabled():
                    print(
                        f"\nprompt {request}, token {place}: {token}, "
                        f"reference {row.argmax()}, gap {gap:.2g}"
                    )
                assert gap < allowed, f"logits differ by {gap}, allowed {allowed}"
                close += 1
    assert close <= 3
