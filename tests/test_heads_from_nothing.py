"""The three commands on the real model, from nothing: docs/heads.md on a budget of minutes."""

import json
from pathlib import Path

import pytest

from medusa_ext import Engine, cli
from test_exact_demo import write_heads

pytest.importorskip("accelerate", reason="accelerate of the extra `train` is not installed")
pytestmark = [pytest.mark.checkpoint, pytest.mark.slow]

HELD_OUT = Path(__file__).parents[1] / "benchmarks" / "questions.jsonl"
ASKED = [
    "Why do leaves change their colour in autumn?",
    "Write a short letter to a friend who moved to another city.",
    "Explain what a variable is to somebody who never wrote a program.",
    "A train leaves at 3 pm and arrives at 7:30 pm. How long is the ride?",
    "Give me five ideas for a rainy Sunday.",
    "What are the causes of inflation?",
    "Describe a market in the early morning.",
    "Which exercises strengthen the back?",
]


def run(command: str) -> None:
    """One thread: what else runs at the same time does not matter then."""
    assert cli.run([*command.split(), "--threads", "1"]) == 0


def answers(heads: str | Path | None, **options: int) -> tuple[list[list[int]], float]:
    """Token ids, and tokens per step of all answers together."""
    with Engine("demo", heads, threads=1, max_context=256, **options) as engine:
        asked = [[{"role": "user", "content": question}] for question in ASKED]
        results = engine.generate(asked, max_new_tokens=48)
    ids = [result.token_ids for result in results]
    return ids, sum(map(len, ids)) / sum(result.stats.steps for result in results)


@pytest.mark.filterwarnings("default:the data hold:UserWarning")  # few tokens, as is said
def test_heads_beat_prompt_lookup_and_random_heads(
    demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("distill demo --prompts tasks --out records.jsonl --tokens 6000 -n 80")
    run(
        "train demo --data records.jsonl --out heads --num-heads 3 --epochs 4 --batch-size 256 "
        "--learning-rate 2e-3 --loss-vocab 2048 --eval-positions 300"
    )
    run(f"calibrate demo heads --data {HELD_OUT} --nodes 16 -n 40")
    predicted = json.loads(Path("heads/calibration.json").read_text())["predicted"][-1]

    plain, one = answers(None)
    known, lookup = answers("prompt-lookup")
    guessed, random = answers(write_heads(tmp_path), tree=16)
    learned, found = answers("heads", tree=16)
    print(f"tokens per step: lookup {lookup:.2f}, random heads {random:.2f}, heads {found:.2f}")
    assert plain == known == guessed == learned
    assert one == 1.0
    assert found > 1.1 * max(lookup, random)
    assert found == pytest.approx(predicted["tokens_per_step"], rel=0.15)
