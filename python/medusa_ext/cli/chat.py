"""`medusa-ext chat`."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated, Any

import typer

from medusa_ext.chat import Chat
from medusa_ext.cli import common


def chat(
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    model: common.Model = "demo",
    heads: common.Heads = "auto",
    tree: common.Tree = "auto",
    max_new_tokens: common.MaxNewTokens = 1024,
    temperature: common.Temperature = 0.0,
    top_k: common.TopK = 0,
    top_p: common.TopP = 1.0,
    min_p: common.MinP = 0.0,
    repetition_penalty: common.RepetitionPenalty = 1.0,
    seed: common.Seed = 0,
    stop_strings: common.StopStrings = None,
    eos_token_id: common.EosTokenId = None,
    acceptance: common.Acceptance = "exact",
    epsilon: common.Epsilon = 0.09,
    delta: common.Delta = 0.3,
    weights: common.Weights = "auto",
    dtype: common.DType = "auto",
    device: common.Device = "auto",
    threads: common.Threads = None,
    max_context: common.MaxContext = None,
    cache_tokens: common.CacheTokens = None,
    prefill_chunk: common.PrefillChunk = 512,
    head_vocab: common.HeadVocab = "auto",
    lookup: common.Lookup = None,
    isa: common.Isa = "",
    local_files_only: common.LocalFilesOnly = False,
) -> None:
    """Talk with the model. /reset begins anew, /exit or ^D leaves, ^C stops an answer."""
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop_strings": stop_strings,
        "eos_token_id": eos_token_id or None,
        "acceptance": acceptance,
        "epsilon": epsilon,
        "delta": delta,
    }
    common.check_options(options)
    engine = common.make_engine(
        model,
        heads,
        tree=tree,
        weights=weights,
        dtype=dtype,
        device=device,
        threads=threads,
        max_context=max_context,
        cache_tokens=cache_tokens,
        prefill_chunk=prefill_chunk,
        head_vocab=head_vocab,
        lookup=lookup,
        isa=isa,
        local_files_only=local_files_only,
        max_batch=1,
    )
    with engine:
        converse(engine.chat(system), options)


def converse(conversation: Chat, options: dict[str, Any]) -> None:
    """Read lines and answer them until /exit, ^D, or ^C at the prompt."""
    common.accept_any_input()
    interactive = sys.stdin.isatty()
    if interactive:
        print(
            "Type a message; /reset begins anew, /exit or ^D leaves, ^C stops an answer.",
            file=sys.stderr,
        )
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/"):
            print(f"unknown command {line}; there are /reset and /exit", file=sys.stderr)
        elif line:
            _answer(conversation, line, options)


def _answer(conversation: Chat, line: str, options: dict[str, Any]) -> None:
    """Print one answer. What goes wrong with it does not end the conversation."""
    try:
        with closing(conversation.stream(line, **options)) as pieces:
            common.print_pieces(pieces)
    except KeyboardInterrupt:
        print("\n[stopped]", file=sys.stderr)
    except ValueError as error:
        print(f"medusa-ext: error: {error}; /reset begins anew", file=sys.stderr)
