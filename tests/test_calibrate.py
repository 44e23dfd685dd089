"""medusa-ext calibrate: its prediction is what engines do, and its file is what they use."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file

from calibration_util import (
    NUM_HEADS,
    NUM_TOKENS,
    answered_prompts,
    calibrated_heads,
    calibrated_pair,
    command,
    make_prompts,
    ranks_of,
    text,
    tree_of,
    warned_command,
    with_file,
    write_lines,
)
from medusa_ext import Engine, _core
from medusa_ext.calibration.file import DYNAMIC, LOOKUP, STATIC, read_calibration
from medusa_ext.calibration.guesses import fit
from medusa_ext.calibration.ranks import BEYOND, Walk, joined, walk, walk_dynamic
from medusa_ext.calibration.report import print_report
from medusa_ext.calibration.run import Request, _Measured, _Work, calibrate
from medusa_ext.calibration.texts import Text
from medusa_ext.calibration.tree_search import best_paths, search
from medusa_ext.loading import Stored, export, load_model, open_checkpoint
from medusa_ext.loading.exporting import CALIBRATION_FILE as FILE_NAME
from medusa_ext.trees import named_tree


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    return calibrated_pair(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> SimpleNamespace:
    return calibrated_heads(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> list[tuple[list[int], list[int]]]:
    return answered_prompts(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_predicted_steps_are_the_engines_own(pair, dtype):
    """Token for token and step for step, whatever the tree: the ranks say all there is to know."""
    model, heads = pair
    prompts = make_prompts(12, seed=3)
    with Engine(model, None, threads=1, dtype=dtype) as engine:
        longest = engine.generate(prompts[0], max_new_tokens=NUM_TOKENS).token_ids
        options = {"max_new_tokens": NUM_TOKENS, "eos_token_id": longest[NUM_TOKENS // 2]}
        results = engine.generate(prompts, **options)
    answers = [result.token_ids for result in results]
    assert {result.finish_reason for result in results} == {"stop", "length"}
    loaded = load_model(model, heads, dtype=dtype, backend=_core.Backend(threads=1))
    texts = [text(*both) for both in zip(prompts, answers, strict=True)]
    ranks = ranks_of(loaded.model, texts)
    deep = 0
    for nodes in (1, 2, 5, 16, 64):
        paths = best_paths(ranks, nodes - 1)[0]
        with Engine(model, heads, tree=paths, threads=1, dtype=dtype, max_batch=3) as engine:
            results = engine.generate(prompts, **options)
        assert [result.token_ids for result in results] == answers
        wanted = [walk(ranks.choose([index]), paths) for index in range(len(texts))]
        assert [result.stats.steps for result in results] == [one.steps for one in wanted]
        assert [r.stats.tokens_per_step for r in results] == [w.tokens_per_step for w in wanted]
        whole = walk(ranks, paths)
        assert whole.steps == sum(one.steps for one in wanted)
        assert whole.tokens == sum(map(len, answers))
        deep += sum(sum(result.stats.accepted_lengths[3:]) for result in results)
    assert deep > 20  # steps that kept two guesses or more


def test_every_turn_is_an_answer_of_its_own(pair, answered):
    """Two answers in one text: the rows of each end with it."""
    loaded = load_model(*pair, backend=_core.Backend(threads=1))
    (prompt, first), (other, _) = answered[:2]
    begin = len(prompt) + len(first) + len(other)
    with Engine(*pair, threads=1) as engine:
        second = engine.generate(prompt + first + other, max_new_tokens=9).token_ids
    whole = Text(
        prompt + first + other + second,
        [(len(prompt), len(prompt) + len(first)), (begin, begin + len(second))],
    )
    both = ranks_of(loaded.model, [whole])
    assert np.diff(both.starts).tolist() == [len(first) - 1, len(second) - 1]
    assert both.texts == (0, 0)
    alone = ranks_of(loaded.model, [text(prompt, first), text(prompt + first + other, second)])
    assert np.array_equal(both.ranks, alone.ranks)
    last = both.ranks[len(first) - 2]  # its token is the last but one
    assert last[0] != BEYOND
    assert (last[1:] == BEYOND).all()


def test_candidates_are_in_the_heads_own_order(pair, backend):
    """Against the heads' arithmetic in f64: none that is left out or behind is clearly better."""
    model, heads = pair
    state = load_file(heads / "medusa_lm_head.safetensors")
    loaded = load_model(model, heads, backend=backend)
    with Engine(model, None, threads=1) as engine:
        _, hidden = engine.score(make_prompts(1, seed=5)[0] * 10, return_hidden=True)
    hidden = np.tile(hidden, (2, 1))[:100]  # more than are computed at once
    ids = np.empty((NUM_HEADS, len(hidden), 7), np.int32)
    scores = np.empty(ids.shape, np.float32)
    _core.head_candidates(loaded.model, hidden, ids, scores)
    for head in range(NUM_HEADS):
        logits = hidden.astype(np.float64) @ state[f"{head}.0.weight"].double().numpy().T
        found = np.take_along_axis(logits, ids[head].astype(np.intp), axis=1)
        best = -np.sort(-logits, axis=1)[:, :7]
        # An f32 sum of 32 products errs by less than 32 * 2^-24 of the products' absolute sum.
        np.testing.assert_allclose(found, best, atol=1e-5)
        np.testing.assert_allclose(scores[head], found, atol=1e-5)
        assert all(len(set(row)) == 7 for row in ids[head].tolist())


