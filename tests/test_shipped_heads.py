"""The heads that come with the demo model: what is in the package is what its card says."""

import re
from pathlib import Path

import pytest

from medusa_ext import Engine
from medusa_ext.calibration.file import read_calibration
from medusa_ext.loading import open_checkpoint
from medusa_ext.loading.head_rows import read_draft_tokens
from medusa_ext.loading.source import DEMO_HEADS

pytestmark = pytest.mark.checkpoint


def test_files(demo_path: Path) -> None:
    checkpoint = open_checkpoint("demo")
    assert checkpoint.heads_info is not None
    assert (checkpoint.heads_info.format, checkpoint.heads_info.path) == ("C", DEMO_HEADS)
    assert open_checkpoint(demo_path).heads_info is None  # they belong to the name
    assert (DEMO_HEADS / "medusa_lm_head.safetensors").stat().st_size <= 8_000_000
    tokens = read_draft_tokens(DEMO_HEADS / "draft_tokens.json", 49152)
    assert checkpoint.heads_info.head_vocab == len(tokens) == 4096
    assert set(checkpoint.eos_ids) <= set(tokens[:200])  # every answer has one
    card = (DEMO_HEADS / "README.md").read_text()
    assert "license: apache-2.0" in card
    for command in ("distill", "train", "calibrate"):
        assert f"medusa-ext {command} demo" in card


def test_prediction_and_measurement(demo_path: Path) -> None:
    content = read_calibration(
        DEMO_HEADS / "calibration.json", open_checkpoint("demo").config
    ).content
    check = content["check"]
    assert (check["prompts"], check["max_new_tokens"], len(check["by_category"])) == (80, 128, 8)
    rows = {row["nodes"]: row for row in check["all"]}
    for nodes in (16, 64):
        assert rows[nodes]["measured"] == pytest.approx(rows[nodes]["predicted"], rel=0.05)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.MULTILINE)
    found = {name: (small, large) for name, small, large in table}
    wanted = check["by_category"] | {"all": {str(nodes): rows[nodes] for nodes in (16, 64)}}
    assert found == {
        name: tuple(f"{row[nodes]['measured']:.2f}" for nodes in ("16", "64"))
        for name, row in wanted.items()
    }


def test_they_are_used_and_change_nothing(demo_path: Path) -> None:
    question = [{"role": "user", "content": "How does a bicycle stay upright?"}]
    results = []
    for options in (
        {"heads": None},
        {"head_vocab": None},
        {"tree": 16},
        {"heads": "demo", "tree": 64},
    ):
        with Engine("demo", threads=2, max_context=256, **options) as engine:
            results.append(engine.generate(question, max_new_tokens=96))
    assert len({tuple(result.token_ids) for result in results}) == 1
    plain, _, small, large = (result.stats.tokens_per_step for result in results)
    assert plain == 1.0
    assert large > small > 1.5


def test_steps_grow_trees_of_all_that_comes_with_them(demo_path: Path) -> None:
    with Engine("demo", threads=2, max_context=256, tree=4) as engine:
        assert engine.info["drafter"] == "4 Medusa heads, n-grams, lookup; dynamic trees"
    files = sum(path.stat().st_size for path in DEMO_HEADS.iterdir())
    assert files <= 8 << 20
