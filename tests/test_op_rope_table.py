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
