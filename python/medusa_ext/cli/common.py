"""Options and output that several commands share."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medusa_ext.options import parse_options, shown
from medusa_ext.results import Piece, Result, Stats

if TYPE_CHECKING:
    from medusa_ext.engine import Engine
    from medusa_ext.loading import HeadVocab as HeadVocabOption

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="Directory, .gguf file, exported file, hub id, or demo."),
]
Heads = Annotated[
    str, typer.Option(help="Directory or hub id of Medusa heads, prompt-lookup, none, or auto.")
]
Tree = Annotated[
    str, typer.Option(help="Name of a tree, its number of nodes, a .json file of paths, or auto.")
]
Weights = Annotated[
    str, typer.Option(help="auto (as in the file), q8 or q4 (on a CPU), bf16, f16 or f32.")
]
DType = Annotated[
    str, typer.Option(help="auto, bf16, f16 or f32: cache, and weights that are not in blocks.")
]
Device = Annotated[str, typer.Option(help="auto (cuda where it can be used), cpu, cuda, cuda:N.")]
MaxBatch = Annotated[int, typer.Option(help="Texts made side by side.")]
HeadVocab = Annotated[
    str, typer.Option(help="Tokens that heads choose among, the most frequent; none: all; or auto.")
]
Lookup = Annotated[
    bool | None,
    typer.Option(
        "--lookup/--no-lookup",
        help="Let what followed the same tokens earlier in the text guess beside Medusa heads; on a"
        " CPU by default.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; all cores by default.")]
CacheTokens = Annotated[
    int | None,
    typer.Option(help="Tokens in the cache; max-batch * max-context by default, at most 16384."),
]
PrefillChunk = Annotated[int, typer.Option(help="Prompt tokens that one pass takes at most.")]
Isa = Annotated[str, typer.Option(help="CPU kernels: generic, avx2, avx512; the best by default.")]
MaxContext = Annotated[int | None, typer.Option(help="Tokens of prompt and output together.")]
LocalFilesOnly = Annotated[bool, typer.Option("--local-files-only", help="Never ask the network.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens at most.")]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0 takes the likeliest token.")
]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.")]
MinP = Annotated[float, typer.Option(help="Keep tokens this likely relative to the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: repeat less.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
StopStrings = Annotated[
    list[str] | None,
    typer.Option("--stop-strings", "--stop", help="End before this string; may be repeated."),
]
EosTokenId = Annotated[
    list[int] | None,
    typer.Option(help="End after this token instead of the model's own; may be repeated."),
]
Acceptance = Annotated[str, typer.Option(help="exact, or typical (faster, changes the output).")]
Epsilon = Annotated[float, typer.Option(help="Threshold of typical acceptance.")]
Delta = Annotated[float, typer.Option(help="Threshold of typical acceptance.")]


def make_engine(
    model: str,
    heads: str,
    *,
    tree: str,
    weights: str,
    dtype: str,
    device: str,
    threads: int | None,
    max_context: int | None,
    cache_tokens: int | None,
    prefill_chunk: int,
    head_vocab: str,
    lookup: bool | None,
    isa: str,
    local_files_only: bool,
    max_batch: int = 8,
) -> Engine:
    """Return an `Engine` for the options of the command line."""
    quiet_libraries()
    from medusa_ext.engine import Engine

    return Engine(
        model,
        heads_argument(heads),
        tree=tree,
        weights=weights,
        dtype=dtype,
        device=device,
        threads=threads,
        max_context=max_context,
        max_batch=max_batch,
        cache_tokens=cache_tokens,
        prefill_chunk=prefill_chunk,
        head_vocab=head_vocab_argument(head_vocab),
        lookup=lookup,
        isa=isa,
        local_files_only=local_files_only,
    )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what is wrong with the options of a request before the model is loaded."""
    parse_options(options, num_prompts=1, vocab_size=2**31 - 1)


def heads_argument(heads: str) -> str | None:
    """Return what the Python functions take for `--heads`."""
    return None if heads == "none" else heads


def head_vocab_argument(given: str) -> HeadVocabOption:
    """Return what the Python functions take for `--head-vocab`."""
    from medusa_ext.loading import check_head_vocab

    word = given.strip().lower()
    if word == "none":
        return None
    try:
        return check_head_vocab(word)
    except ValueError:
        raise ValueError(
            f"--head-vocab must be an integer of 1 or more, auto or none, got {shown(given)}"
        ) from None


def accept_any_input() -> None:
    """Read standard input to the end even where it is not UTF-8; the prompt's check refuses it."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def quiet_libraries() -> None:
    """Keep progress bars and warnings of the loading libraries out of the output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def print_pieces(pieces: Iterable[Piece]) -> None:
    """Print a text as it comes, then its statistics."""
    for piece in pieces:
        print(piece.text, end="", flush=True)
        if piece.result is not None:
            print(flush=True)
            print_statistics(piece.result)


def print_statistics(result: Result) -> None:
    """Print one line about how a text was made to stderr, so that stdout holds the text alone."""
    print(
        statistics_line(len(result.token_ids), result.prompt_tokens, result.stats), file=sys.stderr
    )


def statistics_line(new_tokens: int, prompt_tokens: int, stats: Stats) -> str:
    """Return `[128 tokens, 45.1 tokens/s, 1.93 tokens/step, prefill 37 tokens in 0.12 s]`."""
    reused = f" ({stats.reused_tokens} from the cache)" if stats.reused_tokens else ""
    rate = f" {stats.decode_tokens_per_s:.1f} tokens/s," if stats.decode_tokens_per_s else ""
    return (
        f"[{_tokens(new_tokens)},{rate} {stats.tokens_per_step:.2f} tokens/step,"
        f" prefill {_tokens(prompt_tokens - stats.reused_tokens)}{reused}"
        f" in {stats.prefill_s:.2f} s]"
    )


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"
