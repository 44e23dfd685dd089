"""The figures of a contest on the console and as JSON, Markdown and a bar chart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.peers import figures
from benchmarks.peers.contest import Outcome
from benchmarks.peers.contestants import OURS, PLAIN
from benchmarks.peers.figures import Agreement, Spread
from benchmarks.peers.prompts import PREFILL_TOKENS

# Of a peer's pair the lighter one looks up the prompt.
_COLOURS = {
    "medusa-plain": "#9cc7e8",
    "medusa-heads": "#0b4f8a",
    "medusa-lookup": "#2e86c8",
    "llama.cpp": "#8c3b00",
    "llama.cpp-lookup": "#e0893f",
    "openvino": "#3f7030",
    "openvino-lookup": "#9bc48a",
    "ctranslate2": "#6b5b95",
    "transformers": "#b03a5b",
    "transformers-lookup": "#e39aad",
}
ALL = "all"
MOST_LOAD = 0.5
DETAIL = "computes with"  # too long for the console's table


@dataclass(frozen=True)
class Line:
    """What is known of one contestant.

    Attributes:
        rate: tokens/s after the first token, over prompts and rounds.
        ratios: by name of one of ours: its rate over this one's on the same prompts.
        tokens_per_step: after the prefill.
        first_token_ms: of the prompts.
        prefill: tokens/s of prompts of PREFILL_TOKENS.
        peak_mib, loaded_mib, imports_mib: resident at most, once loaded, and before.
        agreement: with our plain decoding; None for that itself and without it.
        by_category: rates.
    """

    name: str
    detail: str
    rate: Spread | None
    ratios: dict[str, Spread]
    tokens_per_step: float | None
    first_token_ms: Spread | None
    prefill: Spread | None
    peak_mib: float
    loaded_mib: float
    imports_mib: float
    agreement: Agreement | None
    by_category: dict[str, Spread]


def own_names(outcome: Outcome) -> list[str]:
    """Those of ours that ran, the one that leads first."""
    return [name for name in OURS if name in outcome.entries]


def categories(outcome: Outcome) -> list[str]:
    """In the order of the prompts."""
    return list(dict.fromkeys(run.category for run in outcome.runs))


def lines(outcome: Outcome, eos_ids: Sequence[int]) -> list[Line]:
    """A line for each contestant that ran."""
    ours = own_names(outcome)
    compared = [name for name in (ours[0], PLAIN) if name in ours] if ours else []
    result = []
    for name, entry in outcome.entries.items():
        runs = figures.of(outcome.runs, name)
        shares = {own: figures.ratios(outcome.runs, own, name) for own in dict.fromkeys(compared)}
        rates = {
            category: Spread.of(run.rate for run in runs if run.category == category)
            for category in categories(outcome)
        }
        result.append(
            Line(
                name=name,
                detail=entry.detail,
                rate=Spread.of(run.rate for run in runs),
                ratios={own: share for own, share in shares.items() if share and own != name},
                tokens_per_step=figures.tokens_per_step(runs),
                first_token_ms=Spread.of(
                    None if run.prefill_s is None else 1e3 * run.prefill_s for run in runs
                ),
                prefill=Spread.of(
                    PREFILL_TOKENS / run.prefill_s if run.prefill_s else None
                    for run in figures.of(outcome.prefills, name)
                ),
                peak_mib=entry.peak_mib,
                loaded_mib=entry.loaded_mib,
                imports_mib=entry.imports_mib,
                agreement=figures.agreement(outcome.runs, name, PLAIN, eos_ids)
                if PLAIN in ours and name != PLAIN
                else None,
                by_category={category: rate for category, rate in rates.items() if rate},
            )
        )
    return result


def table(found: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table."""
    compared = list(dict.fromkeys(own for line in found for own in line.ratios))
    head = ["contestant", DETAIL, "tokens/s", "p25-p75"]
    head += [f"{own} / this" for own in compared]
    head += ["tokens/step", "first token, ms", f"prefill of {PREFILL_TOKENS}, tokens/s"]
    head += ["peak MiB", "of it imports"]
    rows = []
    for line in found:
        row = [line.name, line.detail, _number(line.rate), _range(line.rate)]
        for own in compared:
            ratio = line.ratios.get(own)
            row.append(f"{ratio.median:.2f} ({_range(ratio, 2)})" if ratio else "-")
        row.append("-" if line.tokens_per_step is None else f"{line.tokens_per_step:.2f}")
        row += [_number(line.first_token_ms), _number(line.prefill)]
        row += [f"{line.peak_mib:.0f}", f"{line.imports_mib:.0f}"]
        rows.append(row)
    return head, rows


def _number(value: Spread | None) -> str:
    return "-" if value is None else f"{value.median:.1f}"


def _range(value: Spread | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value.p25:.{digits}f}-{value.p75:.{digits}f}"


def busy(load: float) -> str | None:
    """What a load average before the start says of the figures; None where that is nothing."""
    if load < MOST_LOAD:
        return None
    return (
        f"this machine was busy before the start (load {load:.1f}): engines whose threads wait for "
        "each other by spinning lose most by that, and no ratio here is worth quoting"
    )


def is_exact(found: Sequence[Line]) -> bool:
    """Whether every speculative contestant of ours gave the tokens of our plain decoding."""
    return all(
        line.agreement.same == line.agreement.count
        for line in found
        if line.name in OURS and line.agreement is not None
    )


