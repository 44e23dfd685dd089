"""Tiny random models, a drafter that knows the answer, and the one-at-a-time decoding that all of them must equal."""

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from medusa_ext import _core
from util import isa_of

CONTEXT = 448  # of every tiny model: seven pages
SPARE = 16  # tokens that the drafter knows beyond the end of a request
Rng = np.random.Generator


@dataclass(frozen=True)
class Shape:
    """A tiny model and its heads.

    Unless embeddings are tied, the model is a trap for the order of sums: the two halves of the residual stream are
    equal, and token 2i + 1 has token 2i's row of lm_head with some columns of one half swapped against the other. The two
    logits are the same sum in another order: they differ by rounding alone, and rounding picks the token, whose embedding
    is unlike its twin's. One changed bit anywhere upstream soon changes the whole text.
    """

    name: str
    dtype: str
    vocab: int = 97
    hidden: int = 64
    inner: int = 80
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    windows: tuple[int, int] = (0, 0)
    config: tuple[tuple[str, Any], ...] = ()  # further keys of ModelConfig
    rope: tuple[tuple[str, Any], ...] = ()  # further keys of RopeConfig
    rotary: int = 0  # rotated dimensions; 0: all
    heads: int = 0
    head_layers: int = 0
    head_vocab: int = 0  # rows of each head's own lm_head; 0: the model's is shared
    logit_scale: float = 3.0  # standard deviation of the logits


SHAPES = [
    Shape("f32", "f32", heads=3, head_layers=1),
    Shape(
        "bf16-token-map", "bf16", 130, 96, 72, 6, 2, heads=4, head_layers=2, head_vocab=50,
        config=(("qkv_bias", True),),
    ),
    Shape("f16-one-window", "f16", windows=(24, 0), heads=2, head_vocab=97),
    Shape(
        "f32-dynamic-rope", "f32", 80, 48, 56, 4, 1, 12, heads=2, head_layers=1,
        rope=(("dynamic_factor", 2.0), ("base", 1000.0), ("original_context", 48)),
    ),
    Shape(
        "bf16-windows-norms-biases", "bf16", 64, 64, 48, windows=(17, 70), heads=1, head_layers=1,
        config=(("qk_norm", True), ("qkv_bias", True), ("o_bias", True), ("mlp_bias", True)),
    ),
    Shape(
        "f16-tied", "f16", 101, 40, 44, 2, 2, 20, heads=3, head_vocab=101, logit_scale=1.0,
        config=(("tied_embeddings", True), ("activation", "gelu_tanh"), ("embedding_scale", 2.0)),
    ),
    Shape("bf16-wide", "bf16", 512, 160, 200, 8, 2, 20),
    Shape(
        "f32-part-rotary", "f32", 64, 72, 60, 3, 3, 24, rotary=16, heads=4, head_layers=1,
        config=(("activation", "gelu"), ("attention_scale", 0.3), ("o_bias", True)),
        rope=(("attention_scaling", 1.1),),
    ),
]  # fmt: skip


def config_json(shape: Shape) -> str:
    """ModelConfig of a shape."""
    rotary = shape.rotary or shape.head_dim
    rope = {"attention_scaling": 1.0, "dynamic_factor": 0.0, "base": 1000.0, "original_context": 0}
    rope |= dict(shape.rope)
    inv_freq = [rope["base"] ** (-2 * i / rotary) for i in range(rotary // 2)]
    config = {
        "family": "tiny",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_layers": 2,
        "num_heads": shape.q_heads,
        "num_kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_context": CONTEXT,
        "rms_norm_eps": 1e-5,
        "activation": "silu",
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "tied_embeddings"), False),
        "embedding_scale": 1.0,
        "attention_scale": 0.0,
        "windows": list(shape.windows),
        "rope": {"inv_freq": inv_freq, **rope},
        "heads": {
            "num_heads": shape.heads,
            "num_layers": shape.head_layers,
            "shared_lm_head": shape.head_vocab == 0,
            "head_vocab": shape.head_vocab,
        },
    }
    return json.dumps(config | dict(shape.config))