@pytest.mark.parametrize(
    ("hidden", "ids", "words"),
    [
        ((3, 31), (NUM_HEADS, 3, 4), "hidden is \\[3, 31\\]; wanted \\[R, 32\\]"),
        ((3, 32), (NUM_HEADS, 4, 4), "ids are .* wanted \\[3, 3, up to 256\\] of both"),
        ((3, 32), (2, 3, 4), "ids are"),
        ((3, 32), (NUM_HEADS, 3, 257), "ids are"),
        ((3, 32), (NUM_HEADS, 3, 0), "allowed is 1 to|at least|empty"),
    ],
)
def test_candidates_of_wrong_shapes(pair, hidden, ids, words):
    model = load_model(*pair, backend=_core.Backend(threads=1)).model
    with pytest.raises(ValueError, match=words):
        _core.head_candidates(
            model,
            np.zeros(hidden, np.float32),
            np.zeros(ids, np.int32),
            np.zeros(ids, np.float32),
        )
    scores = np.zeros((NUM_HEADS, 3, 4), np.float32)
    with pytest.raises(ValueError, match="ids: dtype is i32, the array holds float32"):
        _core.head_candidates(model, np.zeros((3, 32), np.float32), scores, scores)
    ids = np.zeros((NUM_HEADS, 3, 5), np.int32)
    with pytest.raises(ValueError, match=r"logits .* of both"):
        _core.head_candidates(model, np.zeros((3, 32), np.float32), ids, scores)


def test_candidates_need_heads(pair):
    model = load_model(pair[0], None, backend=_core.Backend(threads=1)).model
    with pytest.raises(ValueError, match="the model has no heads"):
        _core.head_candidates(
            model,
            np.zeros((1, 32), np.float32),
            np.zeros((0, 1, 4), np.int32),
            np.zeros((0, 1, 4), np.float32),
        )


# The command


