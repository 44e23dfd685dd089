"""The compiled module.

Arrays are NumPy (C-contiguous); bf16 travels as uint16. Calls release the interpreter lock.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

__version__: str

class CudaError(RuntimeError): ...
class InternalError(RuntimeError): ...

class Backend:
    """A device and its threads.

    device: "cpu", "cuda", "cuda:N", or "auto" for "cuda" where it can be used; threads and isa are
    the CPU's.
    isa: "" picks the best, or what MEDUSA_CPU_ISA names; "generic", "avx2", "avx512".
    """

    def __init__(self, device: str = "cpu", *, threads: int = 0, isa: str = "") -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def detail(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def max_tree_depth(self) -> int:
        """Of a tree's nodes below the root; deeper trees are refused."""
    def memory(self) -> tuple[int, int]:
        """Bytes that are free now, and all that the device (or this process) may use."""

def available_devices() -> list[str]:
    """Names that Backend takes and that work here, "cpu" first."""

def available_isas() -> list[str]:
    """Instruction sets that this build has and this machine runs, slowest first."""

class SafetensorsFile:
    """A mapped safetensors file, checked on opening: header, offsets, overlaps, sizes.

    ValueError names file and tensor.
    """

    def __init__(self, path: str) -> None: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    def names(self) -> list[str]: ...
    def dtype(self, name: str) -> str:
        """As in the file: "F32", "F16", "BF16", "I32", "I64", "F8_E4M3", ..."""
    def shape(self, name: str) -> list[int]: ...
    def array(self, name: str) -> NDArray[Any]:
        """A read-only view of the mapping.

        BF16 as uint16, other types that NumPy lacks as uint8 with a last axis of bytes; a copy
        where the file left the tensor unaligned.
        """
    def release(self, name: str) -> None:
        """Drop the pages of this tensor from resident memory; later reads map them again."""

class ModelBuilder:
    """Takes tensors by the names of csrc/medusa/model.h.

    config: JSON of ModelConfig. dtype: "bf16", "f16", "f32". blocks: "q8_0", "q4_0", "q4_1" or
    "q4_k" by name of a matrix; others are stored as dtype. Tensors of one stored matrix (q, k and
    v; gate and up) must agree.
    """

    def __init__(
        self, config: str, dtype: str, backend: Backend, blocks: Mapping[str, str] = ...
    ) -> None: ...
    def add(self, name: str, array: NDArray[Any], dtype: str | None = None) -> None:
        """Pack one tensor.

        dtype: "bf16" for uint16 arrays that hold it; the block type for rows of uint8, which must
        be the stored one; else the array's own. Floats are quantised where the matrix is stored in
        blocks (not q4_k).
        """
    def finish(self) -> Model: ...

