"""The compiled module: exceptions, borrowed arrays, drafters in Python, who keeps what alive."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import medusa_ext
from medusa_ext import _core
from util import PagedCase, prompt_rows

VOCAB = 61


def tiny_config() -> str:
    return json.dumps(
        {
            "family": "test",
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "max_context": 256,
            "rms_norm_eps": 1e-6,
            "activation": "silu",
            "qkv_bias": False,
            "o_bias": False,
            "mlp_bias": False,
            "qk_norm": False,
            "tied_embeddings": False,
            "embedding_scale": 1.0,
            "attention_scale": 0.0,
            "windows": [0, 0],
            "rope": {
                "inv_freq": [1.0, 0.3, 0.1, 0.03],
                "attention_scaling": 1.0,
                "dynamic_factor": 0.0,
                "base": 10000.0,
                "original_context": 0,
            },
            "heads": {"num_heads": 0, "num_layers": 0, "shared_lm_head": True, "head_vocab": 0},
        }
    )


@pytest.fixture(scope="module")
def model() -> _core.Model:
    return _core.random_model(tiny_config(), "f32", 3, _core.Backend(threads=1))


def run(session: _core.Session, tokens: list[int], count: int) -> list[int]:
    """The tokens of one request."""
    request = session.submit(tokens, max_new_tokens=count)
    out: list[int] = []
    while not session.idle:
        for event in session.step():
            assert event.request == request
            out += event.tokens
    return out


class Scripted(_core.Drafter):
    """Answers with what `answer` returns for each input."""

    max_nodes = 8

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.finished = []
        self.inputs = []

    def draft(self, inputs):
        self.inputs += inputs
        return [self.answer(one) for one in inputs]

    def on_finish(self, request):
        self.finished.append(request)


def test_version_is_that_of_the_package():
    assert _core.__version__ == medusa_ext.__version__ == version("medusa_ext")


def test_import_is_light():
    code = (
        "import sys; from medusa_ext import Engine; "
        "sys.exit(bool({'transformers', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_stub_names_everything_that_the_module_has():
    stub = Path(medusa_ext.__file__).with_name("_core.pyi").read_text()
    for name in dir(_core):
        assert name in stub or (name.startswith("__") and name != "__version__")
    for name in dir(_core.ops):
        assert name in stub or name.startswith("_")


def test_exceptions_are_translated():
    with pytest.raises(ValueError, match="threads"):
        _core.Backend(threads=-1)
    with pytest.raises(ValueError, match="no_such_isa"):
        _core.Backend(isa="no_such_isa")
    with pytest.raises(ValueError, match='device is "tpu"; this build has: cpu, auto'):
        _core.Backend("tpu")
    assert issubclass(_core.InternalError, RuntimeError)
    assert issubclass(_core.CudaError, RuntimeError)


def test_out_of_memory_is_a_memory_error():
    # In a process of its own whose address space is limited: memory untouched is otherwise free.
    code = """
import resource
import numpy as np
from medusa_ext import _core
backend = _core.Backend(threads=1)
resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
table = np.zeros((1, 1), np.int32)
sizes = {"num_layers": 64, "num_kv_heads": 8, "head_dim": 128, "num_pages": 1 << 12}
try:
    _core.KvCache(backend, dtype="f32", page_table=table, **sizes)
except MemoryError as error:
    print("MemoryError", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MemoryError" in done.stdout
    assert str(64 * 8 * 128 * 4 * 2 * 64 << 12) in done.stdout  # bytes asked


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        (np.zeros((32, 61), np.float32).T, None, "contiguous"),
        (np.zeros((61, 32), np.float64), None, "float64"),
        (np.zeros((61, 32), np.uint16), None, "bf16"),
        (np.zeros((61, 32), np.float32), "bf16", "float32"),
        (np.zeros((61, 31), np.float32), None, r"\[61, 31\]"),
        (np.zeros((1, 1, 61, 32), np.float32), None, "rank 4"),
        (np.zeros((61, 32), np.dtype(">f4")), None, ">f4"),
    ],
)
def test_builder_refuses_arrays_by_name(array, dtype, message):
    builder = _core.ModelBuilder(tiny_config(), "f32", _core.Backend(threads=1))
    with pytest.raises(ValueError, match=message) as caught:
        builder.add("embed_tokens.weight", array, dtype)
    assert "embed_tokens.weight" in str(caught.value)


