"""config.json of Hugging Face -> the canonical ModelConfig (csrc/medusa/config.h), as a dict."""

import json
import math
from pathlib import Path
from typing import Any

from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.rope import canonical_rope, reach

Config = dict[str, Any]

# What transformers assumes where config.json is silent.
_DEFAULTS: dict[str, Config] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768},
    "qwen3": {
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
        "head_dim": 128,
    },
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Far beyond any model; they keep a damaged file from filling the memory.
MAX_LAYERS, MAX_HEAD_DIM = 4096, 65536
NO_HEADS: Config = {"num_heads": 0, "num_layers": 0, "shared_lm_head": True, "head_vocab": 0}


class Fields:
    """Typed reading of a JSON object; every error names the file, the key and what was wanted."""

    def __init__(self, values: Config, where: str, defaults: Config | None = None) -> None:
        """`defaults` serves keys that are absent; a null stays a null."""
        self.values = {**(defaults or {}), **values}
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - JSON
        """The value, or `default` where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None, *, limit: int = 2**31 - 1) -> int:
        """A whole number from 1 to `limit`."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            raise self.error(key, value, f"a whole number from 1 to {limit}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.get(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or value <= 0
        ):
            raise self.error(key, value, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def error(self, key: str, value: object, wanted: str) -> LoadError:
        """The error of a bad value, to raise."""
        found = "missing" if value is None else repr(value)
        return LoadError(f"{self.where}: {key} is {found}; wanted {wanted}")


def read_json(path: Path) -> Config:
    """A JSON object; LoadError where the file is missing, unreadable or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{path} is missing") from None
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise LoadError(f"{path} holds a JSON {type(value).__name__}; wanted an object")
    return value


def from_hf(values: Config, where: str) -> Config:
    """The canonical configuration, without heads.

    Args:
        values: the content of config.json.
        where: its path, for messages.

    Raises:
        LoadError: something missing, impossible or not supported, by name.
    """
    family = _family(values, where)
    fields = Fields(values, where, _DEFAULTS[family])
    _refuse_unsupported(fields, family)
    num_heads = fields.count("num_attention_heads")
    hidden = fields.count("hidden_size")
    if fields.get("head_dim") is None and hidden % num_heads:
        raise LoadError(
            f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {num_heads}"
        )
    head_dim = fields.count("head_dim", hidden // num_heads, limit=MAX_HEAD_DIM)
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise LoadError(
            f"{where}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads "
            f"{num_kv_heads}"
        )
    num_layers = fields.count("num_hidden_layers", limit=MAX_LAYERS)
    act = fields.get("hidden_act", "silu")
    if not isinstance(act, str) or act not in _ACTIVATIONS:
        raise fields.error("hidden_act", act, f"one of {', '.join(_ACTIVATIONS)}")
    max_context = fields.count("max_position_embeddings")
    params = _rope_params(fields, max_context)
    rope = canonical_rope(params, head_dim, max_context, where)
    attention_bias = family in ("llama", "qwen3") and fields.flag("attention_bias")
    return {
        "family": family,
        "vocab_size": fields.count("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.count("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_context": reach(params, max_context),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "activation": _ACTIVATIONS[act],
        "qkv_bias": family == "qwen2" or attention_bias,
        "o_bias": attention_bias,
        "mlp_bias": family == "llama" and fields.flag("mlp_bias"),
        "qk_norm": family == "qwen3",
        "tied_embeddings": fields.flag("tie_word_embeddings"),
        "embedding_scale": 1.0,
        "attention_scale": 0.0,
        "windows": _windows(fields, family, num_layers),
        "rope": rope,
        "heads": dict(NO_HEADS),
    }


def _family(values: Config, where: str) -> str:
    family = values.get("model_type")
    if isinstance(family, str) and family in _DEFAULTS:
        return family
    if family == "medusa" or (family is None and "medusa_num_heads" in values):
        raise LoadError(f"{where} describes Medusa heads, not a model; give its directory as heads")
    found = "is missing" if family is None else f"{family!r} is not supported"
    raise LoadError(f"{where}: model_type {found}; supported are {', '.join(_DEFAULTS)}")


def _refuse_unsupported(fields: Fields, family: str) -> None:
    quantization = fields.get("quantization_config")
    if quantization is not None:
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        raise LoadError(
            f"{fields.where}: quantization_config ({method}) is not supported; give the f32, f16 "
            "or bf16 weights, or a GGUF"
        )
    if fields.get("pretraining_tp", 1) != 1:
        raise fields.error(
            "pretraining_tp",
            fields.get("pretraining_tp"),
            "1: weights split for training are not read",
        )
    kinds = fields.get("layer_types", [])
    if not isinstance(kinds, list):
        raise fields.error("layer_types", kinds, "a list")
    if family == "mistral" and any(kind != kinds[0] for kind in kinds):
        raise LoadError(
            f"{fields.where}: layer_types of more than one kind are not supported for mistral"
        )


def _rope_params(fields: Fields, max_context: int) -> Config:
    """Both spellings, as the `rope_parameters` of transformers 5."""
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise fields.error("rope_scaling", scaling, "an object")
    if any(isinstance(value, dict) for value in scaling.values()):
        raise LoadError(
            f"{fields.where}: rope_parameters by layer type are not supported, only one set for "
            "all layers"
        )
    params = dict(scaling)
    params["rope_type"] = scaling.get("rope_type", scaling.get("type")) or "default"
    params.setdefault("rope_theta", fields.get("rope_theta", 10000.0))
    params.setdefault("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if params["rope_type"] in ("llama3", "yarn"):
        # As in transformers: a value beside rope_parameters wins over the one inside.
        inside = params.get("original_max_position_embeddings", max_context)
        params["original_max_position_embeddings"] = fields.get(
            "original_max_position_embeddings", inside
        )
    return params


def _windows(fields: Fields, family: str, num_layers: int) -> list[int]:
    """Tokens that each layer's queries see, themselves included; 0: all."""
    if family == "llama" or fields.get("sliding_window") is None:
        return [0] * num_layers
    if family == "mistral":
        return [fields.count("sliding_window")] * num_layers
    if not fields.flag("use_sliding_window"):
        return [0] * num_layers
    window = fields.count("sliding_window")
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int):
            raise fields.error("max_window_layers", first, "a whole number")
        return [window if layer >= first else 0 for layer in range(num_layers)]
    known = {"full_attention": 0, "sliding_attention": window}
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or not all(isinstance(kind, str) and kind in known for kind in kinds)
    ):
        raise fields.error("layer_types", kinds, f"{num_layers} of {', '.join(known)}")
    return [known[kind] for kind in kinds]


def eos_ids(values: object, vocab_size: int, where: str) -> list[int]:
    """End-of-sequence ids of a config's `eos_token_id`: a number, a list or null."""
    ids = [] if values is None else values if isinstance(values, list) else [values]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise LoadError(
                f"{where}: eos_token_id {token!r} is no id below the vocabulary size {vocab_size}"
            )
    return list(dict.fromkeys(ids))
