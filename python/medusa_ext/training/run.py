"""One run from data to a folder of heads: `medusa-ext train`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import TrainingArguments

from medusa_ext.loading import Checkpoint, LoadError, open_checkpoint
from medusa_ext.loading.config import read_json
from medusa_ext.loading.files import cannot_write
from medusa_ext.loading.head_rows import DRAFT_TOKENS_FILE
from medusa_ext.loading.ngrams import NGRAMS_FILE, count_ngrams, save_ngrams
from medusa_ext.training import medusa1, medusa2
from medusa_ext.training.accuracy import TREES, compute_metrics
from medusa_ext.training.data import Data, read_data
from medusa_ext.training.files import lock_folder, new_folder
from medusa_ext.training.heads import MedusaHeads, new_heads
from medusa_ext.training.hidden_cache import Rows, make_rows, open_hidden_states
from medusa_ext.training.report import Card, HiddenProgress, Progress, draw_curves
from medusa_ext.training.settings import Settings
from medusa_ext.training.trainer import HEADS_FACTOR, HeadsTrainer, latest, make_arguments

_REACHED = ("checkpoint-*", "heads", "heads.work/checkpoint-*")  # in the folder of a run


@dataclass
class Job:
    """What to train, on what, and where to.

    Attributes:
        model: what `open_checkpoint` takes.
        data: files of records.
        out: the folder to write; it must not exist. Checkpoints lie in `out` + ".work" until then.
        settings: see there.
        start: heads to go on from.
        resume: go on from the last checkpoint of this job.
        cache: folder of hidden states; None: beside the data.
        threads: of the CPU; None: all.
        eval_every, save_every, log_every: steps; None: ten times a run, a hundred times for logs.
        eval_positions: positions of the text set aside that an evaluation takes.
        tensorboard: write logs for it.
        options: further TrainingArguments, by name.
        command: to be shown on the model card.
        local_files_only: never ask the network.
    """

    model: str
    data: Sequence[Path]
    out: Path
    settings: Settings = field(default_factory=Settings)
    start: Path | None = None
    resume: bool = False
    cache: Path | None = None
    threads: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int | None = None
    eval_positions: int = 2048
    tensorboard: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    local_files_only: bool = False

    @property
    def work(self) -> Path:
        """Folder of checkpoints and logs."""
        return self.out.with_name(f"{self.out.name}.work")


def train(job: Job, console: Console) -> Mapping[str, float]:
    """Train heads and write them to `job.out`.

    Returns:
        Held-out figures of the finished heads, named as the Trainer names them.

    Raises:
        LoadError, ValueError: the model, the data or a setting is not usable; nothing was written.
        TrainingError: the loss or a weight is no number.
    """
    settings = job.settings.with_defaults()
    for name in ("threads", "eval_every", "save_every", "log_every", "eval_positions"):
        value = getattr(job, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; wanted 1 or more")
    if job.out.exists():
        raise LoadError(f"{job.out} exists; give --out a folder that does not")
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    checkpoint = open_checkpoint(job.model, None, local_files_only=job.local_files_only)
    config = checkpoint.config
    data = read_data(
        job.data,
        vocab_size=config["vocab_size"],
        max_context=config["max_context"],
        held_out=settings.held_out,
        max_length=settings.max_length,
    )
    arguments = make_arguments(settings, job.work, _logging(job), job.options)
    run = _Run(job, settings, checkpoint, data, make_rows(data), arguments, console)
    run.heads(job.start)  # refused before anything is written
    first = arguments.process_index == 0
    with lock_folder(job.work, wait=False) if first else nullcontext():
        if first:
            _claim(run)
            for line in _describe(data):
                console.print(line, highlight=False, soft_wrap=True)
        return _medusa1(run) if settings.method == "medusa1" else _medusa2(run)


@dataclass
class _Run:
    job: Job
    settings: Settings
    checkpoint: Checkpoint
    data: Data
    rows: Rows
    arguments: TrainingArguments
    console: Console

    def heads(self, start: Path | None) -> MedusaHeads:
        settings = self.settings
        return new_heads(
            self.checkpoint,
            settings.num_heads,
            settings.head_layers,
            own_lm_head=settings.own_lm_head,
            start=start,
        )


def _medusa1(run: _Run) -> Mapping[str, float]:
    job, settings, data, rows = run.job, run.settings, run.data, run.rows
    with HiddenProgress(run.console) as progress:
        hidden = open_hidden_states(
            run.checkpoint,
            data,
            medusa1.cache_folder(data, job.cache),
            threads=job.threads,
            progress=progress,
        )
    model, known = medusa1.build(run.checkpoint, run.heads(job.start), rows, settings)
    learn, held_out = medusa1.positions(hidden, rows, settings, job.eval_positions)
    trainer = HeadsTrainer(
        model,
        run.arguments,
        data_collator=medusa1.as_batch,
        train_dataset=learn,
        eval_dataset=held_out,
        compute_metrics=compute_metrics,
    )
    notes = [f"Positions learned from: {len(learn.chosen):,}, of {len(rows.token):,} in the data"]
    if settings.loss_vocab:
        notes.append(
            f"The loss knows {settings.loss_vocab:,} tokens, {100 * known:.2f} % of the data's"
        )
    figures = _run_trainer(trainer, run, settings.run_length or 1)
    state = trainer.trained_state()
    if trainer.is_world_process_zero():
        heads = run.heads(None)
        names = {name.removeprefix("heads."): value for name, value in state.items()}
        heads.load_state_dict(names)
        with new_folder(job.out) as folder:
            heads.save(folder, job.model)
            _write_report(folder, run, trainer, figures, notes)
        _clear(job)
    trainer.accelerator.wait_for_everyone()
    return figures


def _medusa2(run: _Run) -> Mapping[str, float]:
    job, settings, data = run.job, run.settings, run.data
    start, notes = job.start, []
    if settings.method == "medusa2" and settings.heads_epochs and start is None:
        start = job.work / "heads"
        if not start.exists():
            _first_stage(run, start)
        figures = read_json(start / "training.json")["figures"]
        notes.append(f"After the first stage, the heads alone: {_steps(figures)}")
    model = medusa2.load_tuned(run.checkpoint, run.heads(start), settings)
    learn, held_out = medusa2.records_of(data, job.eval_positions)
    trainer = HeadsTrainer(
        model,
        run.arguments,
        head_factor=HEADS_FACTOR,
        data_collator=medusa2.Pad(settings.num_heads),
        train_dataset=learn,
        eval_dataset=held_out,
        compute_metrics=medusa2.tuned_metrics,
    )
    figures = _run_trainer(trainer, run, data.num_tokens(held_out=False) / len(learn))
    before, after = figures["eval_base_loss_before"], figures["eval_base_loss"]
    kl = figures["eval_base_kl"]
    notes.append(
        f"Held-out loss of the model itself: {before:.4f} before, {after:.4f} after "
        f"({100 * (after / before - 1):+.2f} %); KL(original || model) {kl:.5f}"
    )
    notes.append(f"After this stage: {_steps(figures)}")
    state = trainer.trained_state()
    if trainer.is_world_process_zero():
        for note in notes:
            run.console.print(note, highlight=False, soft_wrap=True)
        with new_folder(job.out) as folder:
            whole = medusa2.load_tuned(run.checkpoint, run.heads(None), settings)
            whole.load_state_dict(state, strict=False)
            medusa2.save_merged(whole, run.checkpoint, folder)
            _write_report(folder, run, trainer, figures, notes)
        _clear(job)
    trainer.accelerator.wait_for_everyone()
    return figures


def _first_stage(run: _Run, out: Path) -> None:
    """The heads alone, as with the method medusa1, into a folder below the checkpoints."""
    settings, job = run.settings, run.job
    alone = replace(
        settings,
        method="medusa1",
        batch_size=None,
        accumulate=None,
        epochs=settings.heads_epochs,
        max_steps=None,
        learning_rate=HEADS_FACTOR * (settings.learning_rate or 0.0),
        run_length=None,
    ).with_defaults()
    part = replace(job, out=out, settings=alone, command=job.command)
    arguments = make_arguments(alone, part.work, _logging(part), part.options)
    _medusa1(replace(run, job=part, settings=alone, arguments=arguments))


def _steps(figures: Mapping[str, float]) -> str:
    each = (f"{figures[f'eval_tokens_per_step_{nodes}']:.3f} at {nodes} nodes" for nodes in TREES)
    return f"about {', '.join(each)} tokens per step"


def _run_trainer(trainer: HeadsTrainer, run: _Run, tokens: float) -> Mapping[str, float]:
    """Train, and evaluate the end; `tokens` are what one item of the data holds."""
    arguments, job = run.arguments, run.job
    items = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    step = items * arguments.world_size * tokens
    progress = Progress(run.settings.num_heads, step, run.console)
    trainer.add_callback(progress)
    kept = latest(job.work) if job.resume else None
    try:
        trainer.go_on(kept)
        last = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        if last and last[-1]["step"] == trainer.state.global_step:
            return last[-1]
        return trainer.evaluate()
    except SafetensorError as error:
        raise LoadError(f"cannot read {kept}: {error}; delete {job.work} and start anew") from None
    finally:
        progress.stop()


def _write_report(
    folder: Path,
    run: _Run,
    trainer: HeadsTrainer,
    figures: Mapping[str, float],
    notes: list[str],
) -> None:
    """Card, curves, training.json, draft_tokens.json and ngrams.safetensors for the folder."""
    job, settings, data, checkpoint = run.job, run.settings, run.data, run.checkpoint
    history = trainer.state.log_history
    card = Card(
        model=job.model,
        command=job.command,
        settings=settings,
        data=_describe(data),
        figures=figures,
        licence=_licence(checkpoint),
        notes=[f"Steps: {trainer.state.global_step}", *notes],
    )
    (folder / "README.md").write_text(card.text(), encoding="utf-8")
    draw_curves(history, settings.num_heads, folder / "curves.png")
    record = {"settings": asdict(settings), "figures": dict(figures), "history": history}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    vocab_size = checkpoint.config["vocab_size"]
    frequent = data.frequent_tokens(vocab_size)
    (folder / DRAFT_TOKENS_FILE).write_text(json.dumps(frequent) + "\n", encoding="utf-8")
    save_ngrams(folder / NGRAMS_FILE, count_ngrams(data.learned(), vocab_size))


def _logging(job: Job) -> dict[str, Any]:
    every = {
        "logging": job.log_every or 0.01,
        "eval": job.eval_every or 0.1,
        "save": job.save_every or 0.1,
    }
    options: dict[str, Any] = {f"{name}_strategy": "steps" for name in every}
    options |= {f"{name}_steps": steps for name, steps in every.items()}
    if job.tensorboard:
        options |= {"report_to": "tensorboard"}
    return options


def _claim(run: _Run) -> None:
    """Note in the folder of checkpoints whose it is, or see that it is this job's own."""
    job = run.job
    mine = asdict(run.settings) | {
        "model": job.model,
        "records": run.data.digest(),
        "start": None if job.start is None else os.fspath(job.start),
        "processes": run.arguments.world_size,
        "options": dict(job.options),
    }
    text = json.dumps(mine, indent=1, default=str) + "\n"
    path = job.work / "job.json"
    if _reached(job):
        if not job.resume:
            raise LoadError(
                f"{job.work} holds what a run had reached that did not end; go on with --resume, "
                "or delete the folder"
            )
        found = read_json(path)
        for name, value in json.loads(text).items():
            if found.get(name) != value:
                raise LoadError(
                    f"{job.work} belongs to a run with {name} {found.get(name)!r}, not {value!r}; "
                    "resume with the same settings, or delete the folder"
                )
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from None


