"""tree="auto" on a CPU: the times of steps choose the number of nodes. No test depends on them."""

import itertools
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from calibration_util import calibrated_heads, calibrated_pair, make_prompts, tree_of
from medusa_ext import Engine, _core, tuning
from medusa_ext.calibration.file import DYNAMIC, LOOKUP, STATIC, Calibration
from medusa_ext.loading import load_model
from medusa_ext.tuning import COUNTS, FILE_NAME, choose, read_times, write_times

KEY = {"model": "m", "threads": 2}
TIMES = {1: 0.01, 4: 0.0125, 8: 0.013}


@pytest.fixture
def calibrated(tmp_path_factory) -> SimpleNamespace:
    return calibrated_heads(tmp_path_factory.getbasetemp())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "deep" / "cache"
    monkeypatch.setenv("MEDUSA_EXT_CACHE", str(folder))
    return folder


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The counts that were asked for in each measurement, which gives FAKE times."""
    asked: list[list[int]] = []

    def fake(
        model: _core.Model, found: Calibration, counts: list[int], tokens: list[float], kind: str
    ) -> dict[int, list[float]]:
        asked.append(list(counts))
        return {count: [FAKE(count)] for count in counts}

    monkeypatch.setattr(tuning, "step_times", fake)
    return asked


def FAKE(count: int) -> float:
    """Seconds: a step of up to 6 nodes is as quick as one of one, then each node costs as much."""
    return 0.01 * max(1.0, count / 6)


@pytest.mark.parametrize(
    "seconds",
    [
        lambda count: 0.01,
        lambda count: 0.01 * count,
        FAKE,
        lambda count: 0.01 * (1 + 0.02 * count),
        lambda count: 0.01 + 0.002 * (count > 8) + 0.1 * (count > 30),
    ],
)
def test_the_choice_is_the_best_rate(seconds: Callable[[int], float]) -> None:
    """Against all numbers of nodes one by one, with times on straight lines between those given."""
    values = np.sort(np.random.default_rng(3).random(63) ** 6)[::-1] / 2
    tokens = [1.0, *(1 + np.cumsum(values)).tolist()]
    times = {count: seconds(count) for count in COUNTS}
    rates = {}
    for low, high in itertools.pairwise(COUNTS):
        for count in range(low, high + 1):
            share = (count - low) / (high - low)
            rates[count] = tokens[count - 1] / (times[low] * (1 - share) + times[high] * share)
    best = choose(tokens, times)
    assert rates[best] == pytest.approx(max(rates.values()), rel=1e-12)
    assert all(rate < rates[best] for count, rate in rates.items() if count < best)


def test_dynamic_trees_lie_on_straight_lines() -> None:
    rows = [
        {
            "nodes": nodes,
            "tokens_per_later_step": 9.0,
            DYNAMIC: {"tokens_per_later_step": alone},
            LOOKUP: {"tokens_per_later_step": both},
        }
        for nodes, alone, both in [(1, 1.0, 1.0), (3, 1.4, 1.8), (4, 1.5, 1.7)]
    ]
    found = Calibration([], [], {"values": [0.5, 0.25, 0.125, 0.0625], "predicted": rows})
    assert tuning.tokens_per_step(found) == [1, 1.5, 1.75, 1.875, 1.9375]
    assert tuning.tokens_per_step(found, DYNAMIC) == pytest.approx([1, 1.2, 1.4, 1.5, 1.5])
    assert tuning.tokens_per_step(found, LOOKUP) == pytest.approx([1, 1.4, 1.8, 1.7, 1.7])


def test_the_choice_at_the_ends() -> None:
    tokens = [1.0, 1.5, 1.7]
    assert choose(tokens, {1: 1.0, 2: 2.0}) == 1  # guessing costs more than it brings
    assert choose(tokens, {1: 1.0, 2: 1.0, 4: 1.0}) == 3  # there are no more paths
    assert choose(tokens, {1: 1.0}) == choose(tokens, {}) == 1


def test_an_engine_takes_what_pays(calibrated, cache, measured) -> None:
    """And decodes with the beginning of the calibrated tree, which has so many nodes."""
    tree = calibrated.content["tree"]
    tokens = tuning.tokens_per_step(calibration_of(calibrated), LOOKUP)
    wanted = choose(tokens, {n: FAKE(n) for n in COUNTS if n <= len(tokens)})
    assert 1 < wanted <= 8
    assert tree_of(calibrated.model, calibrated.heads) == sorted(tree[: wanted - 1])
    assert measured == [[count for count in COUNTS if count <= len(tree) + 1]]
    with Engine(calibrated.model, calibrated.heads, threads=1) as engine:
        assert engine.info["nodes"] == wanted
        assert engine.info["drafter"] == "3 Medusa heads, lookup; dynamic trees"
    assert len(measured) == 1  # remembered


def test_one_node_is_plain_decoding(calibrated, cache, monkeypatch) -> None:
    monkeypatch.setattr(
        tuning, "step_times", lambda *_: {count: [0.01 * count] for count in COUNTS}
    )
    prompts = make_prompts(3, seed=6)
    with (
        Engine(calibrated.model, calibrated.heads, threads=1) as engine,
        Engine(calibrated.model, None, threads=1) as plain,
    ):
        assert (engine.info["nodes"], engine.tree) == (1, [])
        results = engine.generate(prompts, max_new_tokens=20)
        assert {result.stats.tokens_per_step for result in results} == {1.0}
        assert [one.token_ids for one in results] == [
            one.token_ids for one in plain.generate(prompts, max_new_tokens=20)
        ]


def test_nothing_is_timed_where_nobody_asks(calibrated, cache, measured, monkeypatch) -> None:
    pair = calibrated_pair(calibrated.heads.parents[1])
    for heads, options in (
        (calibrated.heads, {"tree": 4}),
        (calibrated.heads, {"tree": [[0]]}),
        (pair[1], {}),  # no calibration
        ("prompt-lookup", {}),
        (None, {}),
    ):
        Engine(calibrated.model, heads, threads=1, **options).close()
    monkeypatch.setenv("MEDUSA_EXT_CACHE", "off")
    nodes = calibrated.content["step_times"][0]["nodes"]
    assert len(tree_of(calibrated.model, calibrated.heads)) == nodes - 1
    assert measured == []
    assert not cache.exists()
    assert not Path("off").exists()


def test_what_does_not_fit_is_not_tried(calibrated, cache, measured, monkeypatch) -> None:
    monkeypatch.setattr("medusa_ext.engine.fits", lambda sizes, _: sizes.guesses.max_nodes <= 4)
    assert len(tree_of(calibrated.model, calibrated.heads)) <= 3
    assert measured == [[1, 2, 4]]


def test_real_times(calibrated, cache, monkeypatch) -> None:
    """Positive and finite, kept, and of no effect on the engine or what it says."""
    prompts = make_prompts(4, seed=8)
    with Engine(calibrated.model, None, threads=1) as plain:
        wanted = [one.token_ids for one in plain.generate(prompts, max_new_tokens=50)]
    monkeypatch.setattr(tuning, "is_steady", lambda _: True)
    monkeypatch.setattr(tuning, "_BEGINNING", 600.0)  # a machine that stalls is no failure
    with Engine(calibrated.model, calibrated.heads, threads=1) as engine:
        stats = engine.session_stats()
        assert (stats.steps, stats.pages_used, stats.pages_cached) == (0, 0, 0)
        assert [one.token_ids for one in engine.generate(prompts, max_new_tokens=50)] == wanted
        nodes = engine.info["nodes"]
    (row,) = json.loads((cache / FILE_NAME).read_text())["rows"]
    times = {int(count): seconds for count, seconds in row["seconds"].items()}
    assert list(times) == list(COUNTS[: len(times)])
    assert all(0 < seconds < 60 for seconds in times.values())
    assert nodes <= max(times)
    assert set(row["key"]) >= {"dtype", "heads", "threads", "cpu", "weight_bytes", "backend"}
    monkeypatch.setattr(tuning, "step_times", None)  # not called again
    with Engine(calibrated.model, calibrated.heads, threads=1) as engine:
        assert engine.info["nodes"] == nodes


@pytest.mark.parametrize("kind", [STATIC, DYNAMIC])
def test_texts_to_time_keep_the_whole_tree(calibrated, kind) -> None:
    """Also where they begin again; a smaller tree near the end would be quicker."""
    model = load_model(calibrated.model, calibrated.heads, backend=_core.Backend(threads=1)).model
    content = calibrated.content
    lane = tuning._Lane(model, Calibration(content["tree"], [], content), 32, kind)
    begun = []
    begin = lane.begin
    lane.begin = lambda: (begun.append(1), begin())
    for _ in range(200):
        assert lane.step() > 0
    assert begun
    assert lane.max_new_tokens + len(lane.prompt) + 32 <= lane.context


def test_times_of_a_busy_machine_are_not_kept(calibrated, cache, monkeypatch) -> None:
    """Medians choose all the same."""
    for scatter, kept in ((1.5, False), (1.1, True)):
        samples = {n: [FAKE(n) * factor for factor in (1, 1, 1, scatter, scatter)] for n in COUNTS}
        monkeypatch.setattr(tuning, "step_times", lambda *_, given=samples: given)
        tokens = [1.0, *(1 + np.cumsum(calibrated.content["values"])).tolist()]
        nodes = choose(tokens, {n: FAKE(n) for n in COUNTS})
        assert len(tree_of(calibrated.model, calibrated.heads)) == nodes - 1
        assert (cache / FILE_NAME).exists() == kept


def test_sizes_that_cannot_pay_are_left_out(calibrated, monkeypatch) -> None:
    class Lane:
        def __init__(self, model: object, found: Calibration, nodes: int, kind: str) -> None:
            self.nodes = nodes

        def step(self) -> float:
            return 0.01 * self.nodes

    monkeypatch.setattr(tuning, "_Lane", Lane)
    found = Calibration(calibrated.content["tree"], [], calibrated.content)
    tokens = tuning.tokens_per_step(found)
    most = tokens[COUNTS[-1] - 1]
    times = tuning.step_times(None, found, COUNTS, tokens)
    assert all(set(taken) == {0.01 * count} and taken for count, taken in times.items())
    # The greatest tree emits `most` a step: none of more than most / 0.9 nodes can be faster.
    assert max(times) == next(count for count in COUNTS if count > most / 0.9)


class Pace:
    """A clock, and lanes whose steps, and a prompt of four times as long, take `seconds` of it."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds = seconds
        self.now = 7e5
        self.begun: list[int] = []

    def lane(self, model: object, found: Calibration, count: int, kind: str) -> SimpleNamespace:
        self.begun.append(count)
        self.pass_time(5 * self.seconds(count))
        return SimpleNamespace(step=lambda: self.pass_time(self.seconds(count)))

    def pass_time(self, seconds: float) -> float:
        self.now += seconds
        return seconds

    def measure(self, found: Calibration) -> dict[int, list[float]] | None:
        tokens = tuning.tokens_per_step(found)
        return tuning.step_times(None, found, COUNTS, tokens, clock=lambda: self.now)


