"""Tokenizers of GGUF files, against transformers' and against SentencePiece's definition."""

import io
import json
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import loading_util as util
from medusa_ext.loading import LoadError
from medusa_ext.loading.gguf import GgufFile
from medusa_ext.loading.gguf_tokenizer import build
from medusa_ext.loading.tokenizer import from_directory, wrap

TEXTS = [
    "Hello, world!",
    "  leading, trailing  and   inner spaces  ",
    "12345 and 3.14159, 2024-01-01",
    "don't we'll I'M it's",
    "naïve café Zürich Straße",
    "日本語のテキスト 한국어 עברית العربية",
    "emoji 👋🏽 family 👩‍👩‍👧 flag 🇩🇪 e\u0301",
    "tabs\tand\nnewlines\r\n\n\nend",
    "def f(x):\n    return x**2  # <= squares\n",
    "x²+½ №5 ①",
    "",
    " ",
    "\u0000\u0001\ufffd",
]


def write_tokenizer(path: Path, fill) -> Path:
    """A GGUF file that holds a tokenizer and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_tokenizer(path: Path):
    return wrap(*build(GgufFile(path)))


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "default"])
def test_byte_level_vocabularies(tmp_path, pre):
    """Every text survives the way there and back, and is cut as in the vocabulary's training."""
    path = write_tokenizer(
        tmp_path / "t.gguf", lambda w: util.add_gguf_tokenizer(w, util.make_tokenizer(), pre)
    )
    tokenizer = open_tokenizer(path)
    for text in TEXTS:
        wanted = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == wanted
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab 1234")
    numbers = [piece for piece, _ in pieces[1:]]
    assert (
        numbers
        == {
            "gpt-2": ["Ġ1234"],
            "smollm": ["Ġ", "1", "2", "3", "4"],
            "llama-bpe": ["Ġ", "123", "4"],
            "qwen2": ["Ġ", "1", "2", "3", "4"],
            "default": ["Ġ", "123", "4"],
        }[pre]
    )


def test_special_tokens_and_template(tmp_path):
    path = write_tokenizer(
        tmp_path / "t.gguf", lambda w: util.add_gguf_tokenizer(w, util.make_tokenizer())
    )
    tokenizer = open_tokenizer(path)
    messages = [{"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    reference = util.make_tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert ids == reference
    assert ids[0] == 1  # <|im_start|>, whole
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi\nassistant\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


@pytest.mark.parametrize("adds", [True, False])
def test_begin_of_sequence(tmp_path, adds):
    def fill(writer):
        util.add_gguf_tokenizer(writer, util.make_tokenizer())
        writer.kv_data[0]["tokenizer.ggml.add_bos_token"].value = adds

    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "t.gguf", fill))
    assert (tokenizer("hi")["input_ids"][0] == 1) == adds
    assert tokenizer("hi", add_special_tokens=False)["input_ids"][0] != 1


PIECES = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    "▁",
    "h",
    "e",
    "l",
    "o",
    "w",
    "r",
    "d",
    "he",
    "ll",
    "hell",
    "hello",
    "lo",
    "▁he",
    "▁w",
    "or",
    "▁wor",
    "ld",
    "▁world",
    "▁hello",
]


