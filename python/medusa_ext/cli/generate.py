"""`medusa-ext generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa_ext.cli import common
from medusa_ext.options import DEFAULT_MAX_NEW_TOKENS


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT...", help='What to say; several make a batch; "-" reads standard input.'
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Take prompts from a file, one per line.")
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Complete the text as it stands, without the chat template."),
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message; not with --raw.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per text instead.")
    ] = False,
    num_return_sequences: Annotated[int, typer.Option(help="Samples per prompt.")] = 1,
    model: common.Model = "demo",
    heads: common.Heads = "auto",
    tree: common.Tree = "auto",
    max_new_tokens: common.MaxNewTokens = DEFAULT_MAX_NEW_TOKENS,
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
    max_batch: common.MaxBatch = 8,
    max_context: common.MaxContext = None,
    cache_tokens: common.CacheTokens = None,
    prefill_chunk: common.PrefillChunk = 512,
    head_vocab: common.HeadVocab = "auto",
    lookup: common.Lookup = None,
    isa: common.Isa = "",
    local_files_only: common.LocalFilesOnly = False,
) -> None:
    """Complete prompts: text goes to standard output, a line of statistics to standard error."""
    texts = read_prompts(prompts or [], file)
    if raw and system is not None:
        raise ValueError(
            "--system is part of the chat template, and --raw leaves that out; give one of them"
        )
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
        "num_return_sequences": num_return_sequences,
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
        max_batch=max_batch,
        cache_tokens=cache_tokens,
        prefill_chunk=prefill_chunk,
        head_vocab=head_vocab,
        lookup=lookup,
        isa=isa,
        local_files_only=local_files_only,
    )
    with engine:
        batch = [text if raw else messages(text, system) for text in texts]
        if len(batch) == 1 and num_return_sequences == 1 and not as_json:
            with engine.stream(batch[0], **options) as stream:
                common.print_pieces(stream)
        else:
            results = engine.generate(batch, **options)
            _print_results(results, texts, num_return_sequences, as_json)


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """Return all prompts: arguments, standard input for "-", lines of the file; none is empty."""
    common.accept_any_input()
    texts = [sys.stdin.read().rstrip("\n") if text == "-" else text for text in given]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ValueError(f"cannot read the prompts in {file}: {reason}") from None
        texts += [line for line in lines if line.strip()]
    if not texts:
        raise ValueError('no prompt; give one, or "-" for standard input, or --file')
    if not all(texts):
        raise ValueError("the prompt is empty; give some text")
    return texts


def messages(text: str, system: str | None) -> list[dict[str, str]]:
    """Return the conversation that asks for `text`."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def _print_results(results: list[Any], texts: list[str], samples: int, as_json: bool) -> None:
    for index, result in enumerate(results):
        prompt = texts[index // samples]
        if as_json:
            print(
                json.dumps({"prompt": prompt, **result.to_dict()}, ensure_ascii=False), flush=True
            )
        else:
            print(f"{'' if index == 0 else chr(10)}> {prompt}\n{result.text}", flush=True)
            common.print_statistics(result)
