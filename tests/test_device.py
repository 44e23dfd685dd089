"""Devices by name, and the memory that an engine is planned to take of one."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine_util import Known, make_tiny
from loading_util import make_heads, make_model
from medusa_ext import CudaError, Drafter, Engine, _core, cli
from medusa_ext.device import AUTO_NODES, kind_of, open_device
from medusa_ext.loading import Checkpoint, open_checkpoint
from medusa_ext.memory import (
    Guesses,
    Limits,
    Sizes,
    advice,
    cache_bytes,
    forecast,
    plan,
    workspace_bytes,
)
from medusa_ext.trees import tree_for

EMULATED = "cuda-emulated"
needs_emulator = pytest.mark.skipif(
    EMULATED not in _core.available_devices(), reason="this build has no emulated CUDA backend"
)
needs_no_gpu = pytest.mark.skipif(
    "cuda" in _core.available_devices(), reason="this machine has a CUDA device"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_heads(tmp_path_factory.mktemp("heads"), "B", num_heads=4)


# Names


def test_the_cpu_comes_first() -> None:
    devices = _core.available_devices()
    assert devices[0] == "cpu"
    assert set(devices[1:]) <= {"cuda", EMULATED}


def test_auto_is_the_gpu_unless_an_option_is_for_the_cpu() -> None:
    best = "cuda" if "cuda" in _core.available_devices() else "cpu"
    assert open_device("auto").name == best
    assert open_device("auto", threads=1).name == "cpu"
    assert open_device("auto", isa="generic").detail.startswith("generic")


@pytest.mark.parametrize(
    "device", ["tpu", "", "CPU", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "cuda\n", 0, None, ["cpu"]]
)
def test_names_that_are_none(device: object) -> None:
    with pytest.raises(ValueError, match=r'device must be "auto", "cpu", "cuda" or "cuda:N", got '):
        open_device(device)


def test_a_number_beyond_all_devices() -> None:
    with pytest.raises((ValueError, NotImplementedError, CudaError)) as error:
        open_device("cuda:99999999999999999999")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", EMULATED])
@pytest.mark.parametrize("option", [{"threads": 2}, {"isa": "generic"}])
def test_options_of_the_cpu_are_refused_beside_a_gpu(
    device: str, option: dict[str, object]
) -> None:
    name, value = next(iter(option.items()))
    message = f"{name}={value!r} is for the CPU, and device is '{device}'; leave {name} out"
    with pytest.raises(ValueError, match=message):
        Engine("/no/such/model", device=device, **option)


@needs_no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether the build has no backend or the machine no device: what to do is said."""
    with pytest.raises((NotImplementedError, CudaError), match='use device="cpu"'):
        Engine("/no/such/model", device=device)
    assert cli.run(["generate", "x", "--device", device]) in (1, 2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert 'use device="cpu"' in err


def test_version_names_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["version"]) == 0
    out = capsys.readouterr().out
    assert f"({', '.join(_core.available_devices())}; cpu: generic" in out


@needs_emulator
def test_a_tree_deeper_than_the_device_takes(tmp_path: Path, tiny: Path) -> None:
    """Refused before weights are read."""
    heads = make_heads(tmp_path / "heads", "C", num_heads=70)
    tree = [[0] * depth for depth in range(1, 66)]
    with pytest.raises(ValueError, match=f"depth 65; {EMULATED} computes trees of depth 64 or les"):
        Engine(tiny, heads, tree=tree, device=EMULATED)
    assert _core.Backend("cpu").max_tree_depth == 255


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"),
    [
        (12, "bf16", 'multiples of 8: use dtype="f32" or device="cpu"'),
        (264, "f16", 'up to 256: use device="cpu"'),
        (264, "f32", 'up to 256: use device="cpu"'),
        (12, "f32", None),
        (256, "bf16", None),
    ],
)
def test_heads_that_a_gpu_does_not_compute(
    tmp_path: Path, head_dim: int, dtype: str, message: str | None
) -> None:
    """Refused before weights are read, and by inspect, also where there is no GPU."""
    model = make_model(tmp_path / "model", tokenizer=False, head_dim=head_dim)
    checkpoint = open_checkpoint(model, None)
    assert forecast(checkpoint, "cpu", dtype, Limits()).plan.total > 0
    if message is None:
        assert forecast(checkpoint, "cuda", dtype, Limits()).plan.total > 0
    else:
        message = f"the model has heads of size {head_dim} in {dtype}; a GPU .* {message}"
        with pytest.raises(NotImplementedError, match=message):
            forecast(checkpoint, "cuda", dtype, Limits())
    if EMULATED in _core.available_devices():
        if message is not None:
            with pytest.raises(NotImplementedError, match=message):
                Engine(model, dtype=dtype, device=EMULATED)
            return
        with Engine(model, None, dtype=dtype, device=EMULATED, max_context=64) as engine:
            assert engine.score([5, 6, 7]).shape == (3, 320)


