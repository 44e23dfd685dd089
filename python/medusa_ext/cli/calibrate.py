"""`medusa-ext calibrate`."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medusa_ext.cli import common


def calibrate(
    model: Annotated[
        str, typer.Argument(help="Directory, .gguf file, exported file, hub id, or demo.")
    ],
    heads: Annotated[
        str, typer.Argument(help="Directory or hub id of Medusa heads, demo, or auto.")
    ] = "auto",
    data: Annotated[
        Path | None,
        typer.Option(
            help="Held-out text: JSONL of distill, or of prompts, which are answered first."
            " Without it only step times are measured, for heads that were calibrated before."
        ),
    ] = None,
    ngrams: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text that the model wrote (JSONL of distill), to count anew which tokens follow"
            " which, into ngrams.safetensors; may be repeated. Not the text of --data. train has"
            " done so for the heads that it made."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Check the prediction on these prompts: JSONL, none of them in --data."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write into this directory instead of that of the heads.")
    ] = None,
    nodes: Annotated[
        list[int] | None,
        typer.Option(
            help="Number of nodes to measure; may be repeated. By default 1 to 64, or without"
            " --data those that were calibrated."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Tokens of an answer to a prompt.")
    ] = 128,
    pictures: Annotated[bool, typer.Option(help="Draw the tree and the curves as PNG.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    weights: common.Weights = "auto",
    dtype: common.DType = "auto",
    device: common.Device = "auto",
    threads: common.Threads = None,
    lookup: common.Lookup = None,
    local_files_only: common.LocalFilesOnly = False,
) -> None:
    """Measure Medusa heads on held-out text and on this machine, and choose their trees."""
    common.quiet_libraries()
    from medusa_ext.calibration import run
    from medusa_ext.calibration.report import print_report

    request = run.Request(
        model,
        heads,
        data,
        tuple(ngrams or ()),
        prompts,
        out,
        tuple(nodes or ()),
        max_new_tokens,
        device,
        weights,
        dtype,
        threads,
        lookup,
        local_files_only,
    )
    errors = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=not errors.is_terminal,
    ) as bars:

        def progress(what: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(what, total=total)
            return lambda count: bars.advance(task, count)

        content, path = run.calibrate(request, progress)
    if as_json:
        print(json.dumps(content))
    else:
        console = Console()
        if not console.is_terminal:
            console.width = 160
        print_report(content, console)
    print(f"wrote {path}", file=sys.stderr)
    if pictures:
        _draw(content, path.parent)


def _draw(content: dict[str, object], folder: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print(
            'no pictures without matplotlib; install it with: pip install "medusa_ext[train]"',
            file=sys.stderr,
        )
        return
    from medusa_ext.calibration.pictures import draw

    print("wrote " + ", ".join(map(str, draw(content, folder))), file=sys.stderr)