def mirrored(x: np.ndarray, axis: int) -> np.ndarray:
    """The second half of an axis made equal to the first."""
    half = np.take(x, range(x.shape[axis] // 2), axis)
    return np.ascontiguousarray(np.concatenate([half, half], axis))


def with_twins(rng: Rng, weight: np.ndarray) -> np.ndarray:
    """Odd rows become the row before, with some columns swapped against the same column of the other half."""
    out, half = weight.copy(), weight.shape[1] // 2
    for row in range(1, len(out), 2):
        pick = np.flatnonzero(rng.random(half) < 0.5)
        out[row] = out[row - 1]
        out[row, pick], out[row, pick + half] = out[row - 1, pick + half], out[row - 1, pick]
    return out


def tiny_weights(shape: Shape) -> dict[str, np.ndarray]:
    """Every tensor that ModelBuilder wants for a shape, f32."""
    config = json.loads(config_json(shape))
    rng = np.random.default_rng(list(shape.name.encode()))
    d, q_rows, kv_rows = shape.hidden, shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * scale / columns**0.5).astype(np.float32)

    def gain(size: int) -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(size)).astype(np.float32)

    weights = {
        "embed_tokens.weight": mirrored(matrix(shape.vocab, d, d**0.5), 1),
        "norm.weight": mirrored(gain(d), 0),
    }
    if config["tied_embeddings"]:  # random signs, or every token would be its own likeliest successor
        weights["norm.weight"] *= mirrored(rng.choice([-1, 1], d).astype(np.float32), 0)
    else:
        weights["lm_head.weight"] = with_twins(rng, matrix(shape.vocab, d, shape.logit_scale))
    for layer in range(2):
        block = {
            "attn_norm": gain(d),
            "mlp_norm": gain(d),
            # Sharp attention: a wrong or missing key is seen.
            "q_proj": matrix(q_rows, d, 1.5),
            "k_proj": matrix(kv_rows, d, 1.5),
            "v_proj": matrix(kv_rows, d, 1.5),
            "o_proj": mirrored(matrix(d, q_rows, 2.0), 0),
            "gate_proj": matrix(shape.inner, d),
            "up_proj": matrix(shape.inner, d),
            "down_proj": mirrored(matrix(d, shape.inner, 2.0), 0),
        }
        if config["qk_norm"]:
            block |= {"q_norm": 1.5 * gain(shape.head_dim), "k_norm": gain(shape.head_dim)}
        weights |= {f"layers.{layer}.{name}.weight": value for name, value in block.items()}
        biased = {
            "qkv_bias": ("q_proj", "k_proj", "v_proj"),
            "o_bias": ("o_proj",),
            "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
        }
        for key, names in biased.items():
            for name in names if config[key] else ():
                bias = 0.3 * rng.standard_normal(len(block[name])).astype(np.float32)
                is_stream = name in ("o_proj", "down_proj")
                weights[f"layers.{layer}.{name}.bias"] = mirrored(bias, 0) if is_stream else bias
    for head in range(shape.heads):
        for layer in range(shape.head_layers):
            weights[f"heads.{head}.{layer}.weight"] = matrix(d, d)
            weights[f"heads.{head}.{layer}.bias"] = 0.1 * rng.standard_normal(d).astype(np.float32)
        if shape.head_vocab:
            weights[f"heads.{head}.lm_head.weight"] = matrix(shape.head_vocab, d)
    if 0 < shape.head_vocab < shape.vocab:
        weights["heads.token_map"] = rng.permutation(shape.vocab)[: shape.head_vocab].astype(np.int32)
    return weights


def build_model(shape: Shape, backend: _core.Backend, *, zero: bool = False) -> _core.Model:
    """zero: every output weight is 0, so that all logits tie everywhere."""
    builder = _core.ModelBuilder(config_json(shape), shape.dtype, backend)
    for name, value in tiny_weights(shape).items():
        builder.add(name, np.zeros_like(value) if zero and "lm_head" in name else value)
    return builder.finish()