def calibration_of(calibrated: SimpleNamespace) -> Calibration:
    return Calibration(calibrated.content["tree"], [], calibrated.content)


@pytest.mark.parametrize(
    ("step", "begun"),
    [
        (0.001, list(COUNTS)),
        (0.028, list(COUNTS)),
        (0.04, [1, 4, 8, 16, 32]),
        (0.07, [1, 6, 16, 64]),
        (0.1, [1, 8, 32]),
        (0.142, [1, 12]),
    ],
)
def test_slow_models_are_timed_with_fewer_sizes(calibrated, monkeypatch, step, begun) -> None:
    """Which lie as far apart as all do, and three seconds are enough for them."""
    pace = Pace(lambda count: step * (1 + count / 1000))
    monkeypatch.setattr(tuning, "_Lane", pace.lane)
    began = pace.now
    times = pace.measure(calibration_of(calibrated))
    assert pace.begun == list(times) == begun
    assert all(set(taken) == {step * (1 + n / 1000)} for n, taken in times.items())
    assert (len(times[1]) == 15) == (step < 0.005)
    assert pace.now - began < 3.6


def test_no_size_begins_when_the_time_is_up(calibrated, monkeypatch) -> None:
    """Not even where the first ones promised that all would."""
    pace = Pace(lambda count: 0.01 if count < 4 else 0.25)
    monkeypatch.setattr(tuning, "_Lane", pace.lane)
    monkeypatch.setattr(tuning, "_DOUBT", 1e-9)  # none is left out because it cannot pay
    times = pace.measure(calibration_of(calibrated))
    assert pace.begun == list(times) == [1, 2, 4, 6]


