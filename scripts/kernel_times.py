"""Median time of every kernel in a CSV file of ncu with the metric gpu__time_duration.sum."""

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


def main(path: Path) -> int:
    """Print a Markdown table; 1 if the file holds no kernel."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    times: dict[str, list[float]] = defaultdict(list)
    for row in csv.DictReader(lines[start:]):
        value = (row.get("Metric Value") or "").replace(",", "")
        if value:
            name = row["Kernel Name"].rsplit("(", 1)[0]
            times[name].append(float(value) * MICROSECONDS[row["Metric Unit"]])
    print("| kernel | launches | median us | most us |\n|---|---|---|---|")
    for name, values in sorted(times.items()):
        print(f"| {name} | {len(values)} | {statistics.median(values):.2f} | {max(values):.2f} |")
    return 0 if times else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
