"""`medusa-ext inspect` and `medusa-ext export`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from medusa_ext.cli import common
from medusa_ext.memory import mebibytes

if TYPE_CHECKING:
    from medusa_ext.loading import Inspection
    from medusa_ext.memory import Forecast


def inspect(
    path: Annotated[
        str, typer.Argument(help="Directory, .gguf file, exported file, hub id, or demo.")
    ],
    heads: common.Heads = "auto",
    tree: common.Tree = "auto",
    weights: common.Weights = "auto",
    dtype: common.DType = "auto",
    device: common.Device = "auto",
    max_batch: common.MaxBatch = 8,
    max_context: common.MaxContext = None,
    cache_tokens: common.CacheTokens = None,
    prefill_chunk: common.PrefillChunk = 512,
    head_vocab: common.HeadVocab = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    local_files_only: common.LocalFilesOnly = False,
) -> None:
    """Show what would be loaded, and the memory that it would take; reads no weights."""
    common.quiet_libraries()
    from medusa_ext import loading
    from medusa_ext.memory import Limits, forecast

    loading.check_types(weights, dtype)
    limits = Limits(max_batch, max_context, cache_tokens, prefill_chunk)
    own, chosen = common.heads_argument(heads), common.head_vocab_argument(head_vocab)
    checkpoint = loading.open_checkpoint(
        path, own, head_vocab=chosen, local_files_only=local_files_only
    )
    memory = forecast(
        checkpoint, device, dtype, limits, weights=weights, tree=tree, guesses=own is not None
    )
    found = loading.describe(checkpoint, memory.stored)
    if as_json:
        print(json.dumps({**found.to_dict(), "memory": memory.to_dict()}))
    else:
        console = Console()
        console.print(_table(found, memory), width=None if console.is_terminal else 200)


def export(
    model: Annotated[
        str, typer.Argument(help="Directory, .gguf file, exported file, hub id, or demo.")
    ],
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[HEADS] OUT", help="Heads, if any, and the .safetensors file to write."
        ),
    ],
    weights: Annotated[
        str,
        typer.Option(help="auto (as in the file), q8, q4, or bf16, f16 or f32 instead of blocks."),
    ] = "auto",
    head_vocab: common.HeadVocab = "auto",
    local_files_only: common.LocalFilesOnly = False,
) -> None:
    """Write a model and its heads as the one file that C++ programs read."""
    if len(paths) > 2:
        raise ValueError(f"export takes MODEL [HEADS] OUT, got {len(paths) + 1} arguments")
    common.quiet_libraries()
    from medusa_ext import loading

    heads = common.heads_argument(paths[0]) if len(paths) == 2 else "auto"
    chosen = common.head_vocab_argument(head_vocab)
    written = loading.export(
        model,
        heads,
        paths[-1],
        weights=weights,
        head_vocab=chosen,
        local_files_only=local_files_only,
    )
    print(f"{written} ({mebibytes(written.stat().st_size)})")


def _table(found: Inspection, memory: Forecast) -> Table:
    heads = "none"
    if found.heads is not None:
        size = found.heads.head_vocab
        projection = f"{size} rows each"
        if found.heads.shared_lm_head:
            few = f"{size} rows of " if 0 < size < found.vocab_size else ""
            projection = f"{few}the model's lm_head"
        heads = (
            f"{found.heads.num_heads} of {found.heads.num_layers} layers,"
            f" format {found.heads.format}, projections: {projection}"
        )
    stored = ", ".join(f"{name} {mebibytes(size)}" for name, size in found.stored_types.items())
    rows = {
        "path": found.path,
        "format": found.format,
        "family": found.family,
        "parameters": f"{found.num_parameters / 1e6:,.1f} M",
        "layers, hidden size": f"{found.num_layers}, {found.hidden_size}",
        "query heads, key/value heads": f"{found.num_heads}, {found.num_kv_heads}",
        "head size": f"{found.head_dim}",
        "MLP size": f"{found.intermediate_size}",
        "vocabulary": f"{found.vocab_size}{' (tied)' if found.tied_embeddings else ''}",
        "context": f"{found.max_context} tokens",
        "stored as": stored,
        "loaded as": found.weights,
        "type of the cache": found.dtype,
        "Medusa heads": heads,
        "cache per 1,000 tokens": mebibytes(found.cache_bytes_per_1000_tokens),
        **_memory_rows(memory),
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _memory_rows(memory: Forecast) -> dict[str, str]:
    plan = memory.plan
    rows = {
        "memory for weights": mebibytes(plan.weights),
        "memory for Medusa heads": mebibytes(plan.heads) if plan.heads else "",
        f"memory for {memory.cache_tokens:,} tokens in the cache": mebibytes(plan.cache),
        "memory for a pass of the model": mebibytes(plan.workspace),
        "memory for kernels": f"up to {mebibytes(plan.kernels)}" if plan.kernels else "",
        f"memory together, on {memory.device}": mebibytes(plan.total),
    }
    rows = {name: value for name, value in rows.items() if value}
    if memory.free is None or memory.device_total is None:
        rows["memory free"] = f"unknown, no such device is present here: {memory.absent}"
        return rows
    free, total = mebibytes(memory.free), mebibytes(memory.device_total)
    rows["memory free"] = f"{free} of {total}, {memory.detail}"
    rows["fits"] = "yes" if memory.advice is None else f"no; {memory.advice}"
    return rows
