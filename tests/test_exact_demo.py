"""The central promise on the real model: every kind of drafter against plain decoding."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import exact_util as exact
from conftest import isas
from exact_util import Job, ScriptedDrafter, Tally
from medusa_ext import _core
from medusa_ext.loading import load_model
from medusa_ext.trees import named_tree
from util import normal, unit_of, with_threads

pytestmark = pytest.mark.checkpoint
TALLY = Tally()
MAX_CONTEXT = 192
HIDDEN = 576
QUESTIONS = [
    "Why is the sky blue?",
    "Repeat after me three times: the cat sat on the mat.",
    "What is 7 times 8?",
    "Say yes.",
    "List the days of the week, then list them once more.",
    "Write a haiku about rain.",
    "Count from one to twenty in words.",
    "Name three colours.",
]
# Long enough for answers to cross the first page border.
SYSTEM = (
    "<|im_start|>system\nYou are a helpful assistant. You answer in plain words, and you "
    "never say more than what was asked.<|im_end|>\n"
)
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "seed": 1},
    {},
    {"temperature": 1.0, "seed": 2**63, "top_p": 0.9, "sample_index": 1},
    {"repetition_penalty": 1.2},
    {"temperature": 0.5, "seed": 3, "top_k": 20, "min_p": 0.05},
    {"temperature": 1.3, "seed": 4, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.1},
    {"temperature": 0.3, "seed": 5, "min_p": 0.2},
]


class Demo:
    """The real model with random heads, and what plain decoding answers on one thread."""

    def __init__(self, path: Path, heads: Path, backend: _core.Backend, count: int) -> None:
        self.backend = backend
        loaded = load_model(path, heads, backend=backend)
        self.model, self.eos = loaded.model, tuple(loaded.eos_ids)
        plain = load_model(path, None, backend=with_threads(backend, 1)).model
        self.jobs = []
        for question, options in zip(QUESTIONS, SAMPLINGS, strict=True):
            text = SYSTEM + f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            prompt = tuple(loaded.tokenizer.encode(text, add_special_tokens=False))
            self.jobs.append(Job(prompt, count, tuple(options.items()), self.eos))
        self.known = [exact.plain_tokens(plain, job, MAX_CONTEXT) for job in self.jobs]

    def check(self, drafter: _core.Drafter | None, what: str, **options: int) -> None:
        """All jobs through one session."""
        session = _core.Session(self.model, drafter, max_context=MAX_CONTEXT, **options)
        scripted = drafter if isinstance(drafter, ScriptedDrafter) else None
        outcomes = exact.run(session, self.jobs, drafter=scripted, scripts=self.known)
        for job, outcome, known in zip(self.jobs, outcomes, self.known, strict=True):
            exact.check(job, outcome, known, MAX_CONTEXT, f"demo model, {what}, {options}")
        TALLY.add(self.backend, session, outcomes)
        TALLY.of(self.backend).update(scripted.met if scripted else {})


@pytest.fixture(scope="module")
def demo(
    backend: _core.Backend,
    demo_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Demo:
    if unit_of(backend) != isas()[-1]:
        pytest.skip("slower instruction sets decode the demo model where MEDUSA_CPU_ISA names them")
    length = 64 if pytestconfig.getoption("--long") else 32
    return Demo(demo_path, write_heads(tmp_path_factory.mktemp("heads")), backend, length)


def write_heads(folder: Path) -> Path:
    """Three random heads of one block that share the model's lm_head."""
    rng = np.random.default_rng(1)
    tensors = {}
    for head in range(3):
        tensors[f"{head}.0.linear.weight"] = normal(rng, HIDDEN, HIDDEN, scale=0.02)
        tensors[f"{head}.0.linear.bias"] = normal(rng, HIDDEN, scale=0.1)
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    config = {"medusa_num_heads": 3, "medusa_num_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("max_nodes", "options"),
    [
        (24, {"max_batch": 3, "prefill_chunk": 13}),
        (64, {"max_batch": 1}),
        (9, {"max_batch": 8, "prefill_chunk": 600}),
        # Three pages for sequences that start with one each and outgrow it: they are set back.
        (8, {"max_batch": 4, "prefill_chunk": 40, "cache_tokens": MAX_CONTEXT}),
    ],
)
def test_known_continuations_with_planted_errors(
    demo: Demo, max_nodes: int, options: dict[str, int]
) -> None:
    demo.check(ScriptedDrafter(max_nodes, max_nodes, 49152), f"{max_nodes} nodes", **options)


def test_random_heads(demo: Demo) -> None:
    tree = _core.TreeSpec.from_paths(named_tree("mc_sim_7b_63", max_depth=3, max_nodes=16))
    demo.check(_core.medusa_drafter(demo.model, tree), "random heads", max_batch=4, prefill_chunk=7)


def test_prompt_lookup(demo: Demo) -> None:
    demo.check(_core.prompt_lookup_drafter(min_ngram=1), "prompt lookup", max_batch=5)


def test_plain_batch(demo: Demo) -> None:
    demo.check(None, "no drafter", max_batch=8, prefill_chunk=64)


def test_the_cases_met_what_they_are_for(demo: Demo) -> None:
    met = TALLY.of(demo.backend)
    if not met["cases"]:
        pytest.skip("no case was run")
    wanted = {
        "accepted paths of depth 3 and more": 50,
        "compactions across a page border": 10,
        "eos inside an accepted path": 1,
        "requests that reused tokens": 20,
        "set-backs": 1,
        "finish stop": 2,
        "finish length": 20,
    }
    missing = {what: (met[what], least) for what, least in wanted.items() if met[what] < least}
    assert not missing, f"met too little (met, wanted): {missing}"
    # In all cases together, also those of random heads and of no drafter at all.
    assert met["tokens"] / met["steps"] > 1.3