def test_file_holds_what_the_data_say(calibrated, pair, answered):
    content = calibrated.content
    loaded = load_model(*pair, backend=_core.Backend(threads=1))
    names = ["writing", "math"]
    texts = [text(*both, names[index % 2]) for index, both in enumerate(answered)]
    ranks = ranks_of(loaded.model, texts, num_ranks=256)
    shares, counts = ranks.accuracies()
    np.testing.assert_allclose(content["heads"], shares[:, :64], rtol=1e-5)
    assert content["counts"] == counts.tolist()
    assert content["tokens"] == sum(len(answer) for _, answer in answered)
    sizes = [4, 16]
    tree, values = search(ranks, 255, sizes)
    assert content["tree"] == tree
    np.testing.assert_allclose(content["values"], values, rtol=1e-5)
    for kind in (DYNAMIC, LOOKUP):
        weights = fit(ranks.answers, None, with_lookup=kind == LOOKUP)
        assert content["guesses"][kind] == weights.content()

    def crossed(kind: str, nodes: int, category: str = "") -> Walk:
        """Each half with what the other one chose."""
        walks = []
        for chosen, held in itertools.permutations(ranks.halves()):
            held = held.by_category()[category] if category else held
            if kind == STATIC:
                walks.append(walk(held, search(chosen, 255, sizes)[0][: nodes - 1]))
                continue
            weights = fit(chosen.answers, None, with_lookup=kind == LOOKUP)
            walks.append(walk_dynamic(held, weights.model(None), nodes))
        return joined(walks)

    for row in content["predicted"]:
        nodes = row["nodes"]
        alone = walk(ranks, tree[: nodes - 1])
        assert row["chosen_on"] == pytest.approx(alone.tokens_per_step, rel=1e-5)
        for kind, predicted in ((STATIC, row), (DYNAMIC, row[DYNAMIC]), (LOOKUP, row[LOOKUP])):
            done = crossed(kind, nodes)
            assert len(done.texts) == len(texts)
            assert predicted["tokens_per_step"] == pytest.approx(done.tokens_per_step, rel=1e-5)
            assert predicted["error"] == pytest.approx(done.error, rel=1e-5)
            assert nodes == 1 or 0 < done.error < 0.3
    assert [row["nodes"] for row in content["predicted"]] == [1, 4, 16]
    assert content["predicted"][2]["tokens_per_step"] > 1.2
    math = content["by_category"]["math"]
    for kind, key in ((STATIC, "tokens_per_step"), (LOOKUP, LOOKUP)):
        wanted = crossed(kind, 16, "math").tokens_per_step
        assert math[key]["16"] == pytest.approx(wanted, rel=1e-5)
    own = ranks.by_category()["math"]
    np.testing.assert_allclose(math["heads"], own.accuracies()[0][:, :64], rtol=1e-5)
    assert math["counts"] == own.accuracies()[1].tolist()
    writing = content["by_category"]["writing"]["counts"]
    assert np.add(math["counts"], writing).tolist() == content["counts"]


def test_check_measures_engines(calibrated):
    """Tokens per step of the check are those of an engine with that tree."""
    check = calibrated.content["check"]
    assert (check["prompts"], check["max_new_tokens"]) == (3, 12)
    asked = [[{"role": "user", "content": f"say {n}"}] for n in range(3)]
    for row in check["all"]:
        tree = row["nodes"]
        with Engine(calibrated.model, calibrated.heads, tree=tree, threads=1) as engine:
            results = engine.generate(asked, max_new_tokens=12)
        tokens = sum(len(result.token_ids) for result in results)
        steps = sum(result.stats.steps for result in results)
        assert row["measured"] == pytest.approx(tokens / steps, rel=1e-5)
        assert check["by_category"]["math"][str(row["nodes"])]["measured"] == row["measured"]


def test_speed_leaves_the_prefill_out():
    """Its step emits the first token of each text, and its time is not that of decoding."""
    sums = _Measured()
    sums.add(5, SimpleNamespace(steps=3, decode_s=0.5))
    sums.add(1, SimpleNamespace(steps=1, decode_s=0.0))
    assert (sums.tokens_per_step, sums.tokens_per_s) == (6 / 4, 8)


