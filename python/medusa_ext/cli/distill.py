"""`medusa-ext distill`."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from medusa_ext.cli import common

if TYPE_CHECKING:
    from medusa_ext import distill as distilling
    from medusa_ext.engine import Engine

# Cache for each text unless told: most texts are shorter, and where pages run out one waits.
_CACHE_PER_TEXT = 768
_LINE_S = 10.0  # between lines of progress where there is no terminal


def distill(
    model: Annotated[
        str, typer.Argument(help="Directory, .gguf file, exported file, hub id, or demo.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The .jsonl file; one that exists is gone on with.")
    ] = Path("distilled.jsonl"),
    prompts: Annotated[
        str | None,
        typer.Option(
            help="tasks (prompts that come along), a JSON or JSONL file (conversations, messages, "
            "turns or prompt), or a data set of the hub; else the model writes what users say."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Of the data set.")] = "train",
    records: Annotated[int | None, typer.Option(help="Lines that the file shall have.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of answers that the file shall have at least.")
    ] = None,
    turns: Annotated[
        int | None,
        typer.Option(help="Answers in a record at most; all of a given prompt's, else 1."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message of prompts without their own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same file.")] = 0,
    max_new_tokens: common.MaxNewTokens = 512,
    temperature: common.Temperature = 0.0,
    top_k: common.TopK = 0,
    top_p: common.TopP = 1.0,
    min_p: common.MinP = 0.0,
    repetition_penalty: common.RepetitionPenalty = 1.0,
    prompt_temperature: Annotated[
        float, typer.Option(help="Of user turns that the model writes.")
    ] = 1.0,
    prompt_top_p: Annotated[float, typer.Option(help="Of user turns that the model writes.")] = 1.0,
    min_prompt_tokens: Annotated[int, typer.Option(help="Shorter user turns are left out.")] = 1,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Longer user turns are left out; 1024, or 128 where the model writes."),
    ] = None,
    heads: common.Heads = "none",
    tree: common.Tree = "auto",
    weights: common.Weights = "auto",
    dtype: common.DType = "auto",
    device: common.Device = "auto",
    threads: common.Threads = None,
    max_batch: common.MaxBatch = 64,
    max_context: common.MaxContext = None,
    cache_tokens: common.CacheTokens = None,
    prefill_chunk: common.PrefillChunk = 512,
    head_vocab: common.HeadVocab = "auto",
    lookup: common.Lookup = None,
    isa: common.Isa = "",
    local_files_only: common.LocalFilesOnly = False,
) -> None:
    """Write training data for heads: what the model itself says, to given prompts or its own."""
    from medusa_ext.distill import Recipe, check_goals, read_prompts

    check_goals(records, tokens, endless=prompts is None)
    recipe = Recipe(
        seed=seed,
        turns=turns,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        prompt_temperature=prompt_temperature,
        prompt_top_p=prompt_top_p,
        min_prompt_tokens=min_prompt_tokens,
        max_prompt_tokens=max_prompt_tokens,
    )
    if not out.parent.is_dir():
        raise ValueError(f"cannot write {out}: no such directory: {out.parent}")
    given = None if prompts is None else read_prompts(prompts, split)
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
        cache_tokens=cache_tokens or max_batch * _CACHE_PER_TEXT,
        prefill_chunk=prefill_chunk,
        head_vocab=head_vocab,
        lookup=lookup,
        isa=isa,
        local_files_only=local_files_only,
    )
    with engine:
        _run(engine, out, recipe, given, records, tokens)


def _run(
    engine: Engine,
    out: Path,
    recipe: distilling.Recipe,
    prompts: distilling.Prompts | None,
    records: int | None,
    tokens: int | None,
) -> None:
    from medusa_ext.distill import distill as run

    console = Console(stderr=True)
    display = _Bar(console) if console.is_terminal else _Lines()
    try:
        with display:
            done = run(
                engine, out, recipe, prompts, records=records, tokens=tokens, on_progress=display
            )
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on with {out}", file=sys.stderr)
        raise
    left_out = ", ".join(f"{count} {why}" for why, count in sorted(done.left_out.items()))
    print(
        f"[{out}: {done.records:,} records with {done.tokens:,} tokens of answers; this run "
        f"{describe(done)}{f'; prompts left out: {left_out}' if left_out else ''}]",
        file=sys.stderr,
    )


def describe(progress: distilling.Progress) -> str:
    """Return `120 records, 30,211 tokens in 25 s, 1,301.2 tokens/s`; the rate counts all tokens."""
    rate = progress.generated / progress.seconds if progress.seconds else 0.0
    return (
        f"{progress.new_records:,} records, {progress.new_tokens:,} tokens in "
        f"{progress.seconds:.0f} s, {rate:,.1f} tokens/s generated"
    )


class _Lines(nullcontext[None]):
    """A line now and then."""

    def __init__(self) -> None:
        super().__init__()
        self._printed = time.monotonic()

    def __call__(self, progress: distilling.Progress) -> None:
        now = time.monotonic()
        if now - self._printed < _LINE_S:
            return
        self._printed = now
        left = progress.remaining_s
        print(
            f"{progress.records:,} records, {progress.tokens:,} tokens; this run "
            f"{describe(progress)}{f', {_clock(left)} left' if left is not None else ''}",
            file=sys.stderr,
            flush=True,
        )


class _Bar:
    """One line that changes."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[left]} left"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("loading", total=1.0, left="?")

    def __call__(self, progress: distilling.Progress) -> None:
        left = progress.remaining_s
        share = None if left is None else progress.seconds / max(progress.seconds + left, 1e-9)
        rate = progress.generated / progress.seconds if progress.seconds else 0.0
        self._progress.update(
            self._task,
            description=f"{progress.records:,} records, {progress.tokens:,} tokens, "
            f"{rate:,.0f} tokens/s",
            completed=share or 0.0,
            left="?" if left is None else _clock(left),
        )

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: Any) -> None:  # noqa: ANN401 - of any exception
        self._progress.stop()


def _clock(seconds: float) -> str:
    """Return `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
