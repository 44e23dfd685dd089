"""`medusa-ext convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from medusa_ext.cli import common


def convert(
    heads: Annotated[
        str,
        typer.Argument(
            help="Directory or hub id of Medusa heads, or of a model with them, or demo."
        ),
    ],
    out: Annotated[str, typer.Argument(help="The directory to make.")],
    to: Annotated[
        str,
        typer.Option(
            help="A: medusa_lm_head.pt. B: medusa_lm_head.safetensors. C: B without lm_heads."
            " D: a whole model (Medusa-2). E: vLLM. F: a whole model (ModelOpt)."
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(help="The model they are for, where the format needs its lm_head or all."),
    ] = None,
    local_files_only: common.LocalFilesOnly = False,
) -> None:
    """Write Medusa heads in another format, bit for bit; what it cannot hold is an error."""
    common.quiet_libraries()
    from medusa_ext import loading

    print(loading.convert(heads, out, to, base=base, local_files_only=local_files_only))