def test_trees_left_to_us_fit_the_device(tiny: Path, heads: Path) -> None:
    """A CPU gets the best 16 nodes, a GPU all 64; a tree that is named is taken whole."""
    for device in _core.available_devices():
        with Engine(tiny, heads, device=device) as engine:
            expected = tree_for(
                {"heads": engine._config["heads"]}, "auto", AUTO_NODES[kind_of(device)]
            )
            assert engine.tree == expected.paths()
        with Engine(tiny, heads, device=device, tree="mc_sim_7b_63", max_context=128) as engine:
            assert len(engine.tree) == 63


# Memory


def sizes_of(checkpoint: Checkpoint, device: str = "cpu", **limits: int) -> Sizes:
    context = checkpoint.config["max_context"]
    return Sizes(
        checkpoint, device, checkpoint.stored(kind=device), Limits(**limits).within(context)
    )


CASES = [
    {},
    {"max_batch": 3, "max_context": 100, "prefill_chunk": 5},
    {"cache_tokens": 700, "max_context": 300},
    {"cache_tokens": 1, "max_context": 65, "max_batch": 1},
]


@pytest.mark.parametrize("limits", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("guessing", ["none", "lookup", "own", "heads"])
def test_the_plan_is_what_is_reserved(
    tiny: Path, heads: Path, limits: dict[str, int], dtype: str, guessing: str
) -> None:
    """Cache and workspace to the byte, weights but for what layouts are padded by."""
    drafter = Known([]) if guessing == "own" else None
    given = {"none": None, "lookup": "prompt-lookup", "own": "auto", "heads": heads}[guessing]
    with Engine(tiny, given, dtype=dtype, device="cpu", drafter=drafter, **limits) as engine:
        stats = engine.session_stats()
        checkpoint = open_checkpoint(tiny, given if guessing == "heads" else None)
        tree = tree_for(checkpoint.config, "auto", AUTO_NODES["cpu"])
        if guessing == "lookup":
            drafter = _core.prompt_lookup_drafter()
        sizes = replace(sizes_of(checkpoint, **limits), guesses=Guesses.of(tree, drafter))
        sizes = sizes.with_types(dtype=dtype)
        assert workspace_bytes(sizes) == stats.workspace_bytes
        assert cache_bytes(sizes) == stats.cache_bytes
        planned = plan(sizes)
        assert planned.weights + planned.heads <= stats.weight_bytes
        assert stats.weight_bytes <= 1.1 * (planned.weights + planned.heads)
        assert (
            planned.total >= stats.weight_bytes + stats.workspace_bytes + stats.cache_bytes - 4096
        )


@pytest.mark.parametrize("share", [0.999, 0.9, 0.6, 0.3])
def test_advice_fits_and_is_the_most_that_does(tiny: Path, share: float) -> None:
    checkpoint = open_checkpoint(tiny, None)
    sizes = replace(
        sizes_of(checkpoint, max_batch=64, max_context=500, cache_tokens=20_000),
        guesses=Guesses(64),
    )
    room = int(plan(sizes).total * share)
    text = advice(sizes, room)
    assert text.endswith(" would fit")
    alone = text.removesuffix(" would fit").split(" or ")
    for option in alone if " together" not in text else []:
        name, value = option.split("=")
        if name in ("weights", "dtype"):
            assert plan(sizes.with_types(**{name: ast.literal_eval(value)})).total <= room
        else:
            assert plan(sizes.changed(**{name: int(value)})).total <= room
            assert plan(sizes.changed(**{name: int(value) + 1})).total > room


def test_advice_to_change_several_options(tiny: Path) -> None:
    sizes = replace(
        sizes_of(open_checkpoint(tiny, None), max_batch=64, cache_tokens=2**20, max_context=500),
        guesses=Guesses(64),
    )
    least = replace(sizes.with_types(dtype="bf16"), limits=Limits(1, 320))
    text = advice(sizes, plan(least).total)
    assert text == 'dtype="bf16", max_batch=1 and max_context=320 together would fit'
    assert advice(sizes, 1000) == "no option makes it fit; take a smaller model or another device"


@pytest.mark.parametrize("device", _core.available_devices())
def test_too_little_memory_is_refused_before_any_is_taken(tiny: Path, device: str) -> None:
    backend = _core.Backend(device)
    free, total = backend.memory()
    assert 0 < free <= total
    with pytest.raises(MemoryError) as error:
        Engine(tiny, device=device, cache_tokens=2**30)
    text = str(error.value)
    assert "\n" not in text
    for words in ("it wants 41", " bytes (weights ", "cache 393,216.0 MiB", " bytes free of "):
        assert words in text, words
    assert f"bytes free of {total}; " in text
    assert "cache_tokens=" in text
    if device == EMULATED:
        assert backend.memory() == (free, total)


@needs_emulator
def test_what_was_advised_fits(tiny: Path) -> None:
    """The emulated device has 4 GiB."""
    with pytest.raises(MemoryError) as error:
        Engine(tiny, None, device=EMULATED, cache_tokens=2**25)
    words = str(error.value).split()
    tokens = next(int(word.split("=")[1]) for word in words if word.startswith("cache_tokens="))
    sizes = sizes_of(open_checkpoint(tiny, None), "cuda", cache_tokens=tokens)
    assert plan(sizes).total <= open_device(EMULATED).memory()[0]


class Wide(Drafter):
    max_nodes = 257

    def draft(self, inputs):  # pragma: no cover - never asked
        raise AssertionError


def test_a_drafter_with_too_many_nodes_is_refused_before_weights_are_read(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"drafter's max_nodes must be .* \[1, 256\], got 257"):
        Engine(tiny, drafter=Wide())


# medusa-ext inspect


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]):
    """Run `medusa-ext inspect`; its standard output, in one line where it is a table."""

    def run(*arguments: str) -> str:
        status = cli.run(["inspect", *arguments])
        captured = capsys.readouterr()
        assert (status, captured.err) == (0, "")
        return captured.out if "--json" in arguments else " ".join(captured.out.split())

    return run