def test_a_model_too_slow_to_time_is_left_to_its_calibration(
    calibrated, cache, monkeypatch
) -> None:
    pace = Pace(lambda count: 0.15)
    monkeypatch.setattr(tuning, "_Lane", pace.lane)
    assert pace.measure(calibration_of(calibrated)) is None
    assert pace.begun == [1]
    monkeypatch.setattr(tuning, "step_times", lambda *_: None)
    nodes = calibrated.content["step_times"][0]["nodes"]
    assert len(tree_of(calibrated.model, calibrated.heads)) == nodes - 1
    assert not cache.exists()


@pytest.mark.parametrize(
    ("context", "wanted"),
    [
        (4, None),
        (15, None),
        (16, [1, 2, 4]),
        (24, [1, 2, 4, 6, 8]),
        (64, [1, 2, 4, 6, 8, 12, 16, 24, 32]),
        (128, list(COUNTS)),
    ],
)
def test_small_contexts(calibrated, cache, tmp_path, monkeypatch, context, wanted) -> None:
    """Each size has room for eight tokens and is really decoded with; none where there is none."""
    asked = []
    measure = tuning.step_times

    def watched(
        model: _core.Model, found: Calibration, counts: list[int], tokens: list[float], kind: str
    ) -> object:
        asked.append(list(counts))
        for count in counts:
            lane = tuning._Lane(model, found, count, kind)
            assert lane.max_new_tokens >= 8
            assert all(lane.step() > 0 for _ in range(12))
        return measure(model, found, counts, tokens, kind)

    monkeypatch.setattr(tuning, "step_times", watched)
    folder = shutil.copytree(calibrated.model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    model = load_model(folder, calibrated.heads, backend=_core.Backend(threads=1)).model
    nodes = tuning.best_nodes(model, calibration_of(calibrated), lambda _: True)
    assert asked == ([] if wanted is None else [wanted])
    assert (nodes is None) == (wanted is None)


def test_more_memory_is_measured_anew(calibrated, cache, measured, monkeypatch) -> None:
    """Times of few sizes would else choose among these for ever."""
    for most in (4, 4, 64, 64, 4):
        monkeypatch.setattr(
            "medusa_ext.engine.fits", lambda sizes, _, most=most: sizes.guesses.max_nodes <= most
        )
        assert len(tree_of(calibrated.model, calibrated.heads)) < most
    assert measured == [[1, 2, 4], list(COUNTS)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", "bf16"),
        ("threads", 2),
        ("head_vocab", 300),
    ],
)
def test_each_kind_of_engine_has_times_of_its_own(calibrated, cache, measured, key, value) -> None:
    Engine(calibrated.model, calibrated.heads, threads=1).close()
    Engine(calibrated.model, calibrated.heads, **({"threads": 1} | {key: value})).close()
    assert len(measured) == 2
    assert len(json.loads((cache / FILE_NAME).read_text())["rows"]) == 2