def sentences(found: Sequence[Line], left_out: dict[str, str]) -> list[str]:
    """Who said the same, and who is not there."""
    result = []
    for line in found:
        if line.agreement is None:
            continue
        same, count = line.agreement.same, line.agreement.count
        text = f"{line.name}: the tokens of {PLAIN} on {same} of {count} prompts"
        if line.agreement.first is not None:
            earliest, median = line.agreement.first
            text += f"; the others differ first at token {earliest}, median {median:.0f}"
            if line.name in OURS:
                text = f"WRONG, {text}"
        result.append(text)
    return result + [f"{name}: left out, {reason}" for name, reason in left_out.items()]


def show(console: Console, found: Sequence[Line], left_out: dict[str, str]) -> None:
    """Print the table and what belongs to it."""
    head, rows = table(found)
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for place, name in enumerate(head):
        if name != DETAIL:
            is_name = place == 0
            shown.add_column(name, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        shown.add_row(*(cell for cell, name in zip(row, head, strict=True) if name != DETAIL))
    if rows:
        console.print(shown)
    details = [f"{line.name}: computes with {line.detail}" for line in found]
    for sentence in details + sentences(found, left_out):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def write(
    folder: Path, about: dict[str, Any], found: Sequence[Line], outcome: Outcome
) -> tuple[list[Path], str | None]:
    """Write peers.json, peers.md and peers.png, each whole or not at all.

    Args:
        folder: made where there is none.
        about: date, machine, versions, commit, command, settings.
        found: of `lines`.
        outcome: the runs behind them.

    Returns:
        The paths written, and why there is no chart, or None.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        **about,
        "left_out": outcome.left_out,
        "contestants": [dataclasses.asdict(line) for line in found],
        "runs": [_record(run) for run in [*outcome.runs, *outcome.prefills]],
    }
    paths = [folder / "peers.json", folder / "peers.md"]
    _replace(paths[0], lambda path: path.write_text(_json(content), "utf-8"))
    _replace(paths[1], lambda path: path.write_text(markdown(about, found, outcome), "utf-8"))
    chart = folder / "peers.png"
    try:
        _replace(chart, lambda path: draw(found, categories(outcome), path))
    except ImportError as error:
        return paths, f"no chart: {error.name} is not installed; pip install matplotlib"
    return [*paths, chart], None


def _replace(path: Path, write_to: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_to(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _json(content: dict[str, Any]) -> str:
    """JSON with a line for each run."""
    runs = ",\n".join(f"  {json.dumps(run)}" for run in content["runs"])
    rest = json.dumps({**content, "runs": []}, indent=1)
    return rest.replace('"runs": []', f'"runs": [\n{runs}\n ]') + "\n"


def _record(run: figures.Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "round": run.round_index,
        "prompt": run.prompt,
        "category": run.category,
        "tokens": len(run.tokens),
        "steps": run.steps,
        "prefill_s": None if run.prefill_s is None else round(run.prefill_s, 6),
        "decode_s": round(run.decode_s, 6),
        "tokens_per_s": None if run.rate is None else round(run.rate, 2),
    }


def markdown(about: dict[str, Any], found: Sequence[Line], outcome: Outcome) -> str:
    """The result as a page."""
    machine, versions = about["machine"], about["versions"]
    head, rows = table(found)
    text = [
        "# This engine and its peers",
        "",
        f"{about['date']}, {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {machine['system']}, commit {about['commit']}.",
        "",
        f"    {about['command']}",
        "",
        f"Model {about['model']['name']}, {about['model']['mib']} MiB. "
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}.",
        "",
        "Median and quartiles over prompts and rounds; tokens/s after the first token. A ratio is "
        "taken prompt by prompt. Peak: most memory resident in the process, loading included.",
        "",
        *_markdown_table(head, rows),
    ]
    names = categories(outcome)
    if names:
        head = ["tokens/s", *names]
        rows = [
            [line.name, *(_number(line.by_category.get(category)) for category in names)]
            for line in found
        ]
        text += ["", *_markdown_table(head, rows)]
    notes = sentences(found, outcome.left_out)
    notes += filter(None, [busy(about["load_before"])])
    text += ["", *(f"- {note}" for note in notes)]
    return "\n".join(text) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *body]


def draw(found: Sequence[Line], names: Sequence[str], path: Path) -> None:
    """Draw tokens/s by category, a bar for each contestant, and all prompts at the left.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [ALL, *names] if len(names) > 1 else [ALL]
    figure = Figure(figsize=(max(9.5, 0.16 * len(groups) * (len(found) + 2) + 1.5), 5.0))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.84 / max(1, len(found))
    for index, line in enumerate(found):
        rates = {ALL: line.rate, **line.by_category}
        places, heights, errors = [], [], []
        for group, category in enumerate(groups):
            rate = rates.get(category)
            if rate is not None:
                places.append(group - 0.42 + width * (index + 0.5))
                heights.append(rate.median)
                errors.append((rate.median - rate.p25, rate.p75 - rate.median))
        axes.bar(
            places,
            heights,
            width,
            yerr=list(zip(*errors, strict=True)) if errors else None,
            color=_COLOURS.get(line.name, "#777777"),
            error_kw={"elinewidth": 0.6, "ecolor": "#555555"},
            label=line.name,
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylabel("tokens/s after the first token: median, quartiles")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(
        ncols=min(5, len(found)), frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    figure.savefig(path, format="png", dpi=150, facecolor="white", bbox_inches="tight")
