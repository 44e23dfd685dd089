"""rope_table: cosines and sines at each row's position."""

import json

import numpy as np
import pytest

import reference
from medusa_ext import _core
from util import U, assert_same_bits, assert_within


def rope_config(rotary: int, base: float = 10000.0, **changes: float) -> dict:
    inv_freq = (base ** (-np.arange(0, rotary, 2) / rotary)).astype(np.float32)
    config = {"attention_scaling": 1.0, "dynamic_factor": 0.0, "base": base, "original_context": 0}
    return config | changes | {"inv_freq": [float(f) for f in inv_freq]}


def table(
    backend: _core.Backend, positions: list[int], prompt_len: list[int], rope: dict
) -> tuple[np.ndarray, np.ndarray]:
    return _core.ops.rope_table(
        backend, np.asarray(positions, np.int32), np.asarray(prompt_len, np.int32), json.dumps(rope)
    )


@pytest.mark.parametrize("scaling", [1.0, 1.2079442])
@pytest.mark.parametrize("rotary", [2, 6, 16, 64, 256])
def test_rope_table(backend: _core.Backend, rotary: int, scaling: float) -> None:
    rope = rope_config(rotary, attention_scaling=scaling)
    positions = [0, 1, 2, 3, 63, 64, 100, 1023, 8191, 131071]
    cos, sin = table(backend, positions, [5] * len(positions), rope)
    angles = reference.rope_angles(np.asarray(positions), np.full(len(positions), 5), rope)
    scaling = np.float32(scaling)
    # The angle p * inv_freq is one f32 product (as in transformers): half a unit of the angle,
    # which a cosine passes on at most unchanged; then one rounding of the cosine and one of the
    # product with the scaling.
    bound = (U * np.abs(angles) + 3 * U) * scaling
    assert_within(cos, np.cos(angles) * scaling, bound)
    assert_within(sin, np.sin(angles) * scaling, bound)


def test_far_positions_lose_nothing_but_the_angle(backend: _core.Backend) -> None:
    """Cosine and sine are those of the f32 angle, rounded: an f32 reduction of it would not do."""
    rope = rope_config(128, base=500000.0)
    positions = np.asarray([1, 777, 131071, 1 << 20, (1 << 24) - 1], np.int32)
    cos, sin = table(backend, positions.tolist(), [1] * len(positions), rope)
    inv_freq = np.asarray(rope["inv_freq"], np.float32)
    angles = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)
    for got, want in [(cos, np.cos(angles)), (sin, np.sin(angles))]:
        assert_within(got, want, U * 1.001 * np.abs(want) + 1e-45)


def test_tables_of_two_models_do_not_mix(backend: _core.Backend) -> None:
    ropes = [rope_config(16), rope_config(16, base=100.0), rope_config(6)]
    alone = [table(backend, [3, 99], [1, 1], rope) for rope in ropes]
    for i in (0, 1, 0, 2, 1):
        for got, want in zip(table(backend, [3, 99], [1, 1], ropes[i]), alone[i], strict=True):
            assert_same_bits(got, want)
    assert np.any(alone[0][0] != alone[1][0])


def test_dynamic_scaling_depends_on_prompt_and_position_only(backend: _core.Backend) -> None:
    rope = rope_config(16, dynamic_factor=2.0, original_context=64)
    cases = [(p, n) for p in (0, 10, 63, 64, 100, 500) for n in (1, 64, 65, 300)]
    positions, prompt_len = (list(x) for x in zip(*cases, strict=True))
    cos, sin = table(backend, positions, prompt_len, rope)
    angles = reference.rope_angles(np.asarray(positions), np.asarray(prompt_len), rope)
    # As above, and the powers that form the base are f32 or better: a few units of the exponent's
    # size (ln base < 12).
    bound = 3 * U + 16 * U * np.abs(angles)
    assert_within(cos, np.cos(angles), bound)
    assert_within(sin, np.sin(angles), bound)
    short = positions.index(10)
    plain = table(backend, [10], [1], rope_config(16))
    assert_same_bits(cos[short : short + 1], plain[0])
    assert np.any(angles[positions.index(100)] != 100 * np.asarray(rope["inv_freq"]))
    for row, (p, n) in enumerate(cases):
        alone = table(backend, [p], [n], rope)
        assert_same_bits(alone[0], cos[row : row + 1])
        assert_same_bits(alone[1], sin[row : row + 1])
