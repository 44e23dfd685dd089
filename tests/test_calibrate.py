"""medusa-ext calibrate: its prediction is what engines do, and its file is what they use."""

import importlib.util
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file

from calibration_util import (
    NUM_HEADS,
    NUM_TOKENS,
    make_calibrated_pair,
    make_prompts,
    write_lines,
)
from medusa_ext import Engine, _core
from medusa_ext.calibration.file import read_calibration
from medusa_ext.calibration.ranks import BEYOND, Ranks, collect, walk
from medusa_ext.calibration.run import _Measured
from medusa_ext.calibration.texts import Text, read_data
from medusa_ext.calibration.tree_search import best_paths
from medusa_ext.cli import run
from medusa_ext.loading import LoadError, export, load_model, open_checkpoint
from medusa_ext.loading.exporting import CALIBRATION_FILE as FILE_NAME
from medusa_ext.trees import named_tree


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    return make_calibrated_pair(tmp_path_factory.mktemp("calibrate"))


@pytest.fixture(scope="module")
def answered(pair) -> list[tuple[list[int], list[int]]]:
    """Prompts and the model's own answers."""
    prompts = make_prompts(24, seed=2)
    with Engine(*pair, threads=1, max_batch=4) as engine:
        results = engine.generate(prompts, max_new_tokens=NUM_TOKENS)
    return [(prompt, result.token_ids) for prompt, result in zip(prompts, results, strict=True)]


def text(prompt: list[int], answer: list[int], category: str = "") -> Text:
    return Text(prompt + answer, [(len(prompt), len(prompt) + len(answer))], category)


def ranks_of(model: _core.Model, texts: list[Text], num_ranks: int = 64) -> Ranks:
    return collect(model, texts, num_heads=NUM_HEADS, num_ranks=num_ranks, hidden_size=32)


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
    _core.head_candidates(loaded.model, hidden, ids)
    for head in range(NUM_HEADS):
        logits = hidden.astype(np.float64) @ state[f"{head}.0.weight"].double().numpy().T
        found = np.take_along_axis(logits, ids[head].astype(np.intp), axis=1)
        best = -np.sort(-logits, axis=1)[:, :7]
        # An f32 sum of 32 products errs by less than 32 * 2^-24 of the products' absolute sum.
        np.testing.assert_allclose(found, best, atol=1e-5)
        assert all(len(set(row)) == 7 for row in ids[head].tolist())


@pytest.mark.parametrize(
    ("hidden", "ids", "words"),
    [
        ((3, 31), (NUM_HEADS, 3, 4), "hidden is \\[3, 31\\]; wanted \\[R, 32\\]"),
        ((3, 32), (NUM_HEADS, 4, 4), "ids is .* wanted i32 \\[3, 3, up to 256\\]"),
        ((3, 32), (2, 3, 4), "ids is"),
        ((3, 32), (NUM_HEADS, 3, 257), "ids is"),
        ((3, 32), (NUM_HEADS, 3, 0), "allowed is 1 to|at least|empty"),
    ],
)
def test_candidates_of_wrong_shapes(pair, hidden, ids, words):
    model = load_model(*pair, backend=_core.Backend(threads=1)).model
    with pytest.raises(ValueError, match=words):
        _core.head_candidates(model, np.zeros(hidden, np.float32), np.zeros(ids, np.int32))
    with pytest.raises(ValueError, match="wanted i32"):
        _core.head_candidates(
            model, np.zeros((3, 32), np.float32), np.zeros((NUM_HEADS, 3, 4), np.float32)
        )


def test_candidates_need_heads(pair):
    model = load_model(pair[0], None, backend=_core.Backend(threads=1)).model
    with pytest.raises(ValueError, match="the model has no heads"):
        _core.head_candidates(model, np.zeros((1, 32), np.float32), np.zeros((0, 1, 4), np.int32))


# The command


def records(answered, categories=("writing", "math")) -> list[object]:
    return [
        {
            "record": index,
            "input_ids": prompt + answer,
            "assistant_mask": [0] * len(prompt) + [1] * len(answer),
            "category": categories[index % 2],
        }
        for index, (prompt, answer) in enumerate(answered)
    ]


