"""`medusa-ext inspect` and `medusa-ext export`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from medusa_ext.cli import common

if TYPE_CHECKING:
    from medusa_ext.loading import Inspection


def inspect(
    path: Annotated[
        str, typer.Argument(help="Directory, .gguf file, exported file, hub id, or demo.")
    ],
    heads: common.Heads = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    local_files_only: common.LocalFilesOnly = False,
) -> None:
    """Show what would be loaded, and the memory that it would take; reads no weights."""
    common.quiet_libraries()
    from medusa_ext import loading

    found = loading.inspect(path, common.heads_argument(heads), local_files_only=local_files_only)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        console = Console()
        console.print(_table(found), width=None if console.is_terminal else 200)


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
    local_files_only: common.LocalFilesOnly = False,
) -> None:
    """Write a model and its heads as the one file that C++ programs read."""
    if len(paths) > 2:
        raise ValueError(f"export takes MODEL [HEADS] OUT, got {len(paths) + 1} arguments")
    common.quiet_libraries()
    from medusa_ext import loading

    heads = common.heads_argument(paths[0]) if len(paths) == 2 else "auto"
    written = loading.export(model, heads, paths[-1], local_files_only=local_files_only)
    print(f"{written} ({_mebibytes(written.stat().st_size)})")


def _table(found: Inspection) -> Table:
    heads = "none"
    if found.heads is not None:
        projection = (
            "the model's lm_head"
            if found.heads.shared_lm_head
            else f"{found.heads.head_vocab} rows each"
        )
        heads = (
            f"{found.heads.num_heads} of {found.heads.num_layers} layers,"
            f" format {found.heads.format}, projections: {projection}"
        )
    stored = ", ".join(f"{name} {_mebibytes(size)}" for name, size in found.stored_types.items())
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
        "loaded as": found.dtype,
        "Medusa heads": heads,
        "memory for weights": _mebibytes(found.weight_bytes),
        "cache per 1,000 tokens": _mebibytes(found.cache_bytes_per_1000_tokens),
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