def fill_sentencepiece(writer) -> None:
    tokens = PIECES + WORDS
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(PIECES) + [-float(rank) for rank in range(len(WORDS))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(WORDS))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def sentencepiece(text: str) -> list[str]:
    """SentencePiece's BPE by definition: join the neighbours whose union scores best."""
    score = {word: -rank for rank, word in enumerate(WORDS)}
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [(score[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in score]
        if not joins:
            break
        at = -max(joins)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    out = []
    for piece in pieces:
        out += [piece] if piece in score else [f"<0x{byte:02X}>" for byte in piece.encode()]
    return out


def test_sentencepiece_vocabulary(tmp_path):
    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "t.gguf", fill_sentencepiece))
    rng = np.random.default_rng(0)
    texts = ["hello world", "hello", "", "  two", "é 👋🏽 x", "lo\nll"]
    texts += ["".join(rng.choice(list("helowrd  "), rng.integers(1, 20))) for _ in range(300)]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == (sentencepiece(text) if text else [])
        assert tokenizer.decode(ids) == text
    assert tokenizer("hello")["input_ids"][0] == 1  # <s> by default


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.add_tokenizer_model("bert"), "tokenizer 'bert' is not supported"),
        (lambda w: w.add_tokenizer_pre("tekken"), "pre-tokenizer 'tekken' is not supported"),
        (lambda w: w.add_token_types([1]), "1 token types for 320 tokens"),
        (lambda w: w.add_token_merges(["q zz"]), "vocabulary cannot be used"),
        (lambda w: w.add_bos_token_id(320), "320 is not below the vocabulary size 320"),
        (lambda w: w.add_token_list(["a"] * 320), "'a' stands twice"),
    ],
)
def test_damaged_vocabulary(tmp_path, change, words):
    def fill(writer):
        util.add_gguf_tokenizer(writer, util.make_tokenizer())
        kept = dict(writer.kv_data[0])
        writer.kv_data[0].clear()
        change(writer)
        writer.kv_data[0] = kept | writer.kv_data[0]

    path = write_tokenizer(tmp_path / "t.gguf", fill)
    with pytest.raises(LoadError) as error:
        build(GgufFile(path))
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_real_sentencepiece_model(tmp_path):
    """A trained model moved into GGUF metadata, against the package sentencepiece."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=trained,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    ids = range(reference.vocab_size())

    def kind(token: int) -> int:
        if reference.is_unknown(token):
            return 2
        return 3 if reference.is_control(token) else 6 if reference.is_byte(token) else 1

    def fill(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([reference.id_to_piece(token) for token in ids])
        writer.add_token_scores([reference.get_score(token) for token in ids])
        writer.add_token_types([kind(token) for token in ids])
        writer.add_bos_token_id(reference.bos_id())
        writer.add_eos_token_id(reference.eos_id())
        writer.add_unk_token_id(reference.unk_id())

    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "t.gguf", fill))
    # SentencePiece drops NUL, and takes the names of control tokens for plain text.
    texts = TEXTS[:-1] + [line for line in lines if "<unk>" not in line and "s>" not in line]
    for text in texts:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)


def test_no_vocabulary(tmp_path):
    path = write_tokenizer(tmp_path / "t.gguf", lambda w: None)
    with pytest.raises(LoadError, match="holds no vocabulary"):
        build(GgufFile(path))


@pytest.fixture(scope="module")
def reference_tokenizer(demo_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_path.parent, gguf_file=demo_path.name)


@pytest.mark.checkpoint
def test_demo_tokenizer(demo_path, shared_dir, reference_tokenizer):
    """Against transformers' tokenizer, set to cut as SmolLM does: single digits, then as GPT-2."""
    tokenizer = open_tokenizer(demo_path)
    reference_tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    lines = (shared_dir / "data" / "mt_bench.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [
        turn
        for line in lines
        for turn in json.loads(line).get("turns", json.loads(line).get("prompt", []))
    ]
    assert len(prompts) >= 80
    for text in TEXTS + prompts:
        ids = tokenizer(text)["input_ids"]
        assert ids == reference_tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    messages = [
        {"role": "user", "content": "12 x 34?"},
        {"role": "assistant", "content": "<|im_end|>"},
    ]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids == reference_tokenizer.apply_chat_template(messages, return_dict=False)
    assert ids.count(2) == 4  # system, user, the quoted one, assistant


# Directories


def test_directory_as_auto_tokenizer_reads_it(tmp_path):
    from transformers import AutoTokenizer

    util.make_model(tmp_path)
    ours, theirs = from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>"]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map


@pytest.mark.parametrize("adds_bos", [None, True, False])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_classes_that_build_their_own_normalizer(tmp_path, name, adds_bos):
    """A tokenizer.json that lacks what LlamaTokenizer adds: spaces as words of their own."""
    from transformers import AutoTokenizer

    util.make_model(tmp_path, tokenizer=False)
    vocab = {word: token for token, word in enumerate(PIECES + WORDS)}
    merges = [
        (left, right)
        for word in WORDS
        for left, right in ((word[:cut], word[cut:]) for cut in range(1, len(word)))
        if left in vocab and right in vocab
    ]
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    bare = Tokenizer(model)
    bare.add_special_tokens(["<unk>", "<s>", "</s>"])
    bare.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>"}
    util.write_json(
        tmp_path / "tokenizer_config.json",
        settings if adds_bos is None else settings | {"add_bos_token": adds_bos},
    )
    ours, theirs = from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ["hello world", " hello", "hello", "wor  ld"]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours("hello", add_special_tokens=False)["input_ids"] != bare.encode("hello").ids


def test_directory_without_a_tokenizer(tmp_path):
    assert from_directory(tmp_path) is None


def test_damaged_directory(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(LoadError, match="cannot be loaded") as error:
        from_directory(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_sentencepiece_alone_names_the_packages_it_needs(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LoadError, match="pip install sentencepiece protobuf"):
        from_directory(tmp_path)


def test_code_of_a_repository_is_never_run(tmp_path):
    """trust_remote_code is off: a tokenizer class of the repository's own is refused or ignored."""
    util.make_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')\n")
    util.write_json(
        tmp_path / "tokenizer_config.json",
        {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}},
    )
    with pytest.raises(LoadError, match="cannot be loaded"):
        from_directory(tmp_path)
    assert not any(name.endswith("mine") for name in sys.modules)
