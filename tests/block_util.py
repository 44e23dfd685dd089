"""Weights in blocks: the package gguf quantises and reads them, NumPy rounds the rows of x."""

import gguf
import numpy as np

BLOCK_TYPES = ["q8_0", "q4_0", "q4_1", "q4_k"]
_TYPES = {
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
    "q4_k": gguf.GGMLQuantizationType.Q4_K,
}
GROUP = 32


def block_inputs(dtype: str) -> int:
    """Inputs of one block."""
    return 256 if dtype == "q4_k" else GROUP


def random_blocks(rng: np.random.Generator, outputs: int, inputs: int, dtype: str) -> np.ndarray:
    """Rows of uint8 whose values look like a model's weights."""
    if dtype != "q4_k":
        weight = (0.1 * rng.standard_normal((outputs, inputs))).astype(np.float32)
        return quantised(weight, dtype)
    # The package only reads this type: random bytes, with d and dmin of a sensible size.
    blocks = rng.integers(0, 256, (outputs, inputs // 256, 144)).astype(np.uint8)
    blocks[..., :4] = (
        rng.uniform(1e-4, 1e-3, (outputs, inputs // 256, 2)).astype(np.float16).view(np.uint8)
    )
    return blocks.reshape(outputs, -1)


def quantised(weight: np.ndarray, dtype: str) -> np.ndarray:
    """Rows of uint8."""
    if dtype == "q4_k":
        return _quantised_q4_k(weight)
    return np.asarray(gguf.quantize(weight, _TYPES[dtype]))


def values(blocks: np.ndarray, dtype: str) -> np.ndarray:
    """What the blocks hold, f32."""
    return np.asarray(gguf.dequantize(blocks, _TYPES[dtype]))


def rounded_rows(x: np.ndarray) -> np.ndarray:
    """Rows of x as the product reads them: 8 bits and a scale for each 32."""
    groups = np.pad(x, ((0, 0), (0, -x.shape[1] % GROUP))).reshape(len(x), -1, GROUP)
    most = np.abs(groups).max(axis=-1, keepdims=True).astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(most < np.float32(1e-35), np.float32(0), np.float32(127) / most)
    q = np.rint(groups * inverse)
    scale = np.where(most < np.float32(1e-35), np.float32(0), most / np.float32(127))
    return (q.astype(np.float64) * scale).reshape(len(x), -1)[:, : x.shape[1]]


def _quantised_q4_k(weight: np.ndarray) -> np.ndarray:
    """To the nearest of 16 values between the ends of each 32; the package cannot write this type.

    A block of 256 is d, dmin (f16), eight scales and eight minima of 6 bits in 12 bytes, 256
    nibbles: value = d scale q - dmin minimum.
    """
    groups = weight.reshape(len(weight), -1, 8, GROUP).astype(np.float64)
    low = np.minimum(groups.min(axis=-1), 0)
    step = np.maximum((groups.max(axis=-1) - low) / 15, 1e-9)
    d = (step.max(axis=-1, keepdims=True) / 63).astype(np.float16)
    dmin = (np.maximum(-low, 1e-9).max(axis=-1, keepdims=True) / 63).astype(np.float16)
    scale = np.clip(np.rint(step / d), 1, 63).astype(np.uint8)
    minimum = np.clip(np.rint(-low / dmin), 0, 63).astype(np.uint8)
    q = (groups + (dmin * minimum.astype(np.float64))[..., None]) / (d * scale.astype(np.float64))[
        ..., None
    ]
    q = np.clip(np.rint(q), 0, 15).astype(np.uint8)
    blocks = np.zeros((*groups.shape[:2], 144), np.uint8)
    blocks[..., :2] = d.view(np.uint8)
    blocks[..., 2:4] = dmin.view(np.uint8)
    blocks[..., 4:8] = scale[..., :4] | (scale[..., 4:] >> 4 << 6)
    blocks[..., 8:12] = minimum[..., :4] | (minimum[..., 4:] >> 4 << 6)
    blocks[..., 12:16] = (scale[..., 4:] & 15) | (minimum[..., 4:] & 15) << 4
    blocks[..., 16:] = (q[..., ::2, :] | q[..., 1::2, :] << 4).reshape(*groups.shape[:2], 128)
    return blocks.reshape(len(weight), -1)
