"""transformers' Trainer and what heads need: groups, per-head losses, whole checkpoints."""

import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from medusa_ext.loading import LoadError
from medusa_ext.loading.files import cannot_write
from medusa_ext.training.settings import Settings

HEADS_FACTOR = 4.0  # learning rate of heads beside a model that learns too

_DECIDED = {  # TrainingArguments that a run decides, and the command-line option for each
    "output_dir": "--out",
    "per_device_train_batch_size": "--batch-size",
    "per_device_eval_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--accumulate",
    "num_train_epochs": "--epochs",
    "max_steps": "--max-steps",
    "learning_rate": "--learning-rate",
    "warmup_steps": "--warmup",
    "warmup_ratio": "--warmup",
    "weight_decay": "--weight-decay",
    "seed": "--seed",
    "data_seed": "--seed",
    "bf16": "--precision",
    "logging_steps": "--log-every",
    "eval_steps": "--eval-every",
    "save_steps": "--save-every",
    "load_best_model_at_end": None,
    "remove_unused_columns": None,
    "label_names": None,
}


class TrainingError(RuntimeError):
    """Training cannot go on; what it had reached before is kept."""


class HeadsTrainer(Trainer):
    """A Trainer whose model keeps sums of per-head losses between logs (`take_sums`).

    Checkpoints are written under another name and renamed, so that the last one is always whole.
    """

    def __init__(self, *args: Any, head_factor: float = 1.0, **kwargs: Any) -> None:  # noqa: ANN401
        """head_factor: learning rate of parameters below `heads.`, relative to the others'."""
        super().__init__(*args, **kwargs)
        self.head_factor = head_factor
        self.remove_callback(PrinterCallback)
        assert self.model is not None
        # FSDP renames parameters later.
        self._names = {name for name, value in self.model.named_parameters() if value.requires_grad}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; no decay of biases."""
        if self.optimizer is None:
            model = model or self.model
            assert model is not None
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    key = "heads." in name, parameter.ndim >= 2
                    groups.setdefault(key, []).append(parameter)
            rate, decay = self.args.learning_rate, self.args.weight_decay
            described = [
                {
                    "params": parameters,
                    "lr": rate * (self.head_factor if is_head else 1.0),
                    "weight_decay": decay if is_matrix else 0.0,
                }
                for (is_head, is_matrix), parameters in groups.items()
            ]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(described, **options)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """One batch; stops where the loss is no number."""
        self.accelerator.unwrap_model(self.model).progress = self.progress
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(loss.item()):
            raise self._diverged(f"the loss is {loss.item()} at step {self.state.global_step + 1}")
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:  # noqa: ANN401
        """Held-out figures; stops where the loss is no number."""
        figures = super().evaluate(*args, **kwargs)
        if not math.isfinite(figures["eval_loss"]):
            found, step = figures["eval_loss"], self.state.global_step
            raise self._diverged(f"the held-out loss is {found} after step {step}")
        return figures

    def go_on(self, checkpoint: str | None) -> None:
        """Train, from a checkpoint if there is one; one of the last step is loaded as it is."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            if state.global_step >= state.max_steps:
                self._load_from_checkpoint(checkpoint)
                self.state = state
                return
        self.train(resume_from_checkpoint=checkpoint)

    def _check_weights(self) -> None:
        assert self.model is not None
        for name, value in self.model.named_parameters():
            if value.requires_grad and not value.isfinite().all():
                step = self.state.global_step
                raise self._diverged(f"{name} is not finite after step {step}")

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what}; delete {self.root} and start anew with a lower --learning-rate or a longer "
            "--warmup"
        )

    @property
    def progress(self) -> float:
        """Share of the steps that are done."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each head's loss to the Trainer's own."""
        if "loss" in logs:
            logs |= self.accelerator.unwrap_model(self.model).take_sums()
        super().log(logs, start_time)

    def _issue_warnings_after_load(self, load_result: Any) -> None:  # noqa: ANN401 - of torch
        """What is not trained is missing in a checkpoint, as `_save` left it out; the rest not."""
        missing = sorted(self._names.intersection(load_result.missing_keys))
        if missing or load_result.unexpected_keys:
            names = [*missing, *load_result.unexpected_keys]
            raise LoadError(f"the checkpoint is of another model: {names[0]} does not fit")

    def trained_state(self) -> dict[str, torch.Tensor]:
        """What was trained, whole, wherever its parts lie; every process must ask.

        Raises:
            TrainingError: a weight is no number, or was not collected.
        """
        self._check_weights()
        state = self.accelerator.get_state_dict(self.model_wrapped)
        return self._trained(state) if self.is_world_process_zero() else {}

    def _trained(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        missing = self._names.difference(state)
        if missing:
            raise TrainingError(
                f"{min(missing)} was trained, but is not among the {len(state)} tensors that the "
                "Trainer collected; train without FSDP or DeepSpeed"
            )
        return {name: value for name, value in state.items() if name in self._names}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ANN401
        """What is trained alone; the rest is in the model's own files."""
        assert self.model is not None
        state = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, self._trained(state) if self.args.should_save else {})

    def _get_output_dir(self, trial: Any) -> str:  # noqa: ANN401 - of transformers
        """Where _save_checkpoint writes; asked by it alone."""
        return str(self._staging)

    @property
    def _staging(self) -> Path:
        return self.root / ".partial"

    @property
    def root(self) -> Path:
        """Folder of the checkpoints."""
        return Path(self.args.output_dir or ".")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ANN401
        root = self.root
        self._check_weights()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                name = f"checkpoint-{self.state.global_step}"
                older = [path for path in root.glob("checkpoint-*") if path.name != name]
                shutil.rmtree(root / name, ignore_errors=True)
                (self._staging / name).rename(root / name)
                for path in older:
                    shutil.rmtree(path, ignore_errors=True)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch raises the second
            shutil.rmtree(self._staging, ignore_errors=True)
            if isinstance(error, TrainingError):
                raise
            raise cannot_write(root / f"checkpoint-{self.state.global_step}", error) from None


