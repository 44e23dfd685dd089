"""Tokenizers as users of transformers know them, whatever the file they come from."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from medusa_ext.loading.config import read_json
from medusa_ext.loading.errors import LoadError

# Values of tokenizer_class with which tokenizer.json is taken as it stands. Other classes of
# transformers 5, such as LlamaTokenizer, build normalizer and pre-tokenizer themselves, whatever
# the file says. (So does Qwen2Tokenizer, but as every published file of that family has them.)
_PLAIN_CLASSES = (
    None,
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def from_directory(folder: Path) -> Any:  # noqa: ANN401 - a transformers tokenizer
    """The tokenizer of a Hugging Face directory, or None where it has no tokenizer file.

    Raises:
        LoadError: transformers cannot read it, or it would need code from the repository.
    """
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        if (folder / "tokenizer.json").exists() and _class_of(folder) in _PLAIN_CLASSES:
            # AutoTokenizer would import torch where it is installed, 250 MB and seconds, only to
            # come to the same ids.
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
            _need_sentencepiece(folder)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except LoadError:
        raise
    except Exception as error:  # transformers and tokenizers raise whatever the file led them to
        lines = str(error).strip().splitlines()
        raise LoadError(
            f"the tokenizer in {folder} cannot be loaded: {lines[0][:200] if lines else error!r}"
        ) from error


def _class_of(folder: Path) -> object:
    path = folder / "tokenizer_config.json"
    return read_json(path).get("tokenizer_class") if path.is_file() else None


def _need_sentencepiece(folder: Path) -> None:
    """What transformers needs to convert tokenizer.model; its own message names other packages."""
    packages = {"sentencepiece": "sentencepiece", "protobuf": "google"}
    missing = [name for name, module in packages.items() if not importlib.util.find_spec(module)]
    if missing:
        raise LoadError(
            f"the tokenizer in {folder} is a SentencePiece model without tokenizer.json, which "
            f"needs more packages; install them with: pip install {' '.join(missing)}"
        )


def wrap(tokenizer: Any, settings: dict[str, Any]) -> Any:  # noqa: ANN401 - tokenizers, transformers
    """A `tokenizers.Tokenizer` with special tokens and template, as transformers' fast one."""
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast  # untyped
    return make(tokenizer_object=tokenizer, **settings)


def to_metadata(tokenizer: Any) -> dict[str, str]:  # noqa: ANN401 - a transformers tokenizer
    """What the one-file form stores of a tokenizer: its JSON, and the settings of the wrapper.

    Raises:
        LoadError: the tokenizer exists in Python alone and has no JSON form.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise LoadError(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json form and cannot be "
            "exported"
        )
    settings: dict[str, Any] = {
        "clean_up_tokenization_spaces": bool(
            getattr(tokenizer, "clean_up_tokenization_spaces", False)
        ),
        "model_max_length": int(tokenizer.model_max_length),
    }
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            settings[name] = str(token)
    if tokenizer.chat_template:
        settings["chat_template"] = tokenizer.chat_template
    return {
        "medusa_ext.tokenizer": backend.to_str(),
        "medusa_ext.tokenizer_settings": json.dumps(settings),
    }


def from_metadata(metadata: dict[str, str], where: str) -> Any:  # noqa: ANN401 - a transformers tokenizer
    """The tokenizer that `to_metadata` stored, or None where there is none."""
    text = metadata.get("medusa_ext.tokenizer")
    if text is None:
        return None
    from tokenizers import Tokenizer

    try:
        settings = json.loads(metadata.get("medusa_ext.tokenizer_settings", "{}"))
        return wrap(Tokenizer.from_str(text), settings)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise LoadError(f"{where}: the tokenizer inside cannot be read: {error}") from None