@cache
def backend_for(isa: str, threads: int) -> _core.Backend:
    """One backend for each pair."""
    return _core.Backend("cpu", threads=threads, isa=isa)


@cache
def model_for(shape: Shape, isa: str, threads: int) -> _core.Model:
    """One model for each triple."""
    return build_model(shape, backend_for(isa, threads))


# Requests.


@dataclass(frozen=True)
class Job:
    """One request. sampling: keyword arguments of SamplingParams, as pairs."""

    prompt: tuple[int, ...]
    max_new: int = 0
    sampling: tuple[tuple[str, Any], ...] = ()
    eos: tuple[int, ...] = ()
    reuse: bool = True

    def submit(self, session: _core.Session) -> int:
        return session.submit(
            self.prompt,
            max_new_tokens=self.max_new,
            sampling=_core.SamplingParams(**dict(self.sampling)),
            eos_ids=self.eos,
            reuse_prefix=self.reuse,
        )

    def limit(self, max_context: int) -> int:
        """Tokens that it may emit."""
        room = max_context - len(self.prompt)
        return min(self.max_new or room, room)


@dataclass
class Outcome:
    """What a session answered."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    stats: _core.RequestStats | None = None


def plain_tokens(model: _core.Model, job: Job, max_context: int) -> list[int]:
    """One token a step, alone, whole prompt at once, no end-of-sequence, SPARE tokens longer than the job may become."""
    room = json.loads(model.config)["max_context"] - len(job.prompt)
    count = min(job.limit(max_context) + SPARE, room)
    session = _core.Session(model, None, max_batch=1, prefill_chunk=512)
    alone = dataclasses.replace(job, max_new=count, eos=(), reuse=False)
    outcome = run(session, [alone])[0]
    assert len(outcome.tokens) == count
    assert outcome.finish == "length"
    return outcome.tokens


def cut(tokens: list[int], job: Job, max_context: int) -> tuple[list[int], str]:
    """The answer within a longer one: up to the first end-of-sequence token or the limit."""
    kept = tokens[: job.limit(max_context)]
    ends = [i for i, token in enumerate(kept) if token in job.eos]
    return (kept[: ends[0] + 1], "stop") if ends else (kept, "length")


@cache
def known_tokens(shape: Shape, isa: str, job: Job, max_context: int) -> tuple[int, ...]:
    """plain_tokens on one thread, computed once for each job."""
    return tuple(plain_tokens(model_for(shape, isa, 1), job, max_context))


def run(
    session: _core.Session,
    jobs: list[Job],
    *,
    drafter: "ScriptedDrafter | None" = None,
    scripts: list[list[int]] | None = None,
    rng: Rng | None = None,
    cancel_rate: float = 0.0,
) -> list[Outcome]:
    """Every job to its end; with rng, jobs arrive and are cancelled at random between steps. scripts: of each job."""
    outcomes = [Outcome() for _ in jobs]
    owner: dict[int, int] = {}
    submitted = 0
    while submitted < len(jobs) or not session.idle:
        arriving = len(jobs) if rng is None else int(rng.choice([0, 0, 1, 1, 2, 5, 20]))
        for index in range(submitted, min(submitted + arriving, len(jobs))):
            request = jobs[index].submit(session)
            assert request not in owner
            owner[request] = index
            submitted += 1
            if drafter and scripts:
                drafter.scripts[request] = [*jobs[index].prompt, *scripts[index]]
        if rng is not None and owner and rng.random() < cancel_rate:
            request = int(rng.choice(list(owner)))
            assert session.cancel(request) == (outcomes[owner[request]].finish is None)
        take_events(session.step(), owner, outcomes, drafter)
    check_empty(session)
    return outcomes


def take_events(
    events: list[_core.Event],
    owner: dict[int, int],
    outcomes: list[Outcome],
    drafter: "ScriptedDrafter | None" = None,
) -> None:
    """Events of a step into the outcomes of their jobs."""
    for event in events:
        outcome = outcomes[owner[event.request]]
        assert outcome.finish is None, "an event after the last one"
        assert event.tokens or event.finish == "cancelled"
        outcome.tokens += event.tokens
        if event.finish is None:
            continue
        outcome.finish, outcome.stats = event.finish, event.stats
        lengths = event.stats.accepted_lengths
        assert sum(n * count for n, count in enumerate(lengths)) == len(outcome.tokens)
        assert sum(lengths) == event.stats.steps
        if drafter:
            drafter.ended(event)


def check_empty(session: _core.Session) -> None:
    """Nothing runs, and only pages kept for reuse are taken."""
    stats = session.stats()
    assert (stats.active, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert 0 <= stats.pages_cached <= stats.pages_total


def check(job: Job, outcome: Outcome, known: list[int], max_context: int, what: str) -> None:
    """The outcome is exactly what one-at-a-time decoding says; a cancelled one is the beginning of it."""
    want, finish = cut(known, job, max_context)
    got = outcome.tokens
    if outcome.finish == "cancelled":
        want, finish = want[: len(got)], "cancelled"
    if got != want:
        at = next((i for i, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), min(len(got), len(want)))
        raise AssertionError(
            f"{what}: {len(got)} tokens, wanted {len(want)}; the first difference is at {at} after a prompt of "
            f"{len(job.prompt)}: {got[at : at + 5]}, wanted {want[at : at + 5]}; {job}"
        )
    assert outcome.finish == finish, f"{what}: finish {outcome.finish}, wanted {finish}; {job}"


# Drafters.


class ScriptedDrafter(_core.Drafter):
    """Knows each request's continuation and hides it in random trees: right nodes stop at a random depth and stand anywhere
    among wrong siblings, doubles, unusable tokens and paths deeper than allowed."""

    def __init__(self, seed: int, max_nodes: int, vocab: int) -> None:
        super().__init__()
        self.scripts: dict[int, list[int]] = {}
        self.met: Counter[str] = Counter()
        self._rng = np.random.default_rng(seed)
        self._max_nodes, self._vocab = max_nodes, vocab
        self._right_depth: dict[int, int] = {}  # of the last tree: how far it follows the script
        self._max_depth: dict[int, int] = {}

    @property
    def max_nodes(self) -> int:
        return self._max_nodes

    def draft(self, inputs: list[_core.DraftInput]) -> list[tuple[list[int], list[int]]]:
        return [self._tree(each) for each in inputs]

    def _tree(self, each: _core.DraftInput) -> tuple[list[int], list[int]]:
        rng = self._rng
        script, length = self.scripts[each.request], len(each.tokens)
        self._max_depth[each.request] = each.max_depth
        self._right_depth[each.request] = 0
        num_nodes = int(rng.integers(1, each.max_nodes + 1)) if rng.random() < 0.8 else each.max_nodes
        skill = rng.choice([0.0, 0.3, 0.6, 0.9])
        right_limit = int(rng.integers(0, 12))
        tokens: list[int] = []
        parents: list[int] = []
        depth, is_right = [0], [True]
        tip = 0  # deepest right node
        while len(tokens) < num_nodes - 1:
            pick = rng.random()
            parent = tip if pick < skill else len(tokens) if pick < skill + 0.05 else int(rng.integers(len(depth)))
            at = length + depth[parent]
            right = script[at] if at < len(script) else 0
            if parent == tip and depth[tip] < right_limit and rng.random() < 0.7:
                token = right
            else:
                others = [int(rng.integers(self._vocab)), right ^ 1, 0, self._vocab, 2**31 - 1]
                token = others[int(rng.choice(len(others), p=[0.8, 0.1, 0.06, 0.02, 0.02]))]
            tokens.append(token)
            parents.append(parent)
            depth.append(depth[parent] + 1)
            is_right.append(is_right[parent] and at < len(script) and token == right)
            if is_right[-1] and depth[-1] > depth[tip]:
                tip = len(tokens)
        self._right_depth[each.request] = depth[tip]
        return tokens, parents

    def ended(self, event: _core.Event) -> None:
        """Counts ends that fell inside a path which would have been accepted further."""
        count, right = len(event.tokens), self._right_depth.get(event.request, 0)
        if event.finish == "stop" and count >= 2 and min(right, self._max_depth[event.request]) > count:
            self.met["eos inside an accepted path"] += 1
        if event.finish == "length" and count >= 2 and right >= count:
            self.met["limit inside a right path"] += 1


def random_paths(rng: Rng, num_nodes: int, max_depth: int, max_ranks: int) -> list[list[int]]:
    """Paths of a random valid tree, at most num_nodes with the root."""
    paths: list[tuple[int, ...]] = [()]
    for _ in range(8 * num_nodes):
        parent = paths[int(rng.integers(len(paths)))]
        path = (*parent, int(rng.integers(max_ranks)))
        if len(path) <= max_depth and path not in paths and len(paths) < num_nodes:
            paths.append(path)
    return [list(path) for path in paths[1:]]


# Random requests.


def random_sampling(rng: Rng) -> tuple[tuple[str, Any], ...]:
    """Greedy or seeded, with any of the filters."""
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        options["repetition_penalty"] = float(rng.choice([0.8, 1.1, 1.5]))
    if rng.random() < 0.5:
        return tuple(options.items())
    options["temperature"] = float(rng.choice([0.05, 0.4, 0.8, 1.0, 1.7]))
    seeds = [0, 1, int(rng.integers(2**63)), 2**64 - 1]
    options["seed"] = seeds[int(rng.integers(len(seeds)))]
    options["sample_index"] = int(rng.integers(3))
    if rng.random() < 0.4:
        options["top_k"] = int(rng.choice([1, 2, 5, 31, 1000]))
    if rng.random() < 0.4:
        options["top_p"] = float(rng.choice([1e-6, 0.3, 0.8, 0.95]))
    if rng.random() < 0.4:
        options["min_p"] = float(rng.choice([0.01, 0.1, 0.5]))
    return tuple(options.items())


def random_prompt(rng: Rng, vocab: int, max_length: int) -> tuple[int, ...]:
    """Any text, a repeated phrase, or token 0 everywhere; lengths beside page borders are likely."""
    lengths = [1, 2, 63, 64, 65, 128, 129, *rng.integers(1, 301, 4), *rng.integers(1, 30, 4)]
    length = min(int(rng.choice(lengths)), max_length)
    kind = rng.random()
    if kind < 0.1:
        return (0,) * length
    text = rng.integers(0, vocab, length)
    if kind < 0.4:
        text = np.resize(text[: int(rng.integers(2, 12))], length)
    return tuple(int(token) for token in text)


class Tally:
    """Counts what the cases of a module met, for each instruction set."""

    def __init__(self) -> None:
        self._met: dict[str, Counter[str]] = {}

    def of(self, backend: _core.Backend) -> Counter[str]:
        return self._met.setdefault(isa_of(backend), Counter())

    def add(self, backend: _core.Backend, session: _core.Session, outcomes: list[Outcome]) -> None:
        """The statistics of a session whose requests are over."""
        met = self.of(backend)
        stats = session.stats()
        met["cases"] += 1
        met["set-backs"] += stats.set_backs
        met["compactions across a page border"] += stats.compactions_across_pages
        for outcome in outcomes:
            lengths = outcome.stats.accepted_lengths
            met["requests"] += 1
            met["tokens"] += len(outcome.tokens)
            met["steps"] += sum(lengths)
            met["accepted paths of depth 3 and more"] += sum(lengths[4:])
            met["requests that reused tokens"] += outcome.stats.reused_tokens > 0
            met["distinct tokens"] += len(set(outcome.tokens))
            met[f"finish {outcome.finish}"] += 1
