"""The tree and the curve of speed over its size, as PNG. Needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from medusa_ext.calibration.file import check_here, kind_of_row, predictions, weights_of
from medusa_ext.device import AUTO_NODES
from medusa_ext.loading import LoadError

_INK, _MUTED, _PREDICTED, _MEASURED = "#222222", "#8a8a8a", "#1f6fb4", "#d9622b"
_Node = tuple[int, ...]


def draw(content: dict[str, Any], folder: Path) -> list[Path]:
    """Draw a calibration: the best tree as tree.png, and speed.png; LoadError as a disk refuses.

    Args:
        content: of calibration.json.
        folder: to write into.

    Returns:
        The paths written.
    """
    times = content["step_times"][-1]
    nodes = times["nodes"] if times["nodes"] > 1 else AUTO_NODES["cpu"]  # one would show nothing
    figures = {
        "tree.png": tree_figure(content["tree"][: nodes - 1], content["values"]),
        "speed.png": speed_figure(content),
    }
    for name, figure in figures.items():
        partial = folder / f".{name}.partial"
        try:
            figure.savefig(partial, format="png", dpi=150, facecolor="white")
            partial.replace(folder / name)
        except OSError as error:
            raise LoadError(f"cannot write {folder / name}: {error.strerror or error}") from None
        finally:
            partial.unlink(missing_ok=True)
    return [folder / name for name in figures]


def tree_figure(paths: list[list[int]], values: list[float]) -> Figure:
    """The tree: a node stands for a guess, its label is the rank, its colour how often it is right.

    Args:
        paths: the most valuable first.
        values: of the paths; more are ignored.
    """
    value = {(): 1.0} | {tuple(path): share for path, share in zip(paths, values, strict=False)}
    place = _places(sorted(value))
    depth = max(map(len, value))
    width = 1 + max(x for x, _ in place.values())
    figure = _figure(min(max(5.0, 0.30 * width + 1.6), 18), 1.5 + 1.15 * depth)
    axes = figure.add_subplot()
    lowest = max(min(share for share in value.values()), 1e-4)
    norm = LogNorm(min(lowest, 0.5), 1.0)
    edges = [(place[path[:-1]], place[path]) for path in value if path]
    axes.add_collection(
        LineCollection(
            edges,
            linewidths=[0.8 + 5.0 * math.sqrt(value[path]) for path in value if path],
            colors=_MUTED,
            alpha=0.55,
            zorder=1,
        )
    )
    points = [place[path] for path in value]
    dots = axes.scatter(
        [x for x, _ in points],
        [y for _, y in points],
        c=[max(share, lowest) for share in value.values()],
        norm=norm,
        cmap="viridis_r",
        s=150,
        edgecolors="white",
        linewidths=0.8,
        zorder=2,
    )
    for path, share in value.items():
        axes.annotate(
            str(path[-1]) if path else "",
            place[path],
            ha="center",
            va="center",
            fontsize=7,
            color="white" if share > math.sqrt(lowest) else _INK,
            zorder=3,
        )
    axes.set_yticks(
        [-level for level in range(depth + 1)],
        ["root", *(f"head {head}" for head in range(depth))],
    )
    axes.set_xticks([])
    axes.set_xlim(-0.8, width - 0.2)
    axes.set_ylim(-depth - 0.4, 0.4)
    axes.tick_params(length=0, labelcolor=_INK)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(
        f"Tree of {len(value)} nodes: ranks of the guesses", loc="left", color=_INK, fontsize=11
    )
    bar = figure.colorbar(
        dots, ax=axes, pad=0.01, fraction=0.03, aspect=18, format=PercentFormatter(1.0, 1)
    )
    bar.set_label("share of steps that keep it", color=_INK, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def speed_figure(content: dict[str, Any]) -> Figure:
    """Tokens/s and tokens per step over the number of nodes, predicted and measured."""
    times, check = content["step_times"][-1], check_here(content)
    figure = _figure(9.0, 3.8)
    left, right = figure.subplots(1, 2)
    rates = {int(count): rate for count, rate in times["tokens_per_s"].items()}
    predicted = predictions(content, kind_of_row(times))
    steps = {count: row["tokens_per_step"] for count, row in predicted.items()}
    _curve(left, rates, "predicted", _PREDICTED)
    _curve(right, steps, "predicted", _PREDICTED)
    if check:
        rows = check["all"]
        _points(left, {row["nodes"]: row["measured_tokens_per_s"] for row in rows})
        _points(right, {row["nodes"]: row["measured"] for row in rows})
    best = times["nodes"]
    left.axvline(best, color=_MUTED, linewidth=0.8, linestyle=":")
    left.annotate(
        f"best: {best}",
        (best, 0),
        xycoords=("data", "axes fraction"),
        xytext=(4, 5),
        textcoords="offset points",
        fontsize=8,
        color=_INK,
    )
    titles = (f"Tokens per second, {times['device']}, {weights_of(times)}", "Tokens per step")
    for axes, title in zip((left, right), titles, strict=True):
        axes.set_title(title, loc="left", color=_INK, fontsize=11)
        axes.set_xscale("log", base=2)
        ticks = [count for count in (1, 2, 4, 8, 16, 32, 64, 128, 256) if count <= max(steps)]
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("nodes of the tree", color=_INK)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, whatever the user's settings say
    return figure


def _curve(axes: Axes, values: dict[int, float], label: str, colour: str) -> None:
    axes.plot(
        list(values), list(values.values()), color=colour, marker="o", markersize=4, label=label
    )


def _points(axes: Axes, values: dict[int, float]) -> None:
    axes.scatter(
        list(values),
        list(values.values()),
        facecolors="white",
        edgecolors=_MEASURED,
        linewidths=1.6,
        s=46,
        zorder=3,
        label="measured",
    )


def _places(paths: list[_Node]) -> dict[_Node, tuple[float, float]]:
    """Leaves side by side, a parent above the middle of its children."""
    place: dict[_Node, tuple[float, float]] = {}
    children: dict[_Node, list[_Node]] = {path: [] for path in paths}
    for path in paths:
        if path:
            children[path[:-1]].append(path)
    leaves = 0
    for path in sorted(paths, key=lambda path: (*path, math.inf)):  # children before their parent
        own = [place[child][0] for child in children[path]]
        x = (own[0] + own[-1]) / 2 if own else float(leaves)
        leaves += not own
        place[path] = (x, float(-len(path)))
    return place