def test_builder_names_what_is_missing():
    builder = _core.ModelBuilder(tiny_config(), "f32", _core.Backend(threads=1))
    with pytest.raises(ValueError, match=r"norm\.weight"):
        builder.finish()


def test_model_describes_itself(model):
    assert json.loads(model.config)["vocab_size"] == VOCAB
    assert model.dtype == "f32"
    assert model.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert model.weight_bytes > 4 * 2 * VOCAB * 32
    assert model.backend.threads == 1
    assert model.backend.name == "cpu"


def test_score_fills_what_is_asked_for(model):
    tokens = list(range(20))
    logits = np.full((20, VOCAB), np.nan, np.float32)
    hidden = np.full((20, 32), np.nan, np.float32)
    _core.score(model, tokens, 7, logits, hidden)
    assert np.isfinite(logits).all()
    assert np.isfinite(hidden).all()
    with pytest.raises(ValueError, match="logits"):
        _core.score(model, tokens, 7, logits[:19], None)
    with pytest.raises(ValueError, match="token"):
        _core.score(model, [VOCAB], 7, logits[:1], None)
    with pytest.raises(ValueError, match="token"):
        _core.score(model, [1 << 40], 7, logits[:1], None)
    logits.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        _core.score(model, tokens, 7, logits, None)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.5),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 1 << 64),
        ("acceptance", "maybe"),
        ("temperature", float("nan")),
    ],
)
def test_sampling_names_the_field(option, value):
    with pytest.raises(ValueError, match=option):
        _core.SamplingParams(**{option: value})


def test_python_drafter_changes_nothing_and_is_told(model):
    prompt = [1, 2, 3]
    expected = run(_core.Session(model, None), prompt, 40)
    text = prompt + expected

    def known(one):
        ahead = text[len(one.tokens) : len(one.tokens) + min(one.max_nodes - 3, one.max_depth)]
        # Two duplicates of the first token merge into it; the chain hangs on the last of them.
        first = ahead[:1] * 2
        return first + ahead[: len(ahead)], [0] * len(first) + [0, *range(3, 2 + len(ahead))][
            : len(ahead)
        ]

    drafter = Scripted(known)
    session = _core.Session(model, drafter)
    assert run(session, prompt, 40) == expected
    assert session.stats().steps < 20
    assert len(drafter.finished) == 1
    assert drafter.inputs[-1].tokens[:3] == prompt  # a copy: the call is long over


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (([5], [1]), "parent 1"),
        (([5], [-1]), "parent -1"),
        (([5, 6], [0]), "2 tokens and 1 parents"),
        (([*range(8)], [0] * 8), "8 nodes"),
        (([-3], [0]), "token -3"),
        ("nonsense", "wanted a list"),
        (None, "wanted a list"),
    ],
)
def test_malformed_trees_are_value_errors_and_the_session_goes_on(model, answer, message):
    prompt = [4, 5]
    expected = run(_core.Session(model, None), prompt, 12)
    drafter = Scripted(lambda one: answer)
    session = _core.Session(model, drafter)
    session.submit(prompt, max_new_tokens=12)
    with pytest.raises(ValueError, match=message):
        session.step()
    drafter.answer = lambda one: ([], [])
    out = []
    while not session.idle:
        for event in session.step():
            out += event.tokens
    assert out == expected


def test_exception_inside_draft_comes_out_of_step(model):
    class Planned(Exception):
        pass

    def fail(one):
        raise Planned("inside draft")

    prompt = [7, 8, 9]
    expected = run(_core.Session(model, None), prompt, 12)
    drafter = Scripted(fail)
    session = _core.Session(model, drafter)
    session.submit(prompt, max_new_tokens=12)
    for _ in range(3):
        with pytest.raises(Planned, match="inside draft"):
            session.step()
    drafter.answer = lambda one: ([1], [0])
    out = []
    while not session.idle:
        for event in session.step():
            out += event.tokens
    assert out == expected


def test_drafters_must_define_their_parts(model):
    class Sizeless(_core.Drafter):
        pass

    with pytest.raises(NotImplementedError, match="max_nodes"):
        _core.Session(model, Sizeless())

    class Silent(_core.Drafter):
        max_nodes = 4

    session = _core.Session(model, Silent())
    session.submit([1])
    with pytest.raises(NotImplementedError, match="draft"):
        session.step()


