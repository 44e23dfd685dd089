"""medusa-ext calibrate on bad input: files that do not fit, data that say nothing, bad options."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from calibration_util import (
    calibrated_heads,
    calibrated_pair,
    command,
    tree_of,
    with_file,
    write_lines,
)
from medusa_ext.calibration.file import read_calibration
from medusa_ext.calibration.texts import Text, read_data
from medusa_ext.cli import run
from medusa_ext.loading import LoadError, open_checkpoint
from medusa_ext.loading.exporting import CALIBRATION_FILE as FILE_NAME
from medusa_ext.trees import named_tree


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    return calibrated_pair(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> SimpleNamespace:
    return calibrated_heads(tmp_path_factory.getbasetemp())


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
    ({"tree": "mc_sim_7b_63"}, "tree is missing or of the wrong type"),
    ({"tree": [[rank] for rank in range(256)]}, "tree must be a list of up to 255 paths"),
    ({"tree": [["0"]]}, "wanted paths"),
    ({"step_times": {}}, "step_times is missing or of the wrong type"),
    ({"step_times": [3]}, r"step_times\[0\] is missing or of the wrong type"),
    ({"step_times": [{"device": "cpu"}]}, r"step_times\[0\]\.dtype is missing"),
    ({"predicted": None}, "predicted is missing"),
    ({"guesses": {"dynamic": 3}}, "guesses.dynamic is missing or of the wrong type"),
    ({"predicted": [{"nodes": 4}]}, r"predicted\[0\]\.tokens_per_step is missing"),
    ({"predicted": [{"nodes": True}]}, r"predicted\[0\]\.nodes is missing or of the wrong type"),
    ({"tokens": "many"}, "tokens is missing or of the wrong type"),
    ({"counts": [3]}, "heads and counts must have 3 entries each"),
    ({"heads": [[0.5], [0.5], [float("nan")]]}, r"heads\[2\]\[0\] is missing or of the wrong"),
    ({"values": [0.5]}, "it has 1 values for"),
    ({"by_category": {"math": {"top1": [1]}}}, r"by_category\.math\.heads is missing"),
    ({"check": {"device": {}}}, r"check\.prompts is missing"),
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
    ('{"input_ids": [3, 4, 5], "assistant_mask": [0, 1, 1]}', "hold 1 texts; wanted at least 2"),
    ('{"input_ids": [3, 4], "assistant_mask": [0, 1]}\n' * 2, "hold 2 texts; .* of 2 tokens or"),
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
    asked = write_lines(tmp_path / "asked.jsonl", [{"prompt": "say"}])
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
        (
            [*pair, "--data", asked, "-n", 200],
            "max_new_tokens must be an integer in [2, 127], got 200",
        ),
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
    first, second = read_data(path, model="demo", vocab_size=9, max_context=6)
    assert first == Text([1, 2, 3, 4, 5, 6], [(1, 2), (4, 6)], "")
    assert second == Text([7, 8], [(1, 2)], "math")


def test_settings_that_do_not_suit(tmp_path):
    """Each is said once; the same model in another folder is no other model."""
    record = {"input_ids": [1, 2], "assistant_mask": [0, 1]}
    settings = (
        {"temperature": 0.7, "model": "here/demo"},
        {"temperature": 0.0},
        None,
        {"model": 3},
    )
    lines = [record | {"settings": each} for each in (*settings, settings[0])]
    path = write_lines(tmp_path / "data.jsonl", lines)
    with pytest.warns() as said:
        assert len(read_data(path, model="there/demo", vocab_size=9, max_context=6)) == 5
    first, second = (str(one.message) for one in said)
    assert "sampled at temperature 0.7" in first
    assert "made with the model 3, and this one is there/demo" in second