class Model:
    @property
    def config(self) -> str:
        """ModelConfig as JSON."""
    @property
    def dtype(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def kv_bytes_per_token(self) -> int: ...
    @property
    def backend(self) -> Backend: ...

def load_model(path: str, dtype: str, backend: Backend) -> Model:
    """Read a file that `medusa-ext export` wrote; blocks stay as they are."""

def random_model(config: str, dtype: str, seed: int, backend: Backend, weights: str = "") -> Model:
    """Return a model of random weights; weights: block type of all matrices that allow it."""

def score(
    model: Model,
    tokens: Sequence[int],
    chunk: int,
    logits: NDArray[np.float32] | None,
    hidden: NDArray[np.float32] | None,
) -> None:
    """Fill logits [S, V] and hidden [S, d] (after the final norm); None leaves one out."""

def head_candidates(
    model: Model,
    hidden: NDArray[np.float32],
    ids: NDArray[np.int32],
    logits: NDArray[np.float32],
) -> None:
    """Fill ids and logits [num_heads, R, width] with each head's best tokens for hidden [R, d].

    They are what a step at temperature 0 takes for a text whose last hidden state is that row;
    width is at most 256.
    """

class TreeSpec:
    """Node 0 is the root; then the paths sorted by (length, path)."""

    @staticmethod
    def from_paths(paths: Sequence[Sequence[int]]) -> TreeSpec: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def depth(self) -> int: ...
    def num_ranks(self, depth: int) -> int: ...
    def paths(self) -> list[list[int]]: ...
    def parents(self) -> list[int]: ...
    def depths(self) -> list[int]: ...

class DraftInput:
    """One text that a drafter guesses for.

    Attributes:
        request: its id, the same in every step of the text.
        tokens: prompt and output so far; the last one is the root of the tree.
        max_nodes: that the tree may have, the root counted.
        max_depth: of nodes below the root; deeper ones are dropped.
        has_hidden: whether the hidden state of the text is there, which Medusa heads need; drafters
            in Python do not see it.
    """

    request: int
    tokens: list[int]
    max_nodes: int
    max_depth: int
    has_hidden: bool

class Drafter:
    """Base of all drafters; guesses never change the output.

    A subclass defines max_nodes and draft(inputs) -> [(tokens, parents)] without the root; parents
    index the tree, 0 = root.
    """

    def __init__(self) -> None: ...
    @property
    def max_nodes(self) -> int:
        """Of any tree that draft makes, the root counted; read once."""
    def draft(self, inputs: list[DraftInput]) -> list[tuple[list[int], list[int]]]:
        """Return (tokens, parents) for each input, parents before their children.

        Siblings with the same token become one node. Ids beyond the vocabulary are dropped with all
        that follows from them. A negative id, a parent that does not come before its child, or more
        than max_nodes nodes is an error of the step.
        """
    def on_finish(self, request: int) -> None:
        """Called once when a request has ended: drop what was kept for it."""

def medusa_drafter(model: Model, tree: TreeSpec) -> Drafter:
    """Medusa heads whose candidates fill a static tree.

    Raises:
        ValueError: the model has no heads, or the tree does not fit them.
    """

LOOKUP_NGRAM: int  # equal tokens before a place in the text that are told apart
LOOKUP_AHEAD: int  # tokens that the text guesses at most
GUESS_CANDIDATES: int  # of a head, that a dynamic tree of a greedy step takes

class Ngrams:
    """Which tokens follow which; arrays as `medusa_ext.loading.ngrams.Ngrams` has them.

    ValueError where they do not fit each other.
    """

    def __init__(
        self,
        *,
        contexts: NDArray[np.int32],
        counts: NDArray[np.int32],
        unseen: NDArray[np.int8],
        tokens: NDArray[np.int32],
        gains: NDArray[np.int8],
        pair_counts: NDArray[np.int32],
        pair_unseen: NDArray[np.int8],
        pair_tokens: NDArray[np.int32],
        pair_gains: NDArray[np.int8],
    ) -> None: ...
    def gain(self, before: int, last: int, token: int) -> float:
        """Nats by which a token is likelier after two others than elsewhere."""
    def frequent(self, before: int, last: int) -> list[int]:
        """Up to 8 tokens that follow two others most often, then those that follow the last."""

class GuessModel:
    """Weights of what a dynamic tree grows from, see `medusa_ext.calibration.guesses`.

    Args:
        heads: (head, ngram, rest, lookup) of each head; lookup [LOOKUP_NGRAM] or empty.
        chain: [LOOKUP_NGRAM] shares; or empty, and the text takes no part.
        ngrams: or None.

    Raises:
        ValueError: a weight is not finite, a share outside [0, 1], or a list is too short.
    """

    def __init__(
        self,
        heads: Sequence[tuple[float, float, float, Sequence[float]]],
        chain: Sequence[float],
        ngrams: Ngrams | None,
    ) -> None: ...

def dynamic_drafter(model: Model, guesses: GuessModel, max_nodes: int) -> Drafter:
    """Medusa heads for which each step grows a tree of up to max_nodes nodes, the root counted.

    Raises:
        ValueError: the model has other heads than the weights are for, a token of the n-grams is
            beyond the vocabulary, or max_nodes is not 1 to 256.
    """

def grow_tree(
    guesses: GuessModel,
    tokens: Sequence[int],
    ids: NDArray[np.int32],
    logits: NDArray[np.float32],
    max_nodes: int,
    max_depth: int,
) -> list[tuple[int, int]]:
    """The tree of a greedy step, as (parent, token) of each node but the root.

    Args:
        guesses: of the trees.
        tokens: of the text.
        ids: [K, W] that heads offer after it, best first.
        logits: of these.
        max_nodes: the root counted.
        max_depth: of nodes below the root.

    Raises:
        ValueError: arguments do not fit each other.
    """

def walk_guesses(
    guesses: GuessModel,
    tokens: Sequence[int],
    start: int,
    end: int,
    ids: NDArray[np.int32],
    logits: NDArray[np.float32],
    max_nodes: int,
) -> list[int]:
    """Tokens of an answer, counted from 0, at which steps of greedy decoding begin.

    Args:
        guesses: of the trees.
        tokens: of the text, up to the answer's end at least.
        start: of the answer in it, 1 or more.
        end: of the answer, not included.
        ids: [K, end - start - 1, W] that heads offered after each token but the last, best first.
        logits: of these.
        max_nodes: of a tree, the root counted.

    Raises:
        ValueError: arguments do not fit each other.
    """

class Judged(TypedDict):
    """What was offered where the tokens before are the answer's own; R rows, C offers.

    Attributes:
        log_share: [R, K, C], -inf where there is no offer.
        gain: [R, K, C] of the n-grams.
        right: [R, K] which is the answer's token; -1 none, -2 beyond the answer.
        told: [R, K] which the text said before; -1 none.
        matched: [R, K] how many tokens were equal there.
        found: [R] equal tokens before the root, 0 where there are none.
        kept: [R] tokens that followed them and are right, in a row.
    """

    log_share: NDArray[np.float32]
    gain: NDArray[np.float32]
    right: NDArray[np.int8]
    told: NDArray[np.int8]
    matched: NDArray[np.int8]
    found: NDArray[np.int8]
    kept: NDArray[np.int8]

def judge_guesses(
    ngrams: Ngrams | None,
    tokens: Sequence[int],
    start: int,
    end: int,
    ids: NDArray[np.int32],
    logits: NDArray[np.float32],
    with_lookup: bool,
) -> Judged:
    """What a dynamic tree could take; arguments and errors as for `walk_guesses`."""

def prompt_lookup_drafter(
    *,
    max_ngram: int = 4,
    min_ngram: int = 2,
    max_nodes: int = 16,
    max_depth: int = 10,
    max_matches: int = 4,
) -> Drafter: ...

class SamplingParams:
    def __init__(
        self,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        sample_index: int = 0,
        acceptance: str = "exact",
        epsilon: float = 0.09,
        delta: float = 0.3,
    ) -> None:
        """ValueError names the field, the value and the allowed range."""

class RequestStats:
    prompt_tokens: int
    reused_tokens: int
    steps: int
    set_backs: int
    accepted_lengths: list[int]
    prefill_s: float
    decode_s: float

class Event:
    request: int
    tokens: list[int]
    finish: str | None  # None while running; "stop", "length", "cancelled"
    stats: RequestStats  # complete with the last event

class SessionStats:
    active: int
    waiting: int
    pages_used: int
    pages_total: int
    pages_cached: int
    steps: int
    device_steps: int
    device_step_s: float
    device_gap_s: float
    set_backs: int
    compactions_across_pages: int
    weight_bytes: int
    cache_bytes: int
    workspace_bytes: int

class Session:
    """Safe from any thread. step() runs one pass and returns its events; none when idle."""

    def __init__(
        self,
        model: Model,
        drafter: Drafter | None,
        *,
        max_batch: int = 8,
        max_context: int = 0,
        cache_tokens: int = 0,
        prefill_chunk: int = 512,
    ) -> None: ...
    @property
    def max_context(self) -> int: ...
    def submit(
        self,
        tokens: Sequence[int],
        *,
        max_new_tokens: int = 0,
        sampling: SamplingParams | None = None,
        eos_ids: Sequence[int] = (),
        reuse_prefix: bool = True,
    ) -> int:
        """Queue a request; returns its id.

        ValueError on an empty prompt, a token outside the vocabulary, a prompt of max_context
        tokens or more.
        """
    def step(self) -> list[Event]: ...
    def cancel(self, request: int) -> bool: ...
    @property
    def idle(self) -> bool: ...
    def stats(self) -> SessionStats: ...

class KvCache:
    """Test access to a paged cache: values as float32, whatever the backend's layout."""

    def __init__(
        self,
        backend: Backend,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
        page_table: NDArray[np.int32],
        num_pages: int,
    ) -> None:
        """page_table [sequences, max_pages]; every element of the cache starts as NaN."""
    def read(
        self, layer: int, sequence: int, slot: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """K and V [Hkv, D] of one slot."""

class ops:
    """Every op of csrc/medusa/backend.h on NumPy arrays, for tests and experiments.

    rows: arrays token, sequence, position, slot, prefix_len [R] i32 and ancestors [R, 4] u64.
    Activations go in and out as float32; where the op's type is bf16 they are rounded on the way in
    (to nearest even) and widened on the way out.
    """

    @staticmethod
    def pack_unpack(
        backend: Backend, weight: NDArray[Any], dtype: str, src_dtype: str | None = None
    ) -> NDArray[np.float32]:
        """What the packed weight holds, read back through embed: [N, K] f32."""
    @staticmethod
    def embed(
        backend: Backend,
        tokens: NDArray[np.int32],
        weight: NDArray[np.float32],
        dtype: str,
        scale: float,
    ) -> NDArray[np.float32]: ...
    @staticmethod
    def rms_norm(
        backend: Backend,
        x: NDArray[np.float32],
        gain: NDArray[np.float32],
        eps: float,
        out_dtype: str,
    ) -> NDArray[np.float32]: ...
    @staticmethod
    def linear(
        backend: Backend,
        x: NDArray[np.float32],
        weight: NDArray[Any],
        dtype: str,
        bias: NDArray[np.float32] | None = None,
        residual: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """weight: f32 [N, K], or rows of uint8 that hold blocks of type dtype."""
    @staticmethod
    def norm_linear(
        backend: Backend,
        x: NDArray[np.float32],
        gain: NDArray[np.float32],
        eps: float,
        weight: NDArray[Any],
        dtype: str,
        bias: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]: ...
    @staticmethod
    def gated_linear(
        backend: Backend,
        gate_up: NDArray[np.float32],
        activation: str,
        weight: NDArray[Any],
        dtype: str,
        bias: NDArray[np.float32] | None = None,
        residual: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]: ...
    @staticmethod
    def rope_table(
        backend: Backend, positions: NDArray[np.int32], prompt_len: NDArray[np.int32], rope: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """rope: JSON of RopeConfig."""
    @staticmethod
    def rope_write(
        backend: Backend,
        qkv: NDArray[np.float32],
        rows: dict[str, NDArray[Any]],
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        q_gain: NDArray[np.float32] | None,
        k_gain: NDArray[np.float32] | None,
        eps: float,
        cache: KvCache,
        layer: int,
    ) -> NDArray[np.float32]:
        """Returns q [R, H, D]."""
    @staticmethod
    def tree_attention(
        backend: Backend,
        q: NDArray[np.float32],
        cache: KvCache,
        layer: int,
        rows: dict[str, NDArray[Any]],
        scale: float,
        window: int,
        out_dtype: str,
    ) -> NDArray[np.float32]: ...
    @staticmethod
    def gated_activation(
        backend: Backend, gate_up: NDArray[np.float32], activation: str, out_dtype: str
    ) -> NDArray[np.float32]: ...
    @staticmethod
    def residual_silu(
        backend: Backend, y: NDArray[np.float32], u: NDArray[np.float32]
    ) -> NDArray[np.float32]: ...
    @staticmethod
    def gather_rows(
        backend: Backend, x: NDArray[np.float32], index: NDArray[np.int32], out_dtype: str
    ) -> NDArray[np.float32]: ...
    @staticmethod
    def top_k(
        backend: Backend, x: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...
    @staticmethod
    def compact_kv(
        backend: Backend, cache: KvCache, moves: list[tuple[int, int, list[int]]]
    ) -> None:
        """moves: (sequence, len, path)."""
    @staticmethod
    def copy_page(
        backend: Backend, cache: KvCache, src: int, dst: int, num_tokens: int
    ) -> None: ...
    @staticmethod
    def verify(
        backend: Backend,
        logits: NDArray[np.float32],
        tokens: Sequence[int],
        parents: Sequence[int],
        sampling: SamplingParams,
        *,
        history: Sequence[int] = (),
        eos_ids: Sequence[int] = (),
        max_tokens: int = 1 << 30,
    ) -> tuple[list[int], list[int]]:
        """Walk one tree; returns (path, tokens).

        tokens and parents start with the root (parent -1); history: the text before the root.
        """
    @staticmethod
    def philox(
        counter: tuple[int, int, int, int], key: tuple[int, int]
    ) -> tuple[int, int, int, int]: ...
    @staticmethod
    def gumbel(x: NDArray[np.uint32]) -> NDArray[np.float32]:
        """G of the 32-bit words x, by the shared polynomial."""
    @staticmethod
    def noise(seed: int, sample_index: int, position: int, vocab: int) -> NDArray[np.uint32]:
        """The words x of ids 0 .. vocab - 1."""