def test_another_processor_has_times_of_its_own(calibrated, cache, measured, monkeypatch) -> None:
    Engine(calibrated.model, calibrated.heads, threads=1).close()
    monkeypatch.setattr(tuning, "cpu_name", lambda: "another")
    Engine(calibrated.model, calibrated.heads, threads=1).close()
    assert len(measured) == 2


def test_the_file_keeps_the_latest(tmp_path: Path) -> None:
    for index in range(70):
        write_times(tmp_path, KEY | {"index": index}, TIMES)
    write_times(tmp_path, KEY | {"index": 20}, {1: 0.5})
    rows = json.loads((tmp_path / FILE_NAME).read_text())["rows"]
    assert [row["key"]["index"] for row in rows] == [*range(6, 20), *range(21, 70), 20]
    assert read_times(tmp_path, KEY | {"index": 20}) == {1: 0.5}
    assert read_times(tmp_path, KEY | {"index": 69}) == TIMES
    assert read_times(tmp_path, KEY | {"index": 0}) is None
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


BAD_TIMES = [
    None,
    [],
    {},
    {"4": 0.1},
    {"1": 0.0},
    {"1": -1.0},
    {"1": float("nan")},
    {"1": float("inf")},
    {"1": 10**400},
    {"1": True},
    {"1": "0.1"},
    {"1": 0.1, "3": 0.1},
    {"1": 0.1, "x": 0.1},
]


