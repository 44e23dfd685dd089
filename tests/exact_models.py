"""Tiny random models in which the last bit of every sum decides the text."""

import json
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from block_util import block_inputs, quantised
from medusa_ext import _core
from util import backend_for, fitting_head_dim

CONTEXT = 448  # of every tiny model: seven pages
Rng = np.random.Generator


@dataclass(frozen=True)
class Shape:
    """A tiny model and its heads.

    Unless embeddings are tied, the model is a trap for the order of sums: the two halves of the
    residual stream are equal, and token 2i + 1 has token 2i's row of lm_head with some columns of
    one half swapped against the other. The two logits are the same sum in another order: they
    differ by rounding alone, and rounding picks the token, whose embedding is unlike its twin's.
    One changed bit anywhere upstream soon changes the whole text. Where weights lie in blocks,
    whole blocks are swapped, so that the twins still hold the same numbers.
    """

    name: str
    dtype: str
    vocab: int = 97
    hidden: int = 64
    inner: int = 80
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    windows: tuple[int, int] = (0, 0)
    config: tuple[tuple[str, Any], ...] = ()  # further keys of ModelConfig
    rope: tuple[tuple[str, Any], ...] = ()  # further keys of RopeConfig
    rotary: int = 0  # rotated dimensions; 0: all
    heads: int = 0
    head_layers: int = 0
    head_vocab: int = 0  # rows of each head's own lm_head; 0: the model's is shared
    draft_vocab: int = 0  # rows of the model's that shared heads choose among; 0: all
    logit_scale: float = 3.0  # standard deviation of the logits
    blocks: str = ""  # type of all matrices; "": dtype


SHAPES = [
    Shape("f32", "f32", heads=3, head_layers=1),
    Shape(
        "bf16-token-map", "bf16", 130, 96, 72, 6, 2, heads=4, head_layers=2, head_vocab=50,
        config=(("qkv_bias", True),),
    ),
    Shape("f16-one-window", "f16", windows=(24, 0), heads=2, head_vocab=97),
    Shape(
        "f32-dynamic-rope", "f32", 80, 48, 56, 4, 1, 12, heads=2, head_layers=1, draft_vocab=60,
        rope=(("dynamic_factor", 2.0), ("base", 1000.0), ("original_context", 48)),
    ),
    Shape(
        "bf16-windows-norms-biases", "bf16", 64, 64, 48, windows=(17, 70), heads=1, head_layers=1,
        config=(("qk_norm", True), ("qkv_bias", True), ("o_bias", True), ("mlp_bias", True)),
    ),
    Shape(
        "f16-tied", "f16", 101, 40, 44, 2, 2, 20, heads=3, head_vocab=101, logit_scale=1.0,
        config=(("tied_embeddings", True), ("activation", "gelu_tanh"), ("embedding_scale", 2.0)),
    ),
    Shape("bf16-wide", "bf16", 512, 160, 200, 8, 2, 20),
    Shape(
        "f32-part-rotary", "f32", 64, 72, 60, 3, 3, 24, rotary=16, heads=4, head_layers=1,
        config=(("activation", "gelu"), ("attention_scale", 0.3), ("o_bias", True)),
        rope=(("attention_scaling", 1.1),),
    ),
]  # fmt: skip
BLOCK_SHAPES = [
    Shape("q8_0", "bf16", 96, 256, 96, head_dim=32, heads=3, head_layers=1, blocks="q8_0"),
    Shape(
        "q4_0-own-lm-heads", "f16", 64, 256, 160, head_dim=32, windows=(24, 0), heads=2,
        head_vocab=40, blocks="q4_0",
    ),
    Shape(
        "q4_1-draft-vocab", "bf16", 80, 256, 64, head_dim=32, heads=2, head_layers=1,
        draft_vocab=60, config=(("qkv_bias", True), ("mlp_bias", True)), blocks="q4_1",
    ),
    Shape("q4_k", "f32", 64, 512, 256, head_dim=64, heads=2, head_layers=1, blocks="q4_k"),
]  # fmt: skip


def config_json(shape: Shape) -> str:
    """ModelConfig of a shape."""
    rotary = shape.rotary or shape.head_dim
    rope = {"attention_scaling": 1.0, "dynamic_factor": 0.0, "base": 1000.0, "original_context": 0}
    rope |= dict(shape.rope)
    inv_freq = [rope["base"] ** (-2 * i / rotary) for i in range(rotary // 2)]
    config = {
        "family": "tiny",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_layers": 2,
        "num_heads": shape.q_heads,
        "num_kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_context": CONTEXT,
        "rms_norm_eps": 1e-5,
        "activation": "silu",
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "tied_embeddings"), False),
        "embedding_scale": 1.0,
        "attention_scale": 0.0,
        "windows": list(shape.windows),
        "rope": {"inv_freq": inv_freq, **rope},
        "heads": {
            "num_heads": shape.heads,
            "num_layers": shape.head_layers,
            "shared_lm_head": shape.head_vocab == 0,
            "head_vocab": shape.head_vocab or shape.draft_vocab,
        },
    }
    return json.dumps(config | dict(shape.config))