def test_best_number_of_nodes_is_the_fastest(calibrated):
    (row,) = calibrated.content["step_times"]
    assert (row["device"], row["dtype"], row["threads"]) == ("cpu", "f32", 1)
    assert row["seconds"].keys() == row["tokens_per_s"].keys() == {"1", "4", "16"}
    later = {
        str(one["nodes"]): one[LOOKUP]["tokens_per_later_step"]
        for one in calibrated.content["predicted"]
    }
    for count, seconds in row["seconds"].items():
        assert row["tokens_per_s"][count] == pytest.approx(later[count] / seconds, rel=1e-4)
    assert row["nodes"] == max((1, 4, 16), key=lambda count: row["tokens_per_s"][str(count)])


def test_auto_is_the_calibrated_tree(calibrated, tmp_path):
    tree = calibrated.content["tree"]
    row = {"device": "cpu", "dtype": "f32", "threads": 1, "seconds": {}, "nodes": 7}
    rows = [
        row | {"dtype": "bf16", "nodes": 5},
        row,
        row | {"threads": 2, "nodes": 9},
        row | {"device": "cuda", "nodes": 30},
    ]
    heads = with_file(calibrated, tmp_path / "heads", step_times=rows)
    model = calibrated.model
    assert tree_of(model, heads) == sorted(tree[:6])
    assert tree_of(model, heads, threads=2) == sorted(tree[:8])
    assert tree_of(model, heads, dtype="bf16") == sorted(tree[:4])
    assert tree_of(model, heads, dtype="f16") == sorted(tree[:6])  # the last one of 1 thread
    assert tree_of(model, heads, dtype="f16", threads=3) == sorted(tree[:8])  # the last one
    assert tree_of(model, heads, tree=3) == tree_of(model, heads, tree="3") == sorted(tree[:2])
    nowhere = with_file(calibrated, tmp_path / "none", step_times=[])
    assert tree_of(model, nowhere) == sorted(tree[:15])  # a CPU's own 16


def test_the_nearest_number_of_threads(calibrated, tmp_path):
    row = {"device": "cpu", "dtype": "f32", "seconds": {}}
    rows = [row | {"threads": count, "nodes": 2 + count} for count in (1, 8, 2)]
    heads = with_file(calibrated, tmp_path / "heads", step_times=rows)
    config = open_checkpoint(calibrated.model, heads).config
    found = read_calibration(heads / FILE_NAME, config)
    asked = {1: 1, 2: 2, 3: 2, 4: 2, 6: 8, 8: 8, 16: 8}
    stored = Stored("auto", "f32", {}, "f32")
    assert {
        threads: found.nodes_for("cpu", stored, threads, STATIC) - 2 for threads in asked
    } == asked


def test_the_same_weights_are_nearer_than_the_same_threads(calibrated, tmp_path):
    row = {"device": "cpu", "dtype": "f32", "threads": 1, "seconds": {}}
    rows = [
        row | {"weights": "q8_0", "threads": 8, "nodes": 3},
        row | {"weights": "f32", "nodes": 4},
        row | {"dtype": "bf16", "nodes": 5},  # of before there were blocks
    ]
    heads = with_file(calibrated, tmp_path / "heads", step_times=rows)
    config = open_checkpoint(calibrated.model, heads).config
    found = read_calibration(heads / FILE_NAME, config)
    for stored, dtype, nodes in [
        ("q8_0", "f32", 3),
        ("q8_0", "bf16", 3),
        ("f32", "f32", 4),
        ("bf16", "bf16", 5),
        ("q4_1", "bf16", 5),
    ]:
        assert found.nodes_for("cpu", Stored("auto", dtype, {}, stored), 1, STATIC) == nodes


def test_exported_files_carry_it(calibrated, tmp_path):
    row = {"device": "cpu", "dtype": "f32", "threads": 1, "seconds": {}, "nodes": 7}
    heads = with_file(calibrated, tmp_path / "heads", step_times=[row])
    first = export(calibrated.model, heads, tmp_path / "first.safetensors")
    again = export(first, "auto", tmp_path / "again.safetensors")
    for path in (first, again):
        assert tree_of(path, "auto") == sorted(calibrated.content["tree"][:6])
    (heads / FILE_NAME).write_text("{}")
    with pytest.warns(UserWarning, match="a published tree is used"):
        tree_of(export(calibrated.model, heads, tmp_path / "damaged.safetensors"), "auto")


