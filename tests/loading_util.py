"""Makers of tiny random checkpoints: models, GGUF files, tokenizers, heads in formats A to F."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from medusa_ext.loading import load

if TYPE_CHECKING:  # the GPU's tests run without it
    import gguf

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2; <|im_end|> ends a turn
VOCAB = 320
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What each variant adds to rope_parameters; 64 positions are beyond every original length.
ROPE_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}


def make_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Byte-level BPE: special tokens, every byte, and merges of common pairs."""
    words = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    assert vocab_size >= len(words)
    merges: list[tuple[str, str]] = []
    letters = "etaoinshrdlu"
    for pair in (("Ġ", letter) for letter in letters):
        merges.append(pair)
    merges += [(left, right) for left in letters for right in letters if left != right]
    merges = merges[: vocab_size - len(words)]
    words += ["".join(pair) for pair in merges]
    words += [f"<|unused{index}|>" for index in range(vocab_size - len(words))]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_config(family: str = "llama", rope: str = "default", **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model: d = 32, 4 query and 2 kv heads of 8, 3 layers, 128 positions."""
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 32 if rope == "dynamic" else 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": rope, "rope_theta": 10000.0, **ROPE_VARIANTS[rope]},
    }
    if family == "mistral":
        config["sliding_window"] = None
    config.update(changes)
    return config


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 4 writes it: rope_theta and rope_scaling on top."""
    config = dict(config)
    params = dict(config.pop("rope_parameters"))
    config["rope_theta"] = params.pop("rope_theta")
    config["rope_scaling"] = params if params["rope_type"] != "default" else None
    return config


def make_model(
    folder: Path,
    family: str = "llama",
    *,
    rope: str = "default",
    dtype: str = "float32",
    seed: int = 0,
    shards: int = 1,
    pickled: bool = False,
    tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """A tiny random model as a Hugging Face directory; `changes` go into config.json.

    The weights are larger than training would start with, so that logits differ by whole units.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(family, rope, **changes)
    state = random_state(config, seed, getattr(torch, dtype))
    write_json(folder / "config.json", config | {"torch_dtype": dtype})
    write_json(folder / "generation_config.json", {"eos_token_id": [2]})
    write_weights(folder, state, shards=shards, pickled=pickled)
    if tokenizer:
        make_tokenizer(config["vocab_size"]).save_pretrained(folder)
    return folder


def random_state(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random tensors with exactly the names and shapes of transformers' own model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in model.state_dict().items():
        if config["tie_word_embeddings"] and name == "lm_head.weight":
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 2 and "embed" not in name:
            tensor = noise * (1.5 / value.shape[1] ** 0.5)
        else:
            tensor = 1 + 0.2 * noise if name.endswith("norm.weight") else 0.5 * noise
        state[name] = tensor.to(dtype)
    return state


def reference_model(folder: Path) -> Any:
    """transformers' model of a directory, in f32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_weights(
    folder: Path, state: dict[str, torch.Tensor], *, shards: int = 1, pickled: bool = False
) -> None:
    """State dict -> model.safetensors or pytorch_model.bin, one file or shards with an index."""
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    save = torch.save if pickled else save_file
    if shards == 1:
        save(state, folder / f"{stem}.{suffix}")
        return
    weight_map, total = {}, 0
    for shard in range(shards):
        name = f"{stem}-{shard + 1:05}-of-{shards:05}.{suffix}"
        part = {key: state[key] for key in list(state)[shard::shards]}
        save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
        total += sum(value.nbytes for value in part.values())
    write_json(
        folder / f"{stem}.{suffix}.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict of a directory with one safetensors file."""
    return load_file(folder / "model.safetensors")


def write_json(path: Path, value: Any) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; a value of None deletes the key."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    write_json(folder / "config.json", config)


def random_heads(
    *,
    hidden: int = 32,
    vocab: int = VOCAB,
    num_heads: int = 3,
    num_layers: int = 1,
    own_lm_head: bool = True,
    bias: bool = True,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Heads in the original spelling: `{h}.{l}.linear.{weight,bias}` and `{h}.{L}.weight`."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            noise = torch.randn(hidden, hidden, generator=generator)
            state[f"{head}.{layer}.linear.weight"] = (noise / hidden**0.5).to(dtype)
            if bias:
                state[f"{head}.{layer}.linear.bias"] = torch.randn(hidden, generator=generator).to(
                    dtype
                )
        if own_lm_head:
            noise = torch.randn(vocab, hidden, generator=generator)
            state[f"{head}.{num_layers}.weight"] = (noise / hidden**0.5).to(dtype)
    return state


def make_heads(folder: Path, letter: str, *, base: Path | None = None, **options: Any) -> Path:
    """Heads in one of the formats A to F. D and F are whole models, made from the one in `base`.

    `options` are those of random_heads; `prefix` (E) puts `medusa_heads.` before every name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefix = options.pop("prefix", "")
    options = {"own_lm_head": letter != "C", "bias": letter != "E"} | options
    heads = random_heads(**options)
    num_heads, num_layers = options.get("num_heads", 3), options.get("num_layers", 1)
    config: dict[str, Any] = {
        "base_model_name_or_path": "somebody/tiny",
        "medusa_num_heads": num_heads,
        "medusa_num_layers": num_layers,
    }
    if letter == "A":
        torch.save(heads, folder / "medusa_lm_head.pt")
    elif letter in "BC":
        save_file(heads, folder / "medusa_lm_head.safetensors")
        config |= {"version": "2"} if letter == "C" else {}
    elif letter == "E":
        vocab = options.get("vocab", VOCAB)
        save_file(
            {prefix + vllm_name(name): value for name, value in heads.items()},
            folder / "model.safetensors",
        )
        config = {
            "model_type": "medusa",
            "hidden_size": options.get("hidden", 32),
            "num_heads": num_heads,
            "num_hidden_layers": num_layers,
            "vocab_size": vocab,
            "truncated_vocab_size": vocab,
        }
        if options["bias"]:
            config["medusa_fc_bias"] = True
    else:
        assert base is not None, "formats D and F hold the base model too"
        for path in base.iterdir():
            if path.suffix != ".safetensors":
                (folder / path.name).write_bytes(path.read_bytes())
        own = "medusa_head." if letter == "D" else "medusa_heads."
        save_file(
            read_weights(base) | {own + name: value for name, value in heads.items()},
            folder / "model.safetensors",
        )
        base_config = json.loads((base / "config.json").read_text())
        inner = {"medusa": {"num_medusa_heads": num_heads, "num_medusa_layers": num_layers}}
        config = base_config | (config if letter == "D" else inner)
    write_json(folder / "config.json", config)
    return folder


def vllm_name(name: str) -> str:
    """Name in format E of a tensor in the original spelling."""
    head, layer, *rest = name.split(".")
    if rest == ["weight"]:
        return f"lm_heads.{head}.weight"
    return f"blocks.{head}.layers.{layer}.{rest[1]}"


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def make_gguf(
    path: Path,
    folder: Path,
    *,
    kind: str = "F32",
    kinds: dict[str, str] | None = None,
    tokenizer: bool = True,
    metadata: dict[str, Any] | None = None,
    rope_freqs: np.ndarray | None = None,
) -> Path:
    """A Hugging Face directory (one safetensors file) as GGUF; matrices as `kind`, gains as F32.

    `kinds` are those of single matrices, by the end of their name in the GGUF file. The package
    cannot make Q4_K and Q6_K; those blocks are random.

    `metadata` adds keys after the architecture's prefix, such as {"rope.scaling.type": "linear"}.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text())
    family = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[
            type(value)
        ]
        add(f"{family}.{key}", value)
    if tokenizer:
        add_gguf_tokenizer(writer, make_tokenizer(config["vocab_size"]))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    for name, tensor in read_weights(folder).items():
        values = tensor.float().numpy()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            values = pairs_from_halves(
                values, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            )
        name = gguf_name(name)
        own = [other for end, other in (kinds or {}).items() if name.endswith(end)]
        stored = gguf.GGMLQuantizationType[[kind, *own][-1] if values.ndim == 2 else "F32"]
        if stored.name in ("Q4_K", "Q6_K"):
            data = random_blocks(stored.name, *values.shape, seed=len(name))
        else:
            data = gguf.quantize(values, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random blocks [rows, bytes] of the type Q4_K or Q6_K, with values below 1 or so."""
    rng = np.random.default_rng(seed)
    num_bytes, scales = {"Q4_K": (144, [0, 2]), "Q6_K": (210, [208])}[kind]
    blocks = rng.integers(0, 256, (rows * columns // 256, num_bytes), dtype=np.uint8)
    for at in scales:
        scale = rng.uniform(1e-4, 4e-4, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scale[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def add_gguf_tokenizer(
    writer: "gguf.GGUFWriter", tokenizer: PreTrainedTokenizerFast, pre: str = "gpt-2"
) -> None:
    """A byte-level BPE tokenizer as GGUF metadata."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = described["model"]["vocab"]
    words = sorted(vocab, key=vocab.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3 if word in SPECIAL else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def gguf_name(name: str) -> str:
    """Name in a GGUF file of a tensor in a Hugging Face checkpoint."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in top:
        return f"{top[stem]}.{kind}"
    parts = stem.split(".")
    return f"blk.{parts[2]}.{_GGUF_NAMES[parts[-1]]}.{kind}"


def pairs_from_halves(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter stores q and k: (i, i + D/2) become neighbours (2i, 2i + 1)."""
    half = values.shape[0] // num_heads // 2
    rows = [
        head * 2 * half + part * half + index
        for head in range(num_heads)
        for index in range(half)
        for part in range(2)
    ]
    return values[rows]


class RecordingBuilder:
    """Stands in for _core.ModelBuilder and keeps what it is given, as f32; blocks in `raw` too."""

    def __init__(self, config: str, dtype: str, backend: object, blocks: dict[str, str]) -> None:
        self.config, self.dtype, self.blocks = json.loads(config), dtype, dict(blocks)
        self.tensors: dict[str, np.ndarray] = {}
        self.raw: dict[str, np.ndarray] = {}
        self.types: dict[str, str] = {}

    def add(self, name: str, array: np.ndarray, dtype: str | None = None) -> None:
        assert name not in self.tensors, f"{name} was given twice"
        assert array.flags.c_contiguous
        self.types[name] = dtype or array.dtype.name
        if array.dtype == np.uint8:
            from gguf import GGMLQuantizationType, dequantize

            assert dtype == self.blocks[name]
            self.raw[name] = np.array(array)
            self.tensors[name] = dequantize(array, GGMLQuantizationType[dtype.upper()])
            return
        values = array.astype(np.uint32) << 16 if dtype == "bf16" else array
        self.tensors[name] = values.view(np.float32) if dtype == "bf16" else np.array(values)

    def finish(self) -> "RecordingBuilder":
        return self


def record(
    model: Any, heads: Any = "auto", *, weights: str = "auto", dtype: str = "auto", **hub: Any
) -> Any:
    """load_model, but the weights end in a RecordingBuilder: `.model.tensors`, `.model.config`."""
    with patch.object(load, "_core", SimpleNamespace(ModelBuilder=RecordingBuilder)):
        backend: Any = SimpleNamespace(name="cpu")
        return load.load_model(model, heads, weights=weights, dtype=dtype, backend=backend, **hub)


def mappings_of(folder: Path) -> list[str]:
    """Files below `folder` that this process still has open or mapped."""
    links = list(Path("/proc/self/fd").iterdir())
    targets = [str(link.readlink()) for link in links if link.exists()]
    mapped = [
        line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()
    ]
    return sorted({name for name in targets + mapped if name.startswith(str(folder))})
