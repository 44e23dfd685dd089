"""Rotary embeddings: each scaling variant becomes inverse frequencies, as in transformers."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_ext.loading.errors import LoadError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def powers(base: float, dim: int) -> NDArray[np.float32]:
    """The powers base ** (2i / dim), [dim / 2] f32, rounded where transformers rounds.

    The power itself is taken in f64: f32 `pow` differs by a unit in the last place between
    libraries.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    exact: NDArray[np.float64] = np.power(np.float64(base), exponents.astype(np.float64))
    return exact.astype(np.float32)


def canonical_rope(
    params: dict[str, Any], head_dim: int, max_context: int, where: str
) -> dict[str, Any]:
    """The `rope` object of ModelConfig.

    Args:
        params: `rope_parameters` of transformers 5: rope_type, rope_theta, and what the type needs.
        head_dim: elements rotated per head, even.
        max_context: the config's max_position_embeddings, tokens.
        where: the file, for messages.

    Raises:
        LoadError: an unknown type, or a missing or impossible parameter, by name.
    """
    kind = params.get("rope_type", "default")
    if kind not in KINDS:
        raise LoadError(
            f"{where}: rope type {kind!r} is not supported; supported are {', '.join(KINDS)}"
        )
    if params.get("partial_rotary_factor", 1.0) != 1.0:
        raise LoadError(
            f"{where}: partial_rotary_factor {params['partial_rotary_factor']!r} is not "
            "supported, only 1.0"
        )
    base = _number(params, "rope_theta", where)
    if head_dim % 2 or head_dim < 4:
        raise LoadError(
            f"{where}: head_dim {head_dim} cannot be rotated; it must be even and at least 4"
        )
    inv_freq = np.float32(1) / powers(base, head_dim)
    rope: dict[str, Any] = {
        "attention_scaling": 1.0,
        "dynamic_factor": 0.0,
        "base": base,
        "original_context": 0,
    }
    if kind == "linear":
        inv_freq = inv_freq / np.float32(_number(params, "factor", where))
    elif kind == "dynamic":
        rope["dynamic_factor"] = _number(params, "factor", where)
        rope["original_context"] = max_context
    elif kind == "llama3":
        inv_freq = _llama3(inv_freq, params, where)
    elif kind == "yarn":
        inv_freq, rope["attention_scaling"] = _yarn(base, head_dim, params, max_context, where)
    if not np.isfinite(inv_freq).all():
        raise LoadError(
            f"{where}: the rope parameters {params} give frequencies that are not finite"
        )
    rope["inv_freq"] = [float(value) for value in inv_freq.astype(np.float32)]
    return rope


def reach(params: dict[str, Any], max_context: int) -> int:
    """Tokens that the scaled embedding covers; `dynamic` and `yarn` may go beyond the config's."""
    factor = float(params.get("factor") or 1.0)
    if params.get("rope_type") == "dynamic":
        return int(max_context * max(factor, 1.0))
    if params.get("rope_type") == "yarn":
        return max(
            max_context, int(params.get("original_max_position_embeddings", max_context) * factor)
        )
    return max_context


def _number(params: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = params.get(key, default)
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not valid or not 1e-15 < value < 1e15:  # type: ignore[operator]
        raise LoadError(
            f"{where}: rope parameter {key} is {value!r}; wanted a number above 0 and below 1e15"
        )
    return float(value)  # type: ignore[arg-type]


def _llama3(
    inv_freq: NDArray[np.float32], params: dict[str, Any], where: str
) -> NDArray[np.float32]:
    factor = np.float32(_number(params, "factor", where))
    low, high = (
        _number(params, "low_freq_factor", where),
        _number(params, "high_freq_factor", where),
    )
    context = _number(params, "original_max_position_embeddings", where)
    if high <= low:
        raise LoadError(
            f"{where}: rope parameter high_freq_factor {high} must be above low_freq_factor {low}"
        )
    wavelength = np.float32(2 * math.pi) / inv_freq
    stretched = np.where(wavelength > context / low, inv_freq / factor, inv_freq)
    smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1) - smooth) * stretched / factor + smooth * stretched
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return np.where(between, blended, stretched).astype(np.float32)


def _yarn(
    base: float, dim: int, params: dict[str, Any], max_context: int, where: str
) -> tuple[NDArray[np.float32], float]:
    context = _number(params, "original_max_position_embeddings", where, max_context)
    factor = (
        _number(params, "factor", where)
        if params.get("factor") is not None
        else max_context / context
    )
    if params.get("attention_factor") is not None:
        scaling = _number(params, "attention_factor", where)
    elif params.get("mscale") and params.get("mscale_all_dim"):
        mscale, all_dim = (_number(params, key, where) for key in ("mscale", "mscale_all_dim"))
        scaling = _magnitude(factor, mscale) / _magnitude(factor, all_dim)
    else:
        scaling = _magnitude(factor, 1.0)
    fast = _number(params, "beta_fast", where) if params.get("beta_fast") else 32.0
    slow = _number(params, "beta_slow", where) if params.get("beta_slow") else 1.0
    if base == 1:
        raise LoadError(f"{where}: rope_theta 1 has no yarn scaling")

    def correction(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction(fast), correction(slow)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # no ramp of width 0
    ramp = np.clip(
        (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1
    )
    kept = np.float32(1) - ramp
    plain = np.float32(1) / powers(base, dim)
    stretched = np.float32(1) / (np.float32(factor) * powers(base, dim))
    return (stretched * (np.float32(1) - kept) + plain * kept).astype(np.float32), scaling


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
