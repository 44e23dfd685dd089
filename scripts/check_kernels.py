"""Hold what ptxas -v says of every kernel against its ceiling; exit 1 on a spill or too much.

A kernel that is not in the table may take 128 registers: two blocks of 256 threads each.
"""

import re
import sys
from pathlib import Path

DEFAULT = 128
# Kernels that hold accumulators of the tensor cores: one block of 256 threads has 255 for each.
CEILINGS = {"linear_kernel": 255, "tree_attention_kernel": 255}
# Bytes that may spill, stores and loads: what is known, so that no more comes. Heads of 256 hold
# twice the sums of heads of 128; those and the merge fit where kernels are tuned, up to sm_90.
SPILLS = [
    (r"tree_attention_kernelI\w+?Li256", r"sm_\d+", 1554),
    (r"tree_attention_kernelI\w+?Li128", r"sm_1\d\d", 128),
    (r"merge_parts_kernelILi4E", r"sm_1\d\d", 16),
]


def main(log: Path) -> int:
    """Print the kernels, the hungriest first."""
    rows: dict[tuple[str, str], tuple[int, int]] = {}
    kernel = arch = ""
    spills = 0
    for line in log.read_text(encoding="utf-8").splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel, arch = entry[1], entry[2]
        elif spilled := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(spilled[1]) + int(spilled[2])
        elif used := re.search(r"Used (\d+) registers", line):
            rows[kernel, arch] = (int(used[1]), spills)
    if not rows:
        print(f"{log}: ptxas said nothing; was it called with -v?")
        return 1
    wrong = 0
    for (name, arch), (registers, spilled) in sorted(rows.items(), key=lambda r: -r[1][0]):
        ceiling = next((most for word, most in CEILINGS.items() if word in name), DEFAULT)
        known = (s for word, where, s in SPILLS if re.search(word, name) and re.match(where, arch))
        allowed = next(known, 0)
        bad = registers > ceiling or spilled > allowed
        wrong += bool(bad)
        if bad or registers > DEFAULT:
            print(f"{arch} {registers:4} of {ceiling} registers, {spilled} bytes spilled: {name}")
    print(f"{len(rows)} kernels, {wrong} with spills or too many registers")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
