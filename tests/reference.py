"""The reference of each op: NumPy in float64, from the decoding rules; the only one here.

Inputs are taken as they are: callers round them to the op's types beforehand.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special


def embed(tokens: np.ndarray, weight: np.ndarray, scale: float) -> np.ndarray:
    return weight.astype(np.float64)[tokens] * scale


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def linear(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    out = x.astype(np.float64) @ weight.astype(np.float64).T
    out = out if bias is None else out + bias
    return out if residual is None else out + residual


def inv_freq(rope: dict, position: int, prompt_len: int) -> np.ndarray:
    given = np.asarray(rope["inv_freq"], np.float64)
    n, original = max(prompt_len, position + 1), rope["original_context"]
    if not rope["dynamic_factor"] or n <= original:
        return given
    dim, factor = 2 * len(given), rope["dynamic_factor"]
    base = rope["base"] * (factor * n / original - (factor - 1)) ** (dim / (dim - 2))
    return base ** (-2.0 * np.arange(len(given)) / dim)


def rope_angles(positions: np.ndarray, prompt_len: np.ndarray, rope: dict) -> np.ndarray:
    return np.stack(
        [p * inv_freq(rope, int(p), int(n)) for p, n in zip(positions, prompt_len, strict=True)]
    )


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Pairs (i, i + rotary / 2) of x [R, heads, D]; the rest of D passes unchanged."""
    half = cos.shape[1]
    out = x.astype(np.float64)
    a, b = out[..., :half].copy(), out[..., half : 2 * half].copy()
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    out[..., :half], out[..., half : 2 * half] = a * c - b * s, b * c + a * s
    return out


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """One row: q [H, D] over the keys that it sees, k and v [S, Hkv, D]."""
    group = q.shape[0] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("hd,shd->hs", q.astype(np.float64), k) * scale
    return np.einsum("hs,shd->hd", special.softmax(scores, axis=1), v)


def gated_activation(gate_up: np.ndarray, activation: str) -> np.ndarray:
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    if activation == "silu":
        return gate * special.expit(gate) * up
    if activation == "gelu":
        return 0.5 * gate * special.erfc(-gate / np.sqrt(2.0)) * up
    return gate * special.expit(2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)) * up


def residual_silu(y: np.ndarray, u: np.ndarray) -> np.ndarray:
    y = y.astype(np.float64)
    return u + y * special.expit(y)


def top_k(x: np.ndarray, k: int) -> np.ndarray:
    """Ids [R, k]: the greatest first, ties to the lower id."""
    return np.stack([np.lexsort((np.arange(len(row)), -row))[:k] for row in x])


def compact_kv(rows: np.ndarray, length: int, path: Sequence[int]) -> np.ndarray:
    """Rows [slots, ...] after row(length + i) = row(length + path[i])."""
    out = rows.copy()
    out[length : length + len(path)] = rows[[length + node for node in path]]
    return out


# Noise: Philox4x32-10 (Salmon et al., 2011) and the Gumbel variate of a 32-bit word.


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    (c0, c1, c2, c3), (k0, k1), mask = counter, key, 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & mask, (a >> 32) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def noise_words(seed: int, sample_index: int, position: int, vocab: int) -> np.ndarray:
    key = (seed & 0xFFFFFFFF, seed >> 32)
    blocks = [philox((block, position, sample_index, 0), key) for block in range(-(-vocab // 4))]
    return np.asarray(blocks, np.uint32).reshape(-1)[:vocab]


def gumbel(x: np.ndarray) -> np.ndarray:
    """-log(-log(1 - u)), u = (x + 0.5) / 2^32, in the widest float there is."""
    u = (x.astype(np.longdouble) + 0.5) / 2**32
    return -np.log(-np.log1p(-u))


# Choosing.


@dataclass
class Choice:
    """Sampling options as a request has them."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    sample_index: int = 0


def penalise(logits: np.ndarray, seen: Collection[int], penalty: float) -> np.ndarray:
    """In f32, one rounding for each, as transformers does: which values tie is part of the rule."""
    out, factor = logits.astype(np.float32), np.float32(penalty)
    ids = np.array(sorted(set(seen)), np.int64)
    out[ids] = np.where(out[ids] < 0, out[ids] * factor, out[ids] / factor)
    return out


def tempered(
    logits: np.ndarray, seen: Collection[int], penalty: float, temperature: float
) -> np.ndarray:
    """y / T, an f32 quotient."""
    return (penalise(logits, seen, penalty) / np.float32(temperature)).astype(np.float64)


def kept(y: np.ndarray, top_k: int, top_p: float, min_p: float) -> list[int]:
    """Ids that pass the filters on y = logits / T, greatest first."""
    order = np.lexsort((np.arange(len(y)), -y))[: top_k or None]
    share = np.exp(y[order] - y[order[0]])
    mass = [int(np.floor(2.0**32 * part + 0.5)) for part in share]
    before = np.cumsum([0, *mass[:-1]])
    passed = (before < top_p * sum(mass)) & (share >= min_p) if top_p < 1 else share >= min_p
    return [int(i) for i in order[passed]]


def scores(
    logits: np.ndarray, seen: Collection[int], choice: Choice, position: int
) -> tuple[np.ndarray, list[int]]:
    """What the argmax is taken over [V], and the ids that it may take."""
    if choice.temperature == 0:
        y = penalise(logits, seen, choice.repetition_penalty)
        return y.astype(np.float64), list(range(len(y)))
    y = tempered(logits, seen, choice.repetition_penalty, choice.temperature)
    noise = gumbel(noise_words(choice.seed, choice.sample_index, position, len(y)))
    return y + noise.astype(np.float64), kept(y, choice.top_k, choice.top_p, choice.min_p)


def choose(logits: np.ndarray, seen: Collection[int], choice: Choice, position: int) -> int:
    score, ids = scores(logits, seen, choice, position)
    return min(ids, key=lambda i: (-score[i], i))


def walk(
    tokens: Sequence[int],
    parents: Sequence[int],
    choose_at: Callable[[int, list[int]], int],
    eos: Collection[int],
    max_tokens: int,
) -> tuple[list[int], list[int]]:
    """Path and emitted tokens; choose_at(node, path to it) is the model's own token there."""
    path, emitted = [0], []
    while True:
        emitted.append(choose_at(path[-1], path))
        if emitted[-1] in eos or len(emitted) == max_tokens:
            return path, emitted
        children = [
            c for c, parent in enumerate(parents) if parent == path[-1] and tokens[c] == emitted[-1]
        ]
        if not children:
            return path, emitted
        path.append(children[0])


def typical(
    logits: np.ndarray,
    tokens: Sequence[int],
    parents: Sequence[int],
    temperature: float,
    epsilon: float,
    delta: float,
) -> list[int]:
    """The deepest path of typical tokens, the likeliest among equals."""
    paths, log_mass = {0: [0]}, {0: 0.0}
    for node in range(1, len(tokens)):
        parent, row = parents[node], logits[parents[node]].astype(np.float64)
        if temperature == 0:
            p, threshold = (np.arange(len(row)) == np.argmax(row)).astype(np.float64), 0.5
        else:
            p = special.softmax(row / temperature)
            threshold = min(epsilon, delta * np.exp(np.sum(p * np.log(p + 1e-5))))
        if parent in paths and p[tokens[node]] > threshold:
            paths[node] = [*paths[parent], node]
            log_mass[node] = log_mass[parent] + np.log(p[tokens[node]])
    return paths[max(paths, key=lambda node: (len(paths[node]), log_mass[node], -node))]
