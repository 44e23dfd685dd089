"""What a run shows: a live table, curves at the end, and the model card."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers import TrainerCallback

from medusa_ext.training.accuracy import TREES
from medusa_ext.training.settings import Settings

_LINE_S = 20.0  # between lines where there is no tty

History = Sequence[Mapping[str, float]]


class HiddenProgress:
    """Shows how far the hidden states are; a line now and then where there is no tty."""

    def __init__(self, console: Console) -> None:
        """Starts the clock."""
        self.console, self.status = console, console.status("hidden states")
        self.began = self.printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Takes tokens computed, and tokens to compute."""
        now = time.monotonic()
        rate = done / max(now - self.began, 1e-9)
        text = (
            f"hidden states: {done:,}/{total:,} tokens, {rate:,.0f} tokens/s, "
            f"{_time((total - done) / rate)} left"
        )
        self.status.update(text)
        if not self.console.is_terminal and now - self.printed >= _LINE_S:
            self.printed = now
            self.console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self) -> "HiddenProgress":
        """Show it."""
        self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the terminal back."""
        self.status.stop()


class Progress(TrainerCallback):
    """Shows losses, held-out accuracies, tokens/s, the time left; lines where there is no tty."""

    def __init__(self, num_heads: int, tokens_per_step: float, console: Console) -> None:
        """tokens_per_step: that one step of the optimizer learns from, on all processes."""
        self.num_heads, self.tokens_per_step, self.console = num_heads, tokens_per_step, console
        self.last: dict[str, float] = {}
        self.step = self.total = 0
        self.began, self.first_step = 0.0, 0
        self.live: Live | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Starts the clock."""
        self.began, self.first_step = time.monotonic(), state.global_step
        self.step, self.total = state.global_step, state.max_steps
        if state.is_world_process_zero and self.console.is_terminal:
            self.live = Live(self.table(), console=self.console, refresh_per_second=2)
            self.live.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Moves the clock."""
        self.step = state.global_step
        if self.live is not None:
            self.live.update(self.table())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ANN401
        """Takes new figures."""
        self.last |= {name: value for name, value in (logs or {}).items() if value is not None}
        if self.live is not None:
            self.live.update(self.table())
        elif state.is_world_process_zero and not self.console.is_terminal:
            line = self.line(logs or {})
            if line:
                self.console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Leaves the last table standing."""
        self.stop()

    def stop(self) -> None:
        """Give the terminal back."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def pace(self) -> str:
        """Step, tokens/s, time left."""
        done, seconds = self.step - self.first_step, time.monotonic() - self.began
        text = f"step {self.step}/{self.total}"
        if not done:
            return text
        left = (self.total - self.step) * seconds / done
        return f"{text}, {done * self.tokens_per_step / seconds:,.0f} tokens/s, {_time(left)} left"

    def line(self, logs: Mapping[str, float]) -> str:
        """One line of what was logged; "" where it says nothing new."""
        if "loss" in logs:
            losses = _each(logs, "head{}_loss", self.num_heads, "{:.2f}")
            base = f", model {logs['base_loss']:.4f}" if "base_loss" in logs else ""
            return f"{self.pace()}: loss {logs['loss']:.3f}{base}, heads {losses}"
        if "eval_loss" in logs:
            first = _each(logs, "eval_head{}_top1", self.num_heads, "{:.1f}")
            five = _each(logs, "eval_head{}_top5", self.num_heads, "{:.1f}")
            trees = ", ".join(
                f"{logs[f'eval_tokens_per_step_{nodes}']:.3f} at {nodes} nodes" for nodes in TREES
            )
            return (
                f"held out at step {self.step}: loss {logs['eval_loss']:.3f}, top-1 {first} %, "
                f"top-5 {five} %, about {trees} tokens/step"
            )
        return ""

    def table(self) -> Table:
        """Heads in rows, the latest figures in columns."""
        table = Table(title=self.pace(), caption=self._caption(), min_width=60)
        for name in ("head", "loss", "top-1 %", "top-5 %", "top-10 %"):
            table.add_column(name, justify="right")
        for head in range(self.num_heads):
            keys = [f"head{head}_loss", *(f"eval_head{head}_top{top}" for top in (1, 5, 10))]
            figures = [f"{self.last[key]:.2f}" if key in self.last else "" for key in keys]
            table.add_row(str(head), *figures)
        return table

    def _caption(self) -> str:
        names = {"loss": "loss", "base_loss": "model's own loss", "eval_loss": "held-out loss"}
        parts = [f"{text} {self.last[key]:.3f}" for key, text in names.items() if key in self.last]
        parts += [
            f"about {self.last[f'eval_tokens_per_step_{nodes}']:.2f} tokens/step at {nodes} nodes"
            for nodes in TREES
            if f"eval_tokens_per_step_{nodes}" in self.last
        ]
        return "\n".join(parts)


def _each(logs: Mapping[str, float], name: str, count: int, form: str) -> str:
    return " ".join(
        form.format(logs[name.format(head)]) for head in range(count) if name.format(head) in logs
    )


def _time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def draw_curves(history: History, num_heads: int, path: Path) -> None:
    """Loss of each head, and held-out top-1 and top-5, over steps, as a PNG.

    Args:
        history: the Trainer's log.
        num_heads: K.
        path: the file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for head in range(num_heads):
        color = f"C{head}"
        for axes, name, style, label in (
            (loss, f"head{head}_loss", "-", f"head {head}"),
            (accuracy, f"eval_head{head}_top1", "o-", f"head {head}, top-1"),
            (accuracy, f"eval_head{head}_top5", "s--", f"head {head}, top-5"),
        ):
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, style, color=color, label=label, markersize=3)
    loss.set(title="Training loss", xlabel="step", ylabel="cross-entropy, nats")
    accuracy.set(title="Held-out accuracy", xlabel="step", ylabel="%")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    FigureCanvasAgg(figure)
    figure.savefig(path)