def _reached(job: Job) -> list[Path]:
    """Checkpoints, and the heads of the first stage; logs for TensorBoard lie beside them."""
    return [path for name in _REACHED for path in job.work.glob(name)]


def _clear(job: Job) -> None:
    """What was reached is of no more use; logs for TensorBoard stay."""
    for path in _reached(job) if job.tensorboard else [job.work]:
        shutil.rmtree(path, ignore_errors=True)


def _describe(data: Data) -> list[str]:
    learned, held_out = data.num_tokens(held_out=False), data.num_tokens(held_out=True)
    lines = [
        f"Data: {len(data.records):,} records of {', '.join(path.name for path in data.paths)}, "
        f"{learned:,} tokens that the model wrote, and {held_out:,} set aside in "
        f"{int(data.held_out.sum()):,} records"
    ]
    if data.skipped:
        lines.append(f"Records without a token that the model wrote, left out: {data.skipped:,}")
    if data.settings:
        written = ", ".join(f"{k} {v}" for k, v in data.settings.items() if v is not None)
        lines.append(f"How the data were written: {written}")
    return lines


def _licence(checkpoint: Checkpoint) -> str | None:
    """As the checkpoint states it: GGUF metadata, or the header of its README."""
    if checkpoint.gguf is not None:
        value = checkpoint.gguf.field("general.license")
        return str(value) if value else None
    readme = checkpoint.source.path / "README.md"
    if checkpoint.source.kind != "directory" or not readme.is_file():
        return None
    lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()[:60]
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    return found[0] if found and found[0] else None