@pytest.fixture(scope="module")
def calibrated(pair, answered, tmp_path_factory) -> SimpleNamespace:
    """Heads calibrated by the command, in a folder of their own."""
    folder = tmp_path_factory.mktemp("calibrated")
    data = write_lines(folder / "data.jsonl", records(answered))
    prompts = write_lines(
        folder / "prompts.jsonl",
        [{"turns": [f"say {n}", "x"], "category": "math"} for n in range(3)],
    )
    heads = folder / "heads"
    heads.mkdir()
    for path in pair[1].iterdir():
        (heads / path.name).write_bytes(path.read_bytes())
    arguments = ["calibrate", pair[0], heads, "--data", data, "--prompts", prompts, "--threads", 1]
    arguments += ["--nodes", 4, "--nodes", 16, "-n", 12, "--no-pictures"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens
        assert run([str(argument) for argument in arguments]) == 0
    content = json.loads((heads / FILE_NAME).read_text())
    return SimpleNamespace(model=pair[0], heads=heads, data=data, prompts=prompts, content=content)


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
    chosen, held = ranks.halves()
    for row in content["predicted"]:
        tree = content["tree"][: row["nodes"] - 1]
        assert row["tokens_per_step"] == pytest.approx(walk(held, tree).tokens_per_step, rel=1e-5)
        assert row["chosen_on"] == pytest.approx(walk(chosen, tree).tokens_per_step, rel=1e-5)
    assert [row["nodes"] for row in content["predicted"]] == [1, 4, 16]
    assert content["predicted"][2]["tokens_per_step"] > 1.2
    math = content["by_category"]["math"]["tokens_per_step"]
    wanted = walk(held.by_category()["math"], content["tree"][:15]).tokens_per_step
    assert math["16"] == pytest.approx(wanted, rel=1e-5)


def test_check_measures_engines(calibrated):
    """Tokens per step of the check are those of an engine with that tree."""
    check = calibrated.content["check"]
    assert (check["prompts"], check["max_new_tokens"]) == (3, 12)
    asked = [[{"role": "user", "content": f"say {n}"}] for n in range(3)]
    for row in check["all"]:
        tree = calibrated.content["tree"][: row["nodes"] - 1]
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
        str(one["nodes"]): one["tokens_per_later_step"] for one in calibrated.content["predicted"]
    }
    for count, seconds in row["seconds"].items():
        assert row["tokens_per_s"][count] == pytest.approx(later[count] / seconds, rel=1e-4)
    assert row["nodes"] == max((1, 4, 16), key=lambda count: row["tokens_per_s"][str(count)])


def with_file(calibrated, folder: Path, **changes: object) -> Path:
    """A copy of the heads whose calibration is changed."""
    folder.mkdir()
    for path in calibrated.heads.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / FILE_NAME).write_text(json.dumps(calibrated.content | changes))
    return folder


def tree_of(model: Path, heads: Path, **options: object) -> list[list[int]]:
    with Engine(model, heads, **({"threads": 1} | options)) as engine:
        return sorted(engine.tree)


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


UNFIT = [
    ({"version": 2}, "it is no calibration of version 1"),
    ({"heads": [[0.5]] * 4}, "it is for 4 heads, the heads beside it are 3"),
    ({"heads": 3}, "it is for no heads"),
    ({"vocab_size": 50}, "it is for a vocabulary of 50, the model has 320"),
    ({"tree": [[0, 0, 0, 0]]}, "parent"),
    ({"tree": [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]}, "depth 4, the model has 3 heads"),
    ({"tree": [[0, 0], [0]]}, "path \\[0, 0\\] stands before its parent"),
    ({"tree": [[300]]}, "rank 300|300"),
    ({"tree": [[-1]]}, "-1"),
    ({"tree": "mc_sim_7b_63"}, "tree must be a list of up to 255 paths"),
    ({"tree": [[rank] for rank in range(256)]}, "tree must be a list of up to 255 paths"),
    ({"tree": [["0"]]}, "wanted paths"),
    ({"step_times": {}}, "step_times must be a list"),
    ({"step_times": [3]}, "step_times must hold objects"),
    ({"step_times": [{"device": "cpu"}]}, "step_times: dtype is missing"),
    (
        {
            "step_times": [
                {"device": "cpu", "dtype": "f32", "threads": 1, "nodes": 999, "seconds": {}}
            ]
        },
        "nodes is 999; wanted 1 to 256",
    ),
]


@pytest.mark.parametrize(("changes", "words"), UNFIT, ids=[words for _, words in UNFIT])
def test_a_calibration_that_does_not_fit(calibrated, tmp_path, capsys, changes, words):
    """An engine says so and goes on; the command refuses it and says what to do."""
    heads = with_file(calibrated, tmp_path / "heads", **changes)
    config = open_checkpoint(calibrated.model, heads).config
    with pytest.raises(LoadError, match=words) as error:
        read_calibration(heads / FILE_NAME, config)
    assert "make it again with `medusa-ext calibrate`" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match="a published tree is used"):
        tree = tree_of(calibrated.model, heads)
    assert tree == sorted(named_tree("mc_sim_7b_63", max_depth=3)[:15])
    assert run(["calibrate", str(calibrated.model), str(heads)]) == 2
    assert "make it again" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b"[]", b" " * (17 << 20)])