@dataclass
class Card:
    """What the model card says.

    Attributes:
        model: as the user named it.
        command: that made the heads.
        settings: of the run.
        data: lines about the data.
        figures: held-out figures at the end, as the Trainer named them.
        licence: of the base model, or None where the checkpoint does not say.
        notes: further lines.
    """

    model: str
    command: str
    settings: Settings
    data: list[str]
    figures: Mapping[str, float]
    licence: str | None
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Markdown, with the header that the hub reads."""
        licence = self.licence or "not stated in the checkpoint; see where the model comes from"
        header = ["---", "library_name: medusa_ext", f"base_model: {self.model}"]
        header += [f"license: {self.licence}"] if self.licence else []
        whole = self.settings.method != "medusa1"
        what = "A model with Medusa heads" if whole else "Medusa heads"
        use = 'Engine("this/folder")' if whole else f'Engine("{self.model}", heads="this/folder")'
        return "\n".join(
            [
                *header,
                "---",
                "",
                f"# {what} for {self.model}",
                "",
                f"{what}: {self.settings.num_heads} heads of {self.settings.head_layers} layers, "
                f"trained with the method {self.settings.method}.",
                "",
                "```python",
                "from medusa_ext import Engine",
                "",
                f'print({use}.generate("Why is the sky blue?").text)',
                "```",
                "",
                "## How they were made",
                "",
                "```sh",
                self.command,
                "```",
                "",
                *(f"- {line}" for line in self.data),
                *(f"- {line}" for line in self.notes),
                f"- Licence of the base model: {licence}",
                "",
                "## Held-out accuracy",
                "",
                *self._accuracies(),
                "",
                "## Settings",
                "",
                "| setting | value |",
                "|---|---|",
                *(f"| {name} | {value} |" for name, value in asdict(self.settings).items()),
                "",
            ]
        )

    def _accuracies(self) -> list[str]:
        lines = ["| head | top-1 % | top-5 % | top-10 % |", "|---|---|---|---|"]
        for head in range(self.settings.num_heads):
            cells = (f"{self.figures[f'eval_head{head}_top{top}']:.1f}" for top in (1, 5, 10))
            lines.append(f"| {head} | {' | '.join(cells)} |")
        steps = (
            f"{self.figures[f'eval_tokens_per_step_{nodes}']:.2f} with {nodes} nodes"
            for nodes in TREES
        )
        return [
            *lines,
            "",
            f"A tree fitted to the held-out text would give about {', '.join(steps)} tokens per "
            "step; `medusa-ext calibrate` measures.",
        ]