def test_inspect_prints_the_plan(inspect, tiny: Path, heads: Path) -> None:
    text = inspect(str(tiny), "--heads", str(heads), "--device", "cpu", "--max-context", "256")
    for words in (
        "memory for weights 0.2 MiB",
        "memory for Medusa heads 0.2 MiB",
        "memory for 2,048 tokens in the cache 0.8 MiB",
        "memory for a pass of the model ",
        "memory together, on cpu ",
        "memory free ",
        "fits yes",
    ):
        assert words in text, words
    assert "kernels" not in text


def test_inspect_as_json(inspect, tiny: Path) -> None:
    found = json.loads(inspect(str(tiny), "--json", "--device", "cpu", "--dtype", "bf16"))
    memory = found["memory"]
    assert (found["dtype"], memory["device"], memory["cache_tokens"]) == ("bf16", "cpu", 4096)
    assert memory["total"] == sum(memory["plan"].values())
    assert found["weight_bytes"] == memory["plan"]["weights"] + memory["plan"]["heads"]
    assert 0 < memory["free"] <= memory["device_total"]
    assert memory["absent"] is None


@needs_no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_inspect_for_a_gpu_that_is_not_there(inspect, tiny: Path, device: str) -> None:
    text = inspect(str(tiny), "--device", device)
    assert f"memory together, on {device} " in text
    assert "memory for kernels up to " in text
    assert "memory free unknown, no such device is present here: " in text
    assert "fits" not in text
    memory = json.loads(inspect(str(tiny), "--device", device, "--json"))["memory"]
    assert memory["free"] is None
    assert 'use device="cpu"' in memory["absent"]


def test_inspect_says_what_would_fit(inspect, tiny: Path) -> None:
    text = inspect(str(tiny), "--device", "cpu", "--cache-tokens", str(2**30))
    assert "fits no; " in text
    assert " would fit" in text


def test_inspect_plans_for_more_nodes_on_a_gpu(tiny: Path, heads: Path) -> None:
    checkpoint = open_checkpoint(tiny, heads)
    small, large = (
        forecast(checkpoint, device, "auto", Limits()).plan for device in ("cpu", "cuda")
    )
    assert small.weights == large.weights
    assert small.workspace < large.workspace


def test_inspect_with_fewer_rows(inspect, tiny: Path, heads: Path) -> None:
    arguments = [str(tiny), "--heads", str(heads), "--json", "--device", "cpu"]
    whole = json.loads(inspect(*arguments))["memory"]["plan"]
    cut = json.loads(inspect(*arguments, "--head-vocab", "64"))
    assert cut["heads"]["head_vocab"] == 64
    assert whole["heads"] - cut["memory"]["plan"]["heads"] == 4 * (320 - 64) * 32 * 4 - 64 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "device must be"),
        (["--dtype", "int3"], "dtype must be"),
        (["--max-batch", "0"], "max_batch must be"),
        (["--max-context", "100000"], "max_context must be an integer in [2, 512]"),
        (["--tree", "oak"], "needs Medusa heads"),
        (["--head-vocab", "64"], "head_vocab 64 needs Medusa heads, and there are none"),
    ],
    ids=str,
)
def test_inspect_refuses(
    tiny: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.run(["inspect", str(tiny), *arguments]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert message in captured.err


def test_every_size_of_a_real_shape(tmp_path: Path) -> None:
    """A check by hand of the plan's formulas: the sizes of a small model written out."""
    folder = make_model(tmp_path / "m", tokenizer=False, tie_word_embeddings=True)
    planned = plan(sizes_of(open_checkpoint(folder, None), max_batch=2, prefill_chunk=10))
    d, f, q, kv, vocab = 32, 48, 32, 16, 320
    layer = d * (q + 2 * kv) + q * d + 3 * d * f + 2 * d
    assert planned.weights == 4 * (vocab * d + 3 * layer + d)
    assert planned.cache == 256 * 3 * 2 * kv * 4
    activations = 12 * 4 * (4 * d + (q + 2 * kv) + 2 * q + 3 * f + 8)
    assert planned.workspace == activations + 2 * 4 * (d + vocab) + 12 * 64
    assert (planned.heads, planned.kernels) == (0, 0)
