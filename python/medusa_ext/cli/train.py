"""`medusa-ext train`."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa_ext.cli import common


def train(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Directory, .gguf file, hub id, or demo.")],
    data: Annotated[
        list[Path], typer.Option(help="File of records that distill wrote; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    method: Annotated[str, typer.Option(help="medusa1, medusa2 or self-distill.")] = "medusa1",
    num_heads: Annotated[int, typer.Option(help="Heads.")] = 4,
    head_layers: Annotated[int, typer.Option(help="Blocks of each head.")] = 1,
    own_lm_head: Annotated[
        bool, typer.Option("--own-lm-head", help="Heads train projections of their own.")
    ] = False,
    init_from: Annotated[Path | None, typer.Option(help="Heads to go on from.")] = None,
    head_decay: Annotated[
        float, typer.Option(help="Weight of head k's loss: this to the k.")
    ] = 0.8,
    batch_size: Annotated[
        int | None, typer.Option(help="Positions (medusa1: 1024) or records (8) of a batch.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Batches of one step; 1, medusa2 8, self-distill 16.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(help="Steps, instead of epochs.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="1e-3, medusa2 5e-4, self-distill 1e-4.")
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps; 40, self-distill 20.")] = None,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.0,
    loss_vocab: Annotated[
        int, typer.Option(help="Learn among this many most frequent tokens; 0: all.")
    ] = 0,
    soft_share: Annotated[
        float, typer.Option("--soft-labels", help="Share of the model's own distribution, 0 to 1.")
    ] = 0.0,
    soft_top_k: Annotated[int, typer.Option(help="Tokens of it that are kept.")] = 64,
    run_length: Annotated[
        int | None, typer.Option(help="Neighbours that stay together; 1, soft labels 32.")
    ] = None,
    lora_rank: Annotated[int, typer.Option(help="Of LoRA.")] = 32,
    lora_alpha: Annotated[float, typer.Option(help="Of LoRA.")] = 16.0,
    lora_dropout: Annotated[float, typer.Option(help="Of LoRA.")] = 0.05,
    head_share: Annotated[
        float | None, typer.Option(help="lambda0 of the heads' loss; 0.2, self-distill 0.01.")
    ] = None,
    heads_epochs: Annotated[float, typer.Option(help="medusa2: of the heads alone, first.")] = 1.0,
    held_out: Annotated[float, typer.Option(help="Share of the records set aside.")] = 0.02,
    max_length: Annotated[int | None, typer.Option(help="Cut longer records here.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same heads.")] = 0,
    precision: Annotated[str, typer.Option(help="Of products: bf16 or f32.")] = "bf16",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of hidden states; beside the data by default.")
    ] = None,
    threads: common.Threads = None,
    log_every: Annotated[
        int | None, typer.Option(help="Steps; a hundred times by default.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps; ten times by default.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps; ten times by default.")] = None,
    eval_positions: Annotated[int, typer.Option(help="Of an evaluation.")] = 2048,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write logs for it into OUT.work.")
    ] = False,
    trainer_options: Annotated[
        Path | None, typer.Option(help="JSON object of more TrainingArguments.")
    ] = None,
    local_files_only: common.LocalFilesOnly = False,
) -> None:
    """Train Medusa heads on text that the model wrote; see docs/heads.md."""
    from medusa_ext.training import require_packages

    require_packages()
    common.quiet_libraries()
    from rich.console import Console

    from medusa_ext.training.run import Job
    from medusa_ext.training.run import train as run
    from medusa_ext.training.settings import Settings

    names = {setting.name for setting in fields(Settings)}
    chosen = {name: value for name, value in context.params.items() if name in names}
    job = Job(
        model=model,
        data=data,
        out=out,
        settings=Settings(**chosen),
        start=init_from,
        resume=resume,
        cache=cache,
        threads=threads,
        eval_every=eval_every,
        save_every=save_every,
        log_every=log_every,
        eval_positions=eval_positions,
        tensorboard=tensorboard,
        options=_options(trainer_options),
        command=_command(context),
        local_files_only=local_files_only,
    )
    run(job, Console(stderr=True))


def _command(context: typer.Context) -> str:
    """The command as it would be typed, without what says how far a run had got."""
    words = ["medusa-ext", "train"]
    for parameter in context.command.params:
        name, value = parameter.name or "", context.params.get(parameter.name or "")
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif value != parameter.default and value is not None and name != "resume":
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [parameter.opts[0]] + ([] if one is True else [str(one)])
    return shlex.join(words)


def _options(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; wanted an object")
    return value
