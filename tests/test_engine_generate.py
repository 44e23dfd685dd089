"""Engine.generate on the demo model: results, batches, samples, ends of text, scores."""

from pathlib import Path

import numpy as np
import pytest

from engine_util import Known, demo_engine, demo_tokenizer, make_tiny
from loading_util import make_heads
from medusa_ext import Engine, Result

PROMPT = "The three primary colours are"
QUESTION = [{"role": "user", "content": "What is 2 + 2? Answer with one word."}]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return demo_engine()


def check_counts(result: Result, max_new_tokens: int) -> None:
    stats = result.stats
    emitted = sum(length * count for length, count in enumerate(stats.accepted_lengths))
    assert emitted == len(result.token_ids) <= max_new_tokens
    assert stats.steps == sum(stats.accepted_lengths)
    assert stats.tokens_per_step == pytest.approx(emitted / stats.steps)
    assert stats.prefill_s > 0
    assert stats.decode_s >= 0
    assert 0 <= stats.reused_tokens < result.prompt_tokens


def test_result_of_a_text_that_reaches_its_length(engine: Engine) -> None:
    result = engine.generate(PROMPT, max_new_tokens=9)
    assert (len(result.token_ids), result.finish_reason) == (9, "length")
    assert result.prompt_tokens == len(demo_tokenizer()(PROMPT)["input_ids"])
    assert result.text == demo_tokenizer().decode(result.token_ids)
    assert result.stats.decode_tokens_per_s == pytest.approx(8 / result.stats.decode_s)
    check_counts(result, 9)


def test_result_of_a_text_that_ends(engine: Engine) -> None:
    result = engine.generate(QUESTION, max_new_tokens=64)
    assert result.finish_reason == "stop"
    assert result.token_ids[-1] in engine.eos_token_id
    assert result.token_ids[-1] not in result.token_ids[:-1]
    assert result.text == demo_tokenizer().decode(result.token_ids, skip_special_tokens=True)
    assert "<|" not in result.text
    check_counts(result, 64)


def test_kinds_of_prompt_agree(engine: Engine) -> None:
    ids = demo_tokenizer()(PROMPT)["input_ids"]
    expected = engine.generate(PROMPT, max_new_tokens=6).token_ids
    assert engine.generate(ids, max_new_tokens=6).token_ids == expected
    assert engine.generate(np.array(ids), max_new_tokens=6).token_ids == expected
    text = demo_tokenizer().apply_chat_template(
        QUESTION, add_generation_prompt=True, tokenize=False
    )
    chatted = engine.generate(QUESTION, max_new_tokens=6)
    assert chatted.token_ids == engine.generate(text, max_new_tokens=6).token_ids


def test_default_length_is_the_documented_one(engine: Engine) -> None:
    result = engine.generate(PROMPT, eos_token_id=[])
    assert len(result.token_ids) == 256


def test_a_text_may_fill_the_context() -> None:
    with Engine("demo", threads=2, max_context=40) as engine:
        result = engine.generate(PROMPT, max_new_tokens=None, eos_token_id=[])
        assert result.prompt_tokens + len(result.token_ids) == 40
        assert result.finish_reason == "length"
        same = engine.generate(PROMPT, max_new_tokens=1000, eos_token_id=[])
        assert same.token_ids == result.token_ids


def test_batch_of_unequal_prompts_equals_single_prompts(engine: Engine) -> None:
    """More prompts than slots, one of them ends early."""
    prompts = [
        PROMPT,
        "A",
        QUESTION,
        "One two three four five six seven",
        [1, 2, 3],
        "Once upon a time, " * 20,
    ]
    results = engine.generate(prompts, max_new_tokens=8, temperature=0.9, seed=list(range(6)))
    assert len(prompts) > 4  # max_batch of this engine
    for prompt, result, seed in zip(prompts, results, range(6), strict=True):
        single = engine.generate(prompt, max_new_tokens=8, temperature=0.9, seed=seed)
        assert (single.token_ids, single.text) == (result.token_ids, result.text)


def test_samples_differ_and_are_reproducible(engine: Engine) -> None:
    options = {"max_new_tokens": 8, "temperature": 1.2, "seed": 5}
    samples = engine.generate([PROMPT, "A cat"], num_return_sequences=3, **options)
    texts = [sample.text for sample in samples]
    assert len(samples) == 6
    assert len(set(texts)) > 3
    assert [
        sample.text for sample in engine.generate(PROMPT, num_return_sequences=3, **options)
    ] == texts[:3]
    assert engine.generate("A cat", **options).text == texts[3]
    assert engine.generate(PROMPT, **{**options, "seed": 6}).text != texts[0]


def test_eos_ids_can_be_replaced(engine: Engine) -> None:
    free = engine.generate(PROMPT, max_new_tokens=12)
    chosen = free.token_ids[4]
    first = free.token_ids.index(chosen)
    for given in (chosen, [chosen], (0, chosen)):
        result = engine.generate(PROMPT, max_new_tokens=12, eos_token_id=given)
        assert (result.token_ids, result.finish_reason) == (free.token_ids[: first + 1], "stop")
    assert len(engine.generate(QUESTION, max_new_tokens=40, eos_token_id=[]).token_ids) == 40


def expected_stop(token_ids: list[int], stop: str) -> tuple[str, int]:
    """The text before the stop string, and how many tokens complete it."""
    for count in range(1, len(token_ids) + 1):
        text = demo_tokenizer().decode(token_ids[:count])
        if stop in text:
            return text[: text.find(stop)], count
    raise AssertionError(f"{stop!r} does not occur")