def test_a_damaged_calibration(calibrated, tmp_path, content):
    heads = with_file(calibrated, tmp_path / "heads")
    (heads / FILE_NAME).write_bytes(content)
    with pytest.warns(UserWarning, match=FILE_NAME):
        tree_of(calibrated.model, heads)


def command(calibrated, heads: Path, *more: object) -> int:
    arguments = ["calibrate", calibrated.model, heads, "--threads", 1, *more]
    if "--nodes" not in more:
        arguments += ["--nodes", 4]
    if "--pictures" not in more:
        arguments.append("--no-pictures")
    return run([str(argument) for argument in arguments])


def warned_command(*arguments: object) -> int:
    """With warnings as they are outside of tests: lines on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        return command(*arguments)


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
    assert "check" not in content
    for key in ("tree", "heads", "counts", "predicted", "by_category"):
        assert content[key] == calibrated.content[key]
    assert "tokens/step" in capsys.readouterr().out


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


BAD_DATA = [
    ("", "holds no prompt"),
    ('{"input_ids": [3, 4], "assistant_mask": [0]}', "line 1: assistant_mask must hold 0 or 1"),
    ('{"input_ids": [3, 4], "assistant_mask": [0, 2]}', "must hold 0 or 1"),
    ('{"input_ids": [3, 4]}', "line 1: assistant_mask is missing"),
    ('{"input_ids": [3, "4"], "assistant_mask": [0, 1]}', "input_ids is missing or no list"),
    ('{"input_ids": [3, 320], "assistant_mask": [0, 1]}', "token 320 is outside .* of 320"),
    ('{"input_ids": [3, -1], "assistant_mask": [0, 1]}', "token -1 is outside"),
    ('{"input_ids": [3, 4], "assistant_mask": [0, 0]}', "no record holds a token that the model"),
    ('{"input_ids": [3], "assistant_mask": [1]}', "no record holds a token that the model"),
    ('{"input_ids": [3, 4, 5], "assistant_mask": [0, 1, 1]}', "hold one text; wanted at least 2"),
    ('{"input_ids": [3, 4], "assistant_mask": [0, 1]}\n[]', "line 2 holds \\[\\]"),
    ('{"input_ids": [3, 4], "assistant_mask": [0, 1]}\n{', "line 2 is not JSON"),
    ('{"text": "hello"}', '"conversations", "messages", "turns" or "prompt"'),
    (f'{{"input_ids": {[3] * 129}, "assistant_mask": {[1] * 129}}}', "context holds 128"),
]


@pytest.mark.parametrize(("content", "words"), BAD_DATA, ids=range(len(BAD_DATA)))
def test_bad_data(calibrated, tmp_path, capsys, content, words):
    heads = with_file(calibrated, tmp_path / "heads")
    before = (heads / FILE_NAME).read_bytes()
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    assert command(calibrated, heads, "--data", path) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert error.count("\n") == 1
    assert (heads / FILE_NAME).read_bytes() == before


def test_other_bad_input(calibrated, pair, tmp_path, capsys):
    missing = tmp_path / "missing.jsonl"
    for arguments, words in (
        ([pair[0], "--data", calibrated.data], "has no Medusa heads; name them"),
        ([*pair], "does not exist yet; give held-out text with --data"),
        ([*pair, "--data", missing], f"cannot read {missing}: No such file"),
        ([*pair, "--data", calibrated.data, "--prompts", missing], "No such file"),
        (
            [*pair, "--data", calibrated.data, "--nodes", 257],
            "nodes must be an integer in [1, 256]",
        ),
        ([*pair, "--data", calibrated.data, "-n", 1], "max_new_tokens must be"),
        ([*pair, "--data", calibrated.data, "--dtype", "f8"], "dtype must be"),
        ([*pair, "--data", calibrated.data, "--prompts", calibrated.data], "a prompt has"),
    ):
        assert run(["calibrate", *map(str, arguments)]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert not (pair[1] / FILE_NAME).exists()


def test_turns_of_a_record(tmp_path):
    """Runs of 1 are answers; a first token has nothing before it; other keys do not matter."""
    path = write_lines(
        tmp_path / "data.jsonl",
        [
            {"input_ids": [1, 2, 3, 4, 5, 6], "assistant_mask": [1, 1, 0, 0, 1, 1], "x": None},
            {"input_ids": [1, 2], "assistant_mask": [1, 0], "category": "left out"},
            {"input_ids": [7, 8], "assistant_mask": [0, 1], "category": "math"},
        ],
    )
    first, second = read_data(path, vocab_size=9, max_context=6)
    assert first == Text([1, 2, 3, 4, 5, 6], [(1, 2), (4, 6)], "")
    assert second == Text([7, 8], [(1, 2)], "math")


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