def test_without_a_calibration_the_tree_is_a_published_one(pair):
    published = named_tree("mc_sim_7b_63", max_depth=3)
    assert tree_of(*pair) == sorted(published[:15])
    assert tree_of(*pair, tree=9) == sorted(published[:8])


def test_step_times_alone(calibrated, tmp_path, capsys):
    """Without data the tree stays, and this machine's row takes the place of its last one."""
    other = {"device": "cuda", "dtype": "bf16", "threads": 0, "seconds": {}, "nodes": 30}
    old = calibrated.content["step_times"][0]
    heads = with_file(calibrated, tmp_path / "heads", step_times=[old, other])
    assert command(calibrated, heads) == 0
    content = json.loads((heads / FILE_NAME).read_text())
    assert content["step_times"][0] == other
    assert content["step_times"][1]["seconds"].keys() == {"1", "4"}
    assert len(content["step_times"]) == 2
    for key in ("tree", "heads", "counts", "predicted", "by_category", "check"):
        assert content[key] == calibrated.content[key]
    assert "measured tokens/step" in capsys.readouterr().out


def test_a_check_of_another_device_is_kept_and_not_shown(calibrated, tmp_path, capsys):
    check = calibrated.content["check"]
    check = check | {"device": check["device"] | {"dtype": "bf16"}}
    heads = with_file(calibrated, tmp_path / "heads", check=check)
    assert command(calibrated, heads) == 0
    content = json.loads((heads / FILE_NAME).read_text())
    assert content["check"] == check
    printed = capsys.readouterr().out
    assert "±" in printed
    assert "measured" not in printed


def test_step_times_of_the_sizes_that_are_known(calibrated, tmp_path, capsys):
    """A size without a prediction could not be chosen; by default all that have one."""
    heads = with_file(calibrated, tmp_path / "heads")
    before = (heads / FILE_NAME).read_bytes()
    assert command(calibrated, heads, "--nodes", 24) == 2
    assert "predicts nothing for 24 nodes; it knows 1, 4, 16" in capsys.readouterr().err
    assert (heads / FILE_NAME).read_bytes() == before
    request = Request(str(calibrated.model), str(heads), threads=1)
    content, _ = calibrate(request, lambda *_: lambda _: None)
    assert content["step_times"][-1]["seconds"].keys() == {"1", "4", "16"}


def test_categories_show_the_sizes_that_were_calibrated(calibrated, capsys):
    lone = {"c": calibrated.content["by_category"]["math"] | {LOOKUP: {}}}
    by_category = calibrated.content["by_category"] | lone
    print_report(calibrated.content | {"by_category": by_category}, Console(width=160))
    printed = capsys.readouterr().out.partition("By category")[2].splitlines()
    header, *rows = (line.split() for line in printed if line.strip(" :"))
    assert "tokens/step, 4" in " ".join(header)
    assert "tokens/step, 16" in " ".join(header)
    known = {name: row for name, *row in rows}
    assert "-" not in known["math"]
    assert known["c"][2:] == ["-"] * 4


def test_memory_of_all_sizes_together(calibrated, tmp_path, monkeypatch, capsys):
    """Every size has a cache for the longest of the prompts that it will see, and no other."""
    asked = []

    def check(sizes, backend):
        asked.append(sizes.limits)
        if len(asked) == 2:
            raise MemoryError("it wants 9 bytes; max_batch=1 would fit")

    monkeypatch.setattr("medusa_ext.calibration.run.check_memory", check)
    heads = with_file(calibrated, tmp_path / "heads")
    before = (heads / FILE_NAME).read_bytes()
    assert command(calibrated, heads, "--data", calibrated.data) == 1
    error = capsys.readouterr().err
    assert "it wants 9 bytes; give fewer --nodes or shorter prompts" in error
    assert (asked[1].max_batch, asked[1].tokens) == (2, 2 * asked[1].context)
    assert (heads / FILE_NAME).read_bytes() == before

    work = _Work(SimpleNamespace(config={"max_context": 1000, "vocab_size": 9}), 20, None)
    prompts = [[1] * 3, [1] * 900] * 8
    timed = work.timed(prompts)
    assert timed == [[1] * 3] * 8
    assert work.context(timed, [[1] * 10]) == 3 + 64 + 1
    assert work.context(timed, [[1] * 90]) == 90 + 20 + 1