def test_session_keeps_drafter_and_model_alive():
    model = _core.random_model(tiny_config(), "f32", 3, _core.Backend(threads=2))
    expected = run(_core.Session(model, None), [1, 2], 20)
    drafter = Scripted(lambda one: ([one.tokens[-1]], [0]))
    gone = weakref.ref(drafter)
    session = _core.Session(model, drafter)
    del drafter, model
    gc.collect()
    assert gone() is not None
    assert run(session, [1, 2], 20) == expected
    assert gone().inputs
    del session
    gc.collect()
    assert gone() is None


def test_threads_may_share_a_session_with_a_python_drafter(model):
    from threading import Thread

    drafter = Scripted(lambda one: ([one.tokens[-1], 0], [0, 0]))
    session = _core.Session(model, drafter, max_batch=3)
    ended = []

    def work(first: int) -> None:
        for i in range(5):
            session.submit([first, i], max_new_tokens=10)
            ended.extend(event for event in session.step() if event.finish)
        while not session.idle:
            ended.extend(event for event in session.step() if event.finish)
            session.stats()

    threads = [Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 15
    assert len(drafter.finished) == 15


def test_event_tells_finish_and_stats(model):
    session = _core.Session(model, None)
    request = session.submit([3, 1, 4], max_new_tokens=5, sampling=_core.SamplingParams(seed=2))
    events = []
    while not session.idle:
        events += session.step()
    assert [event.request for event in events] == [request] * 5
    assert [event.finish for event in events] == [None] * 4 + ["length"]
    stats = events[-1].stats
    assert (stats.prompt_tokens, stats.steps, stats.accepted_lengths) == (3, 5, [0, 5])
    assert not session.cancel(request)
    again = session.submit([3, 1, 4])
    assert session.cancel(again)
    assert [event.finish for event in session.step()] == ["cancelled"]


def test_cache_of_tests_starts_as_nan(backend):
    for dtype in ["f32", "f16", "bf16"]:
        table = np.array([[1, 0]], np.int32)
        cache = _core.KvCache(
            backend,
            num_layers=2,
            num_kv_heads=2,
            head_dim=8,
            dtype=dtype,
            page_table=table,
            num_pages=2,
        )
        for slot in [0, 63, 64, 127]:
            for values in cache.read(1, 0, slot):
                assert values.shape == (2, 8)
                assert np.isnan(values).all()
        with pytest.raises(ValueError, match="slot"):
            cache.read(0, 0, 128)
        with pytest.raises(ValueError, match="layer"):
            cache.read(2, 0, 0)


def test_safetensors_views_outlive_their_file(tmp_path):
    from safetensors.numpy import save_file

    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / "one.safetensors"
    save_file({"w": values, "odd": np.arange(3, dtype=np.int64)}, path, {"note": "x"})
    file = _core.SafetensorsFile(str(path))
    assert file.metadata == {"note": "x"}
    assert sorted(file.names()) == ["odd", "w"]
    assert (file.dtype("w"), file.shape("w")) == ("F32", [3, 4])
    view = file.array("w")
    odd = file.array("odd")
    file.release("w")
    del file
    gc.collect()
    np.testing.assert_array_equal(view, values)
    np.testing.assert_array_equal(odd, np.arange(3))
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1


def test_a_sequence_beyond_the_page_table_is_refused(backend: _core.Backend) -> None:
    case = PagedCase(backend, [64])
    rows = prompt_rows(2, 0, 2)
    cos = np.ones((2, case.head_dim // 2), np.float32)
    qkv = np.zeros((2, (2 + 2 * case.num_kv_heads) * case.head_dim), np.float32)
    q = np.zeros((2, 2, case.head_dim), np.float32)
    calls = {
        "read_kv": lambda: case.cache.read(0, 2, 0),
        "rope_write": lambda: _core.ops.rope_write(
            backend, qkv, rows, cos, cos, None, None, 1e-5, case.cache, 0
        ),
        "tree_attention": lambda: _core.ops.tree_attention(
            backend, q, case.cache, 0, rows, 1.0, 0, "f32"
        ),
        "compact_kv": lambda: _core.ops.compact_kv(backend, case.cache, [(2, 0, [0, 2])]),
    }
    for op, call in calls.items():
        if backend.name != "cpu" and op in ("rope_write", "tree_attention"):
            call()  # the rows are in the device's memory: nobody reports them, nothing is touched
            continue
        with pytest.raises(ValueError, match=rf"^{op}: .*sequence .*page table has 2 lines"):
            call()