def test_stop_strings_across_token_borders_and_inside_accepted_paths(engine: Engine) -> None:
    """Windows of the text as stop strings, decoded one by one and in accepted chains."""
    prompt = demo_tokenizer()(PROMPT)["input_ids"]
    free = engine.generate(prompt, max_new_tokens=24)
    across = inside = 0
    with Engine(
        "demo", threads=2, max_context=256, drafter=Known([prompt + free.token_ids])
    ) as known:
        for start in range(0, len(free.text) - 5, 7):
            stop = free.text[start : start + 5]
            text, count = expected_stop(free.token_ids, stop)
            for one in (engine, known):
                result = one.generate(prompt, max_new_tokens=24, stop_strings=["never this", stop])
                assert (result.text, result.finish_reason) == (text, "stop")
                assert result.token_ids == free.token_ids[:count]
            across += stop not in demo_tokenizer().decode(free.token_ids[count - 1])
            emitted = sum(n * times for n, times in enumerate(result.stats.accepted_lengths))
            inside += emitted > count
            assert emitted < count + Known.max_nodes, "decoding went on after the stop string"
            assert known.session_stats().active == 0
    assert across >= 3, "no stop string lay across a token border"
    assert inside >= 3, "no stop string ended inside an accepted path"


def test_stop_string_that_never_comes_changes_nothing(engine: Engine) -> None:
    free = engine.generate(PROMPT, max_new_tokens=10)
    result = engine.generate(PROMPT, max_new_tokens=10, stop_strings="no such words")
    assert (result.text, result.token_ids, result.finish_reason) == (
        free.text,
        free.token_ids,
        "length",
    )


def test_drafters_do_not_change_the_text(engine: Engine) -> None:
    expected = engine.generate(QUESTION, max_new_tokens=12).token_ids
    with Engine("demo", None, threads=2, max_context=256) as plain:
        result = plain.generate(QUESTION, max_new_tokens=12)
        assert result.token_ids == expected
        assert result.stats.accepted_lengths == [0, len(expected)]


def test_score(engine: Engine) -> None:
    """Greedy decoding follows the scores; chunks change no bit; hidden states come on request."""
    prompt = demo_tokenizer()(PROMPT)["input_ids"]
    tokens = prompt + engine.generate(prompt, max_new_tokens=5).token_ids
    logits, hidden = engine.score(tokens, return_hidden=True)
    assert logits.shape == (len(tokens), engine.info["vocab_size"])
    assert hidden.shape == (len(tokens), engine.info["hidden_size"])
    assert logits.dtype == hidden.dtype == np.float32
    assert np.isfinite(logits).all()
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens[len(prompt) :]
    assert np.array_equal(engine.score(tokens, chunk=3), logits)
    assert np.array_equal(np.from_dlpack(logits), logits)
    assert np.array_equal(engine.score(PROMPT), logits[: len(prompt)])


def test_info_and_memory(engine: Engine) -> None:
    assert engine.info["family"] == "llama"
    assert engine.info["drafter"] == "prompt lookup"
    assert engine.info["max_context"] == engine.max_context == 1024
    assert engine.tree is None
    # The file's own blocks: 106.2 M parameters in 5 bits (q4_1), 28.3 M in 8.5 (q8_0).
    assert engine.info["weights"] == "q4_1, q8_0"
    assert engine.memory["weight_bytes"] == pytest.approx(
        106.2e6 * 20 / 32 + 28.3e6 * 34 / 32, 0.01
    )
    # 2 x 30 layers x 3 heads x 64 x 2 bytes a token.
    assert engine.memory["kv_bytes_per_1000_tokens"] == 1000 * 2 * 30 * 3 * 64 * 2
    assert "prompt lookup" in repr(engine)


def test_medusa_heads_and_trees(tmp_path: Path) -> None:
    """Random heads never change the text; the tree is the one asked for, no deeper than they."""
    model, heads = make_tiny(tmp_path / "model"), make_heads(tmp_path / "heads", "B")
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 2}
    with Engine(model, None) as plain:
        expected = plain.generate(PROMPT, **options).token_ids
    paths = [[0], [1], [0, 0], [0, 1], [0, 0, 0]]
    for tree in ("auto", paths):
        with Engine(model, heads, tree=tree) as engine:
            assert engine.info["drafter"] == "3 Medusa heads"
            assert engine.tree is not None
            assert max(map(len, engine.tree)) <= 3
            if tree == paths:
                assert sorted(engine.tree) == sorted(paths)
            assert engine.generate(PROMPT, **options).token_ids == expected
    with pytest.raises(ValueError, match="depth 4, the model has 3 heads"):
        Engine(model, heads, tree=[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]])


def test_typical_acceptance(tmp_path: Path) -> None:
    """At temperature 0 it is exact; above, it draws nothing and accepts several tokens a step."""
    model, heads = make_tiny(tmp_path / "model"), make_heads(tmp_path / "heads", "B")
    typical = {"acceptance": "typical", "max_new_tokens": 60, "eos_token_id": []}
    with Engine(model, heads) as engine:
        exact = engine.generate(PROMPT, max_new_tokens=60, eos_token_id=[])
        assert engine.generate(PROMPT, **typical).token_ids == exact.token_ids
        options = {"temperature": 2.0, "epsilon": 0.0, "delta": 0.0, **typical}
        loose = engine.generate(PROMPT, seed=1, **options)  # all guesses
        assert engine.generate(PROMPT, seed=2, **options).token_ids == loose.token_ids
        assert loose.stats.tokens_per_step > 3 > exact.stats.tokens_per_step


def test_prompt_lookup_saves_steps(engine: Engine) -> None:
    """A text that repeats itself takes fewer steps than tokens."""
    result = engine.generate("one two three four, " * 6, max_new_tokens=24)
    assert result.stats.tokens_per_step > 1.3
    assert len(result.stats.accepted_lengths) > 3
