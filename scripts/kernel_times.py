"""One line of a table: the kernels of a benchmark's only case, from ncu's times of them.

The CSV holds the metric gpu__time_duration.sum of the kernels of one op, in the order of their
launches; a call of the op begins with the kernel that comes first of all. The JSON is the
benchmark's.
"""

import argparse
import csv
import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


def read_times(path: Path) -> list[tuple[str, float]]:
    """Names and microseconds of all kernels, in order."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    times = []
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        name = re.search(r"(\w+)_kernel", row["Kernel Name"])
        value = float(row["Metric Value"].replace(",", ""))
        text = name[1] if name else row["Kernel Name"]
        times.append((text, value * MICROSECONDS[row["Metric Unit"]]))
    return times


def calls_of(times: list[tuple[str, float]]) -> list[dict[str, float]]:
    """Microseconds of each kernel, summed up for each call; the last one may be cut off."""
    calls: list[dict[str, float]] = []
    for name, value in times:
        if name == times[0][0]:
            calls.append(defaultdict(float))
        calls[-1][name] += value
    return calls[:-1] or calls


def main() -> int:
    """Print the line; 1 if there is none, or the benchmark found its case wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("json", type=Path)
    parser.add_argument("--copy-gbs", type=float, default=0.0)
    args = parser.parse_args()
    calls = calls_of(read_times(args.csv)) if args.csv.exists() else []
    text = args.json.read_text(encoding="utf-8") if args.json.exists() else ""
    rows = json.loads(text)["rows"] if text else []
    row = rows[0] if rows else {"op": args.csv.stem, "shape": "no result"}
    if not calls or "error" in row:
        problem = row.get("error", "no kernel was seen")
        print(f"| {row['op']} | {row['shape']} | {len(calls)} | {problem} | | | |")
        return 1
    sums = [sum(call.values()) for call in calls]
    if len(sums) < 2:
        sums *= 2  # quantiles wants two
    low, median, high = statistics.quantiles(sums, n=4, method="inclusive")
    share = "-"
    if args.copy_gbs > 0 and row.get("bytes"):
        share = f"{100 * row['bytes'] / (1e3 * args.copy_gbs) / median:.0f}"
    kernels = ", ".join(
        f"{name} {statistics.median(call[name] for call in calls if name in call):.2f}"
        for name in dict.fromkeys(name for call in calls for name in call)
    )
    print(
        f"| {row['op']} | {row['shape']} | {len(calls)} | {median:.2f} | {low:.2f}-{high:.2f} |"
        f" {share} | {kernels} |"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