def mirrored(x: np.ndarray, axis: int) -> np.ndarray:
    """The second half of an axis made equal to the first."""
    half = np.take(x, range(x.shape[axis] // 2), axis)
    return np.ascontiguousarray(np.concatenate([half, half], axis))


def with_twins(rng: Rng, weight: np.ndarray, unit: int) -> np.ndarray:
    """Odd rows become the row before, some columns swapped against those of the other half.

    They are swapped in units, one of them at least.
    """
    out, half = weight.copy(), weight.shape[1] // 2
    for row in range(1, len(out), 2):
        swapped = rng.random(half // unit) < 0.5
        if unit > 1:
            swapped[0] = True
        pick = np.flatnonzero(np.repeat(swapped, unit))
        out[row] = out[row - 1]
        out[row, pick], out[row, pick + half] = out[row - 1, pick + half], out[row - 1, pick]
    return out


def tiny_weights(shape: Shape) -> dict[str, np.ndarray]:
    """Every tensor that ModelBuilder wants for a shape, f32."""
    config = json.loads(config_json(shape))
    rng = np.random.default_rng(list(shape.name.encode()))
    d = shape.hidden
    q_rows, kv_rows = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * scale / columns**0.5).astype(np.float32)

    def gain(size: int) -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(size)).astype(np.float32)

    weights = {
        "embed_tokens.weight": mirrored(matrix(shape.vocab, d, d**0.5), 1),
        "norm.weight": mirrored(gain(d), 0),
    }
    if config["tied_embeddings"]:
        # Random signs, or every token would be its own likeliest successor.
        weights["norm.weight"] *= mirrored(rng.choice([-1, 1], d).astype(np.float32), 0)
    else:
        weights["lm_head.weight"] = with_twins(
            rng,
            matrix(shape.vocab, d, shape.logit_scale),
            block_inputs(shape.blocks) if shape.blocks else 1,
        )
    for layer in range(2):
        block = {
            "attn_norm": gain(d),
            "mlp_norm": gain(d),
            # Sharp attention: a wrong or missing key is seen.
            "q_proj": matrix(q_rows, d, 1.5),
            "k_proj": matrix(kv_rows, d, 1.5),
            "v_proj": matrix(kv_rows, d, 1.5),
            "o_proj": mirrored(matrix(d, q_rows, 2.0), 0),
            "gate_proj": matrix(shape.inner, d),
            "up_proj": matrix(shape.inner, d),
            "down_proj": mirrored(matrix(d, shape.inner, 2.0), 0),
        }
        if config["qk_norm"]:
            block |= {"q_norm": 1.5 * gain(shape.head_dim), "k_norm": gain(shape.head_dim)}
        weights |= {f"layers.{layer}.{name}.weight": value for name, value in block.items()}
        biased = {
            "qkv_bias": ("q_proj", "k_proj", "v_proj"),
            "o_bias": ("o_proj",),
            "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
        }
        for key, names in biased.items():
            for name in names if config[key] else ():
                bias = 0.3 * rng.standard_normal(len(block[name])).astype(np.float32)
                is_stream = name in ("o_proj", "down_proj")
                weights[f"layers.{layer}.{name}.bias"] = mirrored(bias, 0) if is_stream else bias
    for head in range(shape.heads):
        for layer in range(shape.head_layers):
            weights[f"heads.{head}.{layer}.weight"] = matrix(d, d)
            weights[f"heads.{head}.{layer}.bias"] = 0.1 * rng.standard_normal(d).astype(np.float32)
        if shape.head_vocab:
            weights[f"heads.{head}.lm_head.weight"] = matrix(shape.head_vocab, d)
    rows = shape.head_vocab or shape.draft_vocab
    if 0 < rows < shape.vocab:
        ids = rng.permutation(shape.vocab)[:rows]
        weights["heads.token_map"] = ids.astype(np.int32)
        if shape.draft_vocab:
            own = "embed_tokens" if config["tied_embeddings"] else "lm_head"
            weights["heads.draft_lm_head.weight"] = weights[f"{own}.weight"][ids]
    return weights


def build_model(shape: Shape, backend: _core.Backend, *, zero: bool = False) -> _core.Model:
    """zero: every output weight is 0, so that all logits tie everywhere."""
    weights = tiny_weights(shape)
    blocks = {
        name: shape.blocks for name, value in weights.items() if shape.blocks and value.ndim == 2
    }
    builder = _core.ModelBuilder(config_json(shape), shape.dtype, backend, blocks)
    for name, value in weights.items():
        value = np.zeros_like(value) if zero and "lm_head" in name else value
        if name in blocks:
            builder.add(name, quantised(value, shape.blocks), shape.blocks)
        else:
            builder.add(name, value)
    return builder.finish()


@cache
def model_for(shape: Shape, unit: str, threads: int) -> _core.Model:
    """One model for each triple."""
    backend = backend_for(unit, threads)
    return build_model(on_backend(shape, backend), backend)


def on_backend(shape: Shape, backend: _core.Backend) -> Shape:
    """The shape, or the next one that this backend can run."""
    return replace(shape, head_dim=fitting_head_dim(backend, shape.dtype, shape.head_dim))
