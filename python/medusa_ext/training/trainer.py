"""transformers' Trainer and what heads need: groups, per-head losses, whole checkpoints."""

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from medusa_ext.loading import LoadError
from medusa_ext.training.files import cannot_write
from medusa_ext.training.settings import Settings

HEADS_FACTOR = 4.0  # learning rate of heads beside a model that learns too


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
            kept = latest(self.root)
            advice = "no checkpoint was written yet"
            if kept is not None:
                advice = f"the last good checkpoint is {Path(kept).name}"
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; {advice}; lower "
                "--learning-rate, or raise --warmup"
            )
        return loss

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
        assert self.model is not None
        missing = self._trained(dict.fromkeys(load_result.missing_keys, torch.empty(0)))
        if missing or load_result.unexpected_keys:
            names = [*missing, *load_result.unexpected_keys]
            raise LoadError(f"the checkpoint is of another model: {names[0]} does not fit")

    def trained_state(self) -> dict[str, torch.Tensor]:
        """What was trained, whole, wherever its parts lie; every process must ask."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        return self._trained(state) if self.is_world_process_zero() else {}

    def _trained(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert self.model is not None
        names = {name for name, value in self.model.named_parameters() if value.requires_grad}
        return {name: value for name, value in state.items() if name in names}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ANN401
        """What is trained alone; the rest is in the model's own files."""
        assert self.model is not None
        state = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, self._trained(state))

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
        except (OSError, RuntimeError) as error:  # torch's writer raises the second
            shutil.rmtree(self._staging, ignore_errors=True)
            raise cannot_write(root / f"checkpoint-{self.state.global_step}", error) from None


def make_arguments(
    settings: Settings, folder: Path, options: Mapping[str, Any]
) -> TrainingArguments:
    """TrainingArguments of a run.

    Args:
        settings: with defaults decided.
        folder: of checkpoints and logs.
        options: more of them, by name; they win.

    Raises:
        LoadError: an option that does not exist or cannot be combined.
    """
    cpu = not torch.cuda.is_available()
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": settings.batch_size,
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
    } | dict(options)
    try:
        return TrainingArguments(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise LoadError(f"the Trainer refuses these arguments: {error}") from None


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


Callbacks = list[TrainerCallback]
Progress = Callable[[int, int], None]