@pytest.mark.parametrize("times", BAD_TIMES, ids=str)
def test_damaged_rows_are_measured_again(tmp_path: Path, times: object) -> None:
    rows = [{"key": KEY, "seconds": times}, {"key": KEY | {"threads": 1}, "seconds": {"1": 0.1}}]
    (tmp_path / FILE_NAME).write_text(json.dumps({"version": 1, "rows": [*rows, 3, {}, None]}))
    assert read_times(tmp_path, KEY) is None
    assert read_times(tmp_path, KEY | {"threads": 1}) == {1: 0.1}
    write_times(tmp_path, KEY, TIMES)
    assert read_times(tmp_path, KEY) == TIMES
    assert read_times(tmp_path, KEY | {"threads": 1}) == {1: 0.1}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"3",
        b'{"version": 1}',
        b'{"version": 1, "rows": {}}',
        b'{"version": 2, "rows": [{"key": {"model": "m", "threads": 2}, "seconds": {"1": 1.0}}]}',
        b"[" * 100_000,
        b" " * (1 << 21) + b"{}",
    ],
    ids=lambda content: repr(content[:24]),
)
def test_a_damaged_file_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    assert read_times(tmp_path, KEY) is None
    write_times(tmp_path, KEY, TIMES)
    assert read_times(tmp_path, KEY) == TIMES


@pytest.mark.parametrize("kind", ["a file", "below a file", "a folder of that name"])
def test_a_folder_that_cannot_be_written(
    calibrated, tmp_path, monkeypatch, measured, kind: str
) -> None:
    """No error: times are taken each time."""
    folder = tmp_path / "cache"
    if kind == "a folder of that name":
        (folder / FILE_NAME / "x").mkdir(parents=True)
    else:
        folder.write_text("")
    monkeypatch.setenv("MEDUSA_EXT_CACHE", str(folder / "x" if kind == "below a file" else folder))
    for _ in range(2):
        assert tree_of(calibrated.model, calibrated.heads)
    assert len(measured) == 2
    if kind == "a folder of that name":
        assert [path.name for path in folder.iterdir()] == [FILE_NAME]


def test_where_times_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    for value in ("", None):
        if value is None:
            monkeypatch.delenv("MEDUSA_EXT_CACHE")
        else:
            monkeypatch.setenv("MEDUSA_EXT_CACHE", value)
        assert tuning.cache_folder() == Path("/caches/medusa_ext")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert tuning.cache_folder() == tmp_path / ".cache" / "medusa_ext"
    monkeypatch.setenv("MEDUSA_EXT_CACHE", "mine")
    assert tuning.cache_folder() == Path("mine")


def _write_often(folder: Path, index: int) -> None:
    for turn in range(50):
        write_times(folder, KEY | {"index": index, "turn": turn % 3}, {1: 1.0 + index})


def test_engines_that_start_together_leave_a_whole_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_often, args=(tmp_path, n)) for n in range(3)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if (tmp_path / FILE_NAME).exists():
            rows = json.loads((tmp_path / FILE_NAME).read_text())["rows"]
            assert all(row["seconds"] == {"1": 1.0 + row["key"]["index"]} for row in rows)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
