"""What calibration found, as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from medusa_ext.calibration.file import DYNAMIC, LOOKUP, STATIC, check_here, kind_of_row, weights_of

_RANKS = (1, 2, 5, 10)
_NAMES = {STATIC: "static", DYNAMIC: "dynamic", LOOKUP: "dynamic (with lookup)"}


def print_report(content: dict[str, Any], console: Console) -> None:
    """Print the tables of a calibration, from the content of its file."""
    times, check = content["step_times"][-1], check_here(content)
    console.print(f"How often a head guesses right, in %, over {content['tokens']:,} tokens:\n")
    console.print(_accuracies(content))
    measured = f", measured on {check['prompts']} prompts" if check else ""
    console.print(f"\nTrees on {times['device']} ({times['detail']}), {weights_of(times)}:")
    console.print(f"predicted on text that did not choose the tree (± standard error){measured}\n")
    console.print(_nodes(content))
    if "guesses" in content:
        console.print(
            f"tokens/step: one tree for all steps; tokens/s of {_NAMES[kind_of_row(times)]} trees"
        )
    console.print('* the best on this device, from which tree="auto" starts')
    if content["by_category"] or check.get("by_category"):
        console.print("\nBy category:\n")
        console.print(_categories(content))


def _accuracies(content: dict[str, Any]) -> Table:
    table = _table(["head", *(f"top {count}" for count in _RANKS), "positions"])
    for head, (shares, count) in enumerate(zip(content["heads"], content["counts"], strict=True)):
        tops = (f"{100 * sum(shares[:count]):.1f}" for count in _RANKS)
        table.add_row(str(head), *tops, f"{count:,}")
    return table


def _nodes(content: dict[str, Any]) -> Table:
    times = content["step_times"][-1]
    check = check_here(content)
    measured = {row["nodes"]: row for row in check.get("all", [])}
    table = _table(
        ["nodes", "step ms", "tokens/step"]
        + (["dynamic trees", "with lookup"] if "guesses" in content else [])
        + ["tokens/s"]
        + (["measured tokens/step", "off by", "measured tokens/s"] if check else []),
    )
    for row in content["predicted"]:
        key = str(row["nodes"])
        if key not in times["seconds"]:
            continue
        cells = [
            key + (" *" if row["nodes"] == times["nodes"] else ""),
            f"{1000 * times['seconds'][key]:.2f}",
            *(
                f"{one['tokens_per_step']:.3f}{_error(one.get('error'))}"
                for one in (row, row.get(DYNAMIC), row.get(LOOKUP))
                if one
            ),
            f"{times['tokens_per_s'][key]:.1f}",
        ]
        if row["nodes"] in measured:
            found = measured[row["nodes"]]
            cells += [
                f"{found['measured']:.3f}",
                f"{100 * (found['measured'] / found['predicted'] - 1):+.1f} %",
                f"{found['measured_tokens_per_s']:.1f}",
            ]
        table.add_row(*cells)
    return table


def _categories(content: dict[str, Any]) -> Table:
    nodes = [str(count) for count in _few_sizes(content)]
    known, check = content["by_category"], check_here(content).get("by_category", {})
    kind = kind_of_row(content["step_times"][-1])
    steps = "tokens_per_step" if kind == STATIC else kind
    columns = ["category", "head 0 top 1, %", "positions"]
    for count in nodes:
        columns += [f"tokens/step, {count}"] + ([f"measured, {count}"] if check else [])
    table = _table(columns)
    for name in sorted({*known, *check}):
        own = known.get(name)
        cells = [name, "-", "-"]
        if own:
            cells[1:] = [f"{100 * sum(own['heads'][0][:1]):.1f}", f"{own['counts'][0]:,}"]
        for count in nodes:
            cells.append(_number(own and own[steps].get(count)))
            if check:
                cells.append(_number(check.get(name, {}).get(count, {}).get("measured")))
        table.add_row(*cells)
    return table


def _few_sizes(content: dict[str, Any]) -> list[int]:
    """Numbers of nodes, at most three: the best here, one in the middle, the largest."""
    sizes = [row["nodes"] for row in content["predicted"] if row["nodes"] > 1]
    if len(sizes) <= 3:
        return sizes
    best = content["step_times"][-1]["nodes"]
    return sorted({best, sizes[len(sizes) // 2], sizes[-1]} - {1})


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(columns: list[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table
