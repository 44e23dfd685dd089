"""config.json -> ModelConfig: RoPE in every variant and spelling, windows, flags, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import loading_util as util
from medusa_ext import _core
from medusa_ext.loading import LoadError, hf
from medusa_ext.loading.config import eos_ids, from_hf
from medusa_ext.loading.plan import to_json

U = 2.0**-24  # unit roundoff of f32

YARN = [
    {},
    {"beta_fast": 16.0, "beta_slow": 2.0},
    {"attention_factor": 0.75},
    {"mscale": 0.9, "mscale_all_dim": 0.6},
    {"truncate": False},
    {"factor": 0.5},
]


def reference(config: dict) -> tuple[np.ndarray, float]:
    """inv_freq [D / 2] and attention scaling, by transformers."""
    described = AutoConfig.for_model(**json.loads(json.dumps(config)))
    kind = described.rope_parameters["rope_type"]
    if kind == "default":
        dim, base = described.head_dim, described.rope_parameters["rope_theta"]
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        return (1.0 / base**exponents).numpy(), 1.0
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](described, torch.device("cpu"))
    return inv_freq.numpy(), scaling


def assert_rope(config: dict, other: dict) -> dict:
    """`config` and `other` (the other spelling) both give what transformers computes."""
    inv_freq, scaling = reference(config)
    for spelling in (config, other):
        rope = from_hf(spelling, "config.json")["rope"]
        # One f32 power and at most six f32 operations on it, each off by a unit here and there.
        np.testing.assert_allclose(np.float32(rope["inv_freq"]), inv_freq, rtol=16 * U, atol=0)
        assert rope["attention_scaling"] == pytest.approx(scaling, rel=1e-12)
    return rope


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rope_as_transformers(family, kind, head_dim, theta):
    config = util.make_config(family, kind, head_dim=head_dim)
    config["rope_parameters"]["rope_theta"] = theta
    rope = assert_rope(config, util.old_spelling(config))
    assert rope["dynamic_factor"] == 0


@pytest.mark.parametrize("extra", YARN, ids=lambda extra: ",".join(extra) or "plain")
def test_yarn_parameters(extra):
    config = util.make_config("llama", "yarn", head_dim=64, max_position_embeddings=4096)
    config["rope_parameters"] |= {"original_max_position_embeddings": 1024} | extra
    assert_rope(config, util.old_spelling(config))


def test_yarn_without_an_original_length_takes_the_context():
    config = util.make_config("llama", "yarn", head_dim=64, max_position_embeddings=4096)
    del config["rope_parameters"]["original_max_position_embeddings"]
    assert_rope(config, util.old_spelling(config))


def test_dynamic_keeps_what_the_step_needs():
    config = util.make_config("llama", "dynamic", head_dim=64)
    rope = assert_rope(config, util.old_spelling(config))
    assert rope["dynamic_factor"] == 2.0
    assert rope["original_context"] == 32
    assert rope["base"] == 10000.0
    assert from_hf(config, "")["max_context"] == 64


def test_old_type_key_and_plain_theta():
    config = util.old_spelling(util.make_config("llama", "linear"))
    config["rope_scaling"] = {"type": "linear", "factor": 4.0}
    new = util.make_config("llama", "linear")
    assert from_hf(config, "")["rope"] == from_hf(new, "")["rope"]
    del config["rope_scaling"], config["rope_theta"]
    plain = util.make_config("llama")
    assert from_hf(config, "")["rope"] == from_hf(plain, "")["rope"]


@pytest.mark.parametrize("family", util.FAMILIES)
@pytest.mark.parametrize("rope", util.ROPE_VARIANTS)
def test_core_takes_the_config(family, rope):
    config = from_hf(util.make_config(family, rope), "config.json")
    model = _core.random_model(to_json(config), "f32", 0, _core.Backend(threads=1))
    assert json.loads(model.config)["windows"] == config["windows"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 9}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"sliding_window": 9, "use_sliding_window": False, "max_window_layers": 1}),
        ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 1}),
        ("qwen3", {"sliding_window": 9, "use_sliding_window": True}),
        (
            "qwen3",
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
    ],
)
def test_windows_as_transformers(family, changes):
    config = util.make_config(family, **changes)
    described = AutoConfig.for_model(**config)
    if family == "mistral":
        wanted = [described.sliding_window or 0] * 3
    else:
        kinds = described.layer_types
        wanted = [described.sliding_window if kind == "sliding_attention" else 0 for kind in kinds]
    assert from_hf(config, "")["windows"] == wanted


def test_absent_keys_have_transformers_defaults():
    for family in util.FAMILIES:
        config = util.make_config(family)
        for key in ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"):
            config.pop(key, None)
        config["num_attention_heads"] = 32
        config["hidden_size"] = 256
        config = util.old_spelling(config)
        ours, theirs = from_hf(config, ""), AutoConfig.for_model(**config)
        assert ours["num_kv_heads"] == theirs.num_key_value_heads
        assert ours["head_dim"] == (getattr(theirs, "head_dim", None) or 8)
        assert ours["max_context"] == theirs.max_position_embeddings
        assert ours["windows"][0] == (theirs.sliding_window if family == "mistral" else 0)


def test_flags():
    llama = from_hf(util.make_config("llama", attention_bias=True, mlp_bias=True), "")
    assert (llama["qkv_bias"], llama["o_bias"], llama["mlp_bias"]) == (True, True, True)
    qwen2, qwen3 = (from_hf(util.make_config(family), "") for family in ("qwen2", "qwen3"))
    assert (qwen2["qkv_bias"], qwen2["o_bias"], qwen2["qk_norm"]) == (True, False, False)
    assert (qwen3["qkv_bias"], qwen3["o_bias"], qwen3["qk_norm"]) == (False, False, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt_neox"}, "'gpt_neox' is not supported; supported are llama"),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": "medusa"}, "give its directory as heads"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config (gptq)"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; wanted one of silu"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"hidden_size": 0}, "hidden_size is 0; wanted a whole number from 1 to"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"num_hidden_layers": 2**31 - 1}, "from 1 to 4096"),
        ({"head_dim": 2**30}, "from 1 to 65536"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of"),
        ({"head_dim": None, "hidden_size": 33}, "hidden_size 33 is not a multiple"),
        ({"head_dim": 7}, "head_dim 7 cannot be rotated"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "factor is '4'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by layer type"),
        ({"rope_parameters": [1]}, "wanted an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_refused_by_name(changes, words):
    config = util.make_config("llama", **changes)
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(LoadError) as error:
        from_hf(config, "some/config.json")
    assert words in str(error.value)
    assert str(error.value).startswith("some/config.json")


JUNK = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2.5,
    1e308,
    float("inf"),
    float("nan"),
    10**30,
    "",
    "x",
    [],
    [1],
    {},
    {"a": 1},
]


@pytest.mark.parametrize("family", util.FAMILIES)
def test_junk_is_refused_or_read_but_never_crashes(family):
    """Every value of every key replaced by each kind of junk, also inside rope_parameters."""
    refused = 0
    for rope in util.ROPE_VARIANTS:
        config = util.make_config(family, rope, use_sliding_window=True, sliding_window=4)
        config |= {"layer_types": ["full_attention"] * 3, "max_window_layers": 1}
        inner = config["rope_parameters"] | {
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "truncate": True,
            "attention_factor": None,
            "partial_rotary_factor": 1.0,
        }
        cases = [config | {key: junk} for key in config for junk in JUNK]
        cases += [
            config | {"rope_parameters": inner | {key: junk}} for key in inner for junk in JUNK
        ]
        for case in cases:
            try:
                to_json(from_hf(case, "config.json"))
            except LoadError:
                refused += 1
    assert refused > 500


def test_layer_types_must_fit():
    config = util.make_config(
        "qwen2", use_sliding_window=True, sliding_window=4, layer_types=["full_attention"]
    )
    with pytest.raises(LoadError, match="layer_types"):
        from_hf(config, "")


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"a": '])
def test_config_that_is_no_json_object(tmp_path: Path, text):
    util.make_model(tmp_path, tokenizer=False)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LoadError, match=r"config\.json"):
        util.record(tmp_path)


def test_eos_ids():
    assert eos_ids(7, 10, "") == [7]
    assert eos_ids([7, 0, 7], 10, "") == [7, 0]
    assert eos_ids(None, 10, "") == []
    for bad in (10, -1, "7", [7, None], True):
        with pytest.raises(LoadError, match="eos_token_id"):
            eos_ids(bad, 10, "")


def test_eos_ids_come_from_the_most_trusted_file(tmp_path):
    util.make_model(tmp_path)
    util.edit_config(tmp_path, eos_token_id=5)
    util.write_json(tmp_path / "generation_config.json", {"eos_token_id": [3, 4]})
    assert util.record(tmp_path).eos_ids == [3, 4]
    util.write_json(tmp_path / "generation_config.json", {"max_length": 9})
    assert util.record(tmp_path).eos_ids == [5]
    util.edit_config(tmp_path, eos_token_id=None)
    (tmp_path / "generation_config.json").unlink()
    assert util.record(tmp_path).eos_ids == [2]  # the tokenizer's


def test_both_spellings_load_the_same(tmp_path):
    util.make_model(tmp_path, rope="llama3")
    new = util.record(tmp_path).config
    util.write_json(
        tmp_path / "config.json",
        util.old_spelling(json.loads((tmp_path / "config.json").read_text())),
    )
    assert util.record(tmp_path).config == new
    assert hf.stored_name("layers.2.q_proj.bias") == "model.layers.2.self_attn.q_proj.bias"
