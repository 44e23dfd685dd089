"""The tokenizer inside a GGUF file, built with the package `tokenizers` from the metadata."""

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.gguf import GgufFile

_CONTROL, _USER_DEFINED = 3, 4  # token types
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a vocabulary cuts text before merging, by `tokenizer.ggml.pre`; the rest is as GPT-2 does.
_SPLITS = {
    "llama-bpe": [_WORDS + r"\p{N}{1,3}" + _REST],
    "qwen2": [_WORDS + r"\p{N}" + _REST],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", r"\p{N}+", r"[0-9][0-9][0-9]"],
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
_PRE = ("default", "gpt-2", "llama-bpe", "qwen2", "smollm")
_SPACE = "\u2581"  # how SentencePiece writes a space


def build(file: GgufFile) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and the settings that transformers' wrapper takes with it.

    Returns:
        The tokenizer, and the keyword arguments of PreTrainedTokenizerFast.

    Raises:
        LoadError: no vocabulary, a damaged one, or a kind that is not supported.
    """
    tokens = file.field("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise LoadError(f"{file.path} holds no vocabulary (tokenizer.ggml.tokens)")
    kind = file.field("tokenizer.ggml.model")
    types = file.field("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise LoadError(f"{file.path}: {len(types)} token types for {len(tokens)} tokens")
    if kind == "gpt2":
        tokenizer = _byte_level(file, tokens)
        adds_bos = file.field("tokenizer.ggml.add_bos_token", _pre(file) == "llama-bpe")
    elif kind == "llama":
        tokenizer = _sentencepiece(file, tokens)
        adds_bos = file.field("tokenizer.ggml.add_bos_token", True)
    else:
        raise LoadError(
            f"{file.path}: tokenizer {kind!r} is not supported; supported are gpt2, llama"
        )
    marked = [
        (token, type_)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_special_tokens([_whole(token) for token, type_ in marked if type_ == _CONTROL])
    tokenizer.add_tokens([_whole(token) for token, type_ in marked if type_ == _USER_DEFINED])
    settings = _settings(file, tokens)
    _add_borders(file, tokenizer, tokens, bool(adds_bos))
    return tokenizer, settings


def _whole(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=False)


def _pre(file: GgufFile) -> str:
    name = file.field("tokenizer.ggml.pre", "default")
    name = _ALIASES.get(name, name)
    if name not in _PRE:
        raise LoadError(
            f"{file.path}: pre-tokenizer {name!r} is not supported; supported are {', '.join(_PRE)}"
        )
    return str(name)


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges", [])]
    pre = _pre(file)
    tokenizer = _bpe(file, tokens, merges, ignore_merges=pre == "llama-bpe")
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS.get(pre, [])
    ]
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    by_gpt2 = pre not in ("llama-bpe", "qwen2")
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_gpt2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    stored = file.field("tokenizer.ggml.merges")
    scores = file.field("tokenizer.ggml.scores")
    if stored:
        merges = [tuple(merge.split(" ")) for merge in stored]
    elif scores is not None and len(scores) == len(tokens):
        merges = _merges_from_scores(tokens, scores)
    else:
        raise LoadError(f"{file.path}: {len(scores or [])} token scores for {len(tokens)} tokens")
    unknown = file.field("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = _bpe(
        file,
        tokens,
        merges,
        unk_token=tokens[_checked(file, unknown, tokens)],
        fuse_unk=True,
        byte_fallback=True,
    )
    prefixed = file.field("tokenizer.ggml.add_space_prefix", True)
    spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), *spaces] if prefixed else spaces
    )
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps
    )
    return tokenizer


def _bpe(file: GgufFile, tokens: list[str], merges: list[Any], **options: Any) -> Tokenizer:  # noqa: ANN401
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for token_id, token in enumerate(tokens) if vocab[token] != token_id)
        raise LoadError(f"{file.path}: token {twice!r} stands twice in the vocabulary")
    try:
        return Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the package raises plain Exceptions
        raise LoadError(f"{file.path}: the vocabulary cannot be used: {error}") from None


def _merges_from_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """The pairs that SentencePiece would join, best score of the result first.

    Among pairs with one result those of the lower ids come first, as SentencePiece learnt them
    earlier.
    """
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    ranked = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-score, ids[token], left, right))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _settings(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for setting, key in keys.items():
        token_id = file.field(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            settings[setting] = tokens[_checked(file, token_id, tokens)]
    template = file.field("tokenizer.chat_template")
    if template:
        settings["chat_template"] = template
    context = file.field(f"{file.field('general.architecture')}.context_length")
    if context:
        settings["model_max_length"] = int(context)
    return settings


def _checked(file: GgufFile, token_id: int, tokens: list[str]) -> int:
    if not 0 <= token_id < len(tokens):
        raise LoadError(
            f"{file.path}: special token id {token_id} is not below the vocabulary size "
            f"{len(tokens)}"
        )
    return int(token_id)


def _add_borders(file: GgufFile, tokenizer: Tokenizer, tokens: list[str], adds_bos: bool) -> None:
    ids = {
        "bos": file.field("tokenizer.ggml.bos_token_id"),
        "eos": file.field("tokenizer.ggml.eos_token_id"),
    }
    adds_eos = bool(file.field("tokenizer.ggml.add_eos_token", False))
    used = {"bos": adds_bos and ids["bos"] is not None, "eos": adds_eos and ids["eos"] is not None}
    names = {key: tokens[_checked(file, ids[key], tokens)] for key, on in used.items() if on}
    if not names:
        return
    before, after = (
        ([names["bos"]] if "bos" in names else []),
        ([names["eos"]] if "eos" in names else []),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(tokens[ids[key]], ids[key]) for key in names],
    )