def make_arguments(
    settings: Settings, folder: Path, own: Mapping[str, Any], options: Mapping[str, Any]
) -> TrainingArguments:
    """TrainingArguments of a run.

    Args:
        settings: with defaults decided.
        folder: of checkpoints and logs.
        own: more of them that the run decides, by name.
        options: the user's, by name; they win.

    Raises:
        LoadError: an option that does not exist, cannot be combined or is decided elsewhere, or
            one process has several GPUs.
    """
    for name in options:
        if name in _DECIDED:
            instead = f"give {_DECIDED[name]} instead" if _DECIDED[name] else "leave it out"
            raise LoadError(f"the Trainer's option {name} is decided by the run; {instead}")
    cpu = not torch.cuda.is_available()
    items = settings.batch_size or 1
    if settings.method == "medusa1":  # an item is a stretch of positions
        items = max(1, items // (settings.run_length or 1))
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": items,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "bf16": settings.precision == "bf16",
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
        "log_level": "error",
        "save_total_limit": None,
    }
    try:
        arguments = TrainingArguments(**values | dict(own) | dict(options))
    except (TypeError, ValueError, ImportError) as error:
        raise LoadError(f"the Trainer refuses these arguments: {error}") from None
    if arguments.n_gpu > 1:
        raise LoadError(
            f"one process sees {arguments.n_gpu} GPUs; start one for each, with: accelerate launch "
            f"--num_processes {arguments.n_gpu} -m medusa_ext train ..., or choose one GPU with "
            "CUDA_VISIBLE_DEVICES"
        )
    return arguments


def latest(folder: Path) -> str | None:
    """The last whole checkpoint of a run, if any."""
    if not folder.is_dir():
        return None
    found: str | None = get_last_checkpoint(str(folder))  # type: ignore[no-untyped-call]
    return found


class Sums:
    """Means of named numbers between two logs."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.totals: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Add one value of each name."""
        for name, value in named:
            self.totals[name] = self.totals.get(name, 0.0) + value.item()
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means; starts anew."""
        means = {name: total / self.counts[name] for name, total in self.totals.items()}
        self.totals, self.counts = {}, {}
        return means
