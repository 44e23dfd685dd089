"""Input that no caller should give, and calls at the wrong time: refused, and the process lives."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from medusa_ext import _core
from test_bindings import tiny_config


def tiny_model(**changes: object) -> _core.Model:
    config = json.loads(tiny_config()) | changes
    return _core.random_model(json.dumps(config), "f32", 1, _core.Backend(threads=1))


def run(session: _core.Session) -> list[int]:
    tokens = []
    while not session.idle:
        tokens += [token for event in session.step() for token in event.tokens]
    return tokens


@pytest.mark.parametrize("acceptance", ["exact", "typical"])
@pytest.mark.parametrize("token", [-1, 3, 2**31 - 1])
def test_verify_refuses_a_node_outside_the_vocabulary(acceptance: str, token: int) -> None:
    sampling = _core.SamplingParams(temperature=1.0, acceptance=acceptance)
    with pytest.raises(ValueError, match=r"node 1 holds token .*vocabulary has 3"):
        _core.ops.verify(
            _core.Backend(threads=1), np.zeros((2, 3), np.float32), [0, token], [-1, 0], sampling
        )


def test_verify_refuses_logits_without_columns() -> None:
    with pytest.raises(ValueError, match=r"^verify: logits have 0 columns"):
        _core.ops.verify(
            _core.Backend(threads=1),
            np.zeros((1, 0), np.float32),
            [0],
            [-1],
            _core.SamplingParams(),
        )


@pytest.mark.parametrize("sizes", [(2**20, 2**20, 2**20), (1, 1, 3), (0, 1, 2), (1, 1, 2**20)])
def test_a_cache_of_impossible_size_is_refused(sizes: tuple[int, int, int]) -> None:
    layers, heads, head_dim = sizes
    with pytest.raises(ValueError, match=r"^make_kv_cache"):
        _core.KvCache(
            _core.Backend(threads=1),
            num_layers=layers,
            num_kv_heads=heads,
            head_dim=head_dim,
            dtype="f32",
            page_table=np.zeros((1, 1), np.int32),
            num_pages=1,
        )


@pytest.mark.parametrize("cache_tokens", [2**30 + 1, 2**38 + 192, 2**63 - 1, -1])
def test_cache_tokens_out_of_range(cache_tokens: int) -> None:
    with pytest.raises(ValueError, match=r"^cache_tokens is .*allowed is 0"):
        _core.Session(tiny_model(), None, cache_tokens=cache_tokens)


@pytest.mark.parametrize("temperature", [1e-9, 1e-40, 1e7, float("nan"), float("inf"), -1.0])
def test_temperatures_that_f32_logits_cannot_take(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"^temperature is"):
        _core.SamplingParams(temperature=temperature)


@pytest.mark.parametrize("penalty", [0.0, 1e-38, 1e38, float("nan")])
def test_penalties_that_f32_logits_cannot_take(penalty: float) -> None:
    with pytest.raises(ValueError, match=r"^repetition_penalty is"):
        _core.SamplingParams(repetition_penalty=penalty)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    session = _core.Session(tiny_model(attention_scale=3e38), None)
    request = session.submit([1, 2, 3], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"no finite maximum: the weights are broken"):
        run(session)
    session.cancel(request)
    run(session)
    assert session.idle


class Impatient(_core.Drafter):
    """Calls step() from inside a step."""

    max_nodes = 4

    def __init__(self) -> None:
        super().__init__()
        self.session: _core.Session | None = None

    def draft(self, inputs: list[_core.DraftInput]) -> list[tuple[list[int], list[int]]]:
        if self.session is not None:
            self.session.step()
        return [([], []) for _ in inputs]


def test_a_step_inside_a_step_is_refused() -> None:
    drafter = Impatient()
    session = _core.Session(tiny_model(), drafter)
    drafter.session = session
    session.submit([1, 2, 3], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"^step was called from inside a step"):
        run(session)
    drafter.session = None
    assert len(run(session)) == 4


def test_a_daemon_thread_inside_a_call_lets_the_process_end() -> None:
    code = f"""
import json, threading, time
from medusa_ext import _core
config = json.loads({tiny_config()!r}) | {{"max_context": 4096}}
model = _core.random_model(json.dumps(config), "f32", 1, _core.Backend(threads=1))
session = _core.Session(model, None)
session.submit([1] * 4000, max_new_tokens=90)
def drive():
    while True:
        session.step()
threading.Thread(target=drive, daemon=True).start()
time.sleep(0.2)
"""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")


def test_elements_smaller_than_a_byte_are_refused(tmp_path) -> None:
    header = json.dumps({"t": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "f4.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises((NotImplementedError, ValueError), match=r"\bt\b"):
        _core.SafetensorsFile(str(path)).array("t")