def test_prompts_are_answered_first(calibrated, tmp_path, capsys):
    """Prompts as data; some of them in the check too, which is said."""
    heads = with_file(calibrated, tmp_path / "heads")
    data = write_lines(tmp_path / "data.jsonl", [{"prompt": f"say {n}"} for n in range(6)])
    options = ["--data", data, "--prompts", calibrated.prompts, "-n", 9]
    assert warned_command(calibrated, heads, *options) == 0
    said = capsys.readouterr().err
    assert "3 of the 3 prompts of the check were calibrated on" in said
    assert "fewer than 5000" in said
    content = json.loads((heads / FILE_NAME).read_text())
    assert content["answers"] == 6
    assert content["by_category"] == {}
    asked = [[{"role": "user", "content": f"say {n}"}] for n in range(6)]
    with Engine(calibrated.model, heads, threads=1) as engine:
        made = engine.generate(asked, max_new_tokens=9)
    assert content["tokens"] == sum(len(result.token_ids) for result in made)


def test_written_elsewhere(calibrated, tmp_path, capsys):
    heads = with_file(calibrated, tmp_path / "heads")
    before = (heads / FILE_NAME).read_bytes()
    assert command(calibrated, heads, "--out", tmp_path / "no") == 2
    assert "give an existing directory with --out" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    options = ["--out", tmp_path / "out", "--data", calibrated.data, "--nodes", 1]
    assert warned_command(calibrated, heads, *options) == 0
    assert (heads / FILE_NAME).read_bytes() == before
    assert (tmp_path / "out" / FILE_NAME).is_file()


# Pictures


def test_pictures(calibrated, tmp_path):
    pytest.importorskip("matplotlib")
    from medusa_ext.calibration.pictures import draw

    for content in (
        calibrated.content,
        {k: v for k, v in calibrated.content.items() if k != "check"},
    ):
        for path in draw(content, tmp_path):
            assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.png", "tree.png"]


def test_a_full_disk_leaves_no_picture_and_comes_after_the_report(
    calibrated, tmp_path, monkeypatch, capsys
):
    figure = pytest.importorskip("matplotlib.figure")

    def full(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", full)
    heads = with_file(calibrated, tmp_path / "heads")
    assert command(calibrated, heads, "--pictures") == 2
    captured = capsys.readouterr()
    assert "tokens/step" in captured.out
    assert "tree.png: No space left on device" in captured.err
    assert sorted(path.name for path in heads.iterdir()) == sorted(
        path.name for path in calibrated.heads.iterdir()
    )


def test_no_pictures_without_matplotlib(calibrated, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    hidden = ("matplotlib",)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name in hidden else find(name, *a)
    )
    heads = with_file(calibrated, tmp_path / "heads")
    assert command(calibrated, heads, "--pictures") == 0
    assert 'pip install "medusa_ext[train]"' in capsys.readouterr().err
    assert not list(heads.glob("*.png"))


def test_inference_imports_nothing_of_calibration(calibrated):
    """Neither drawing nor torch, nor what only the command needs."""
    program = (
        "import sys; from medusa_ext import Engine; "
        f"Engine({str(calibrated.model)!r}, {str(calibrated.heads)!r}, threads=1); "
        "print([name for name in ('torch', 'matplotlib', 'medusa_ext.calibration.run',"
        " 'medusa_ext.distill') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
