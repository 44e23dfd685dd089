"""Check that includes point one way: python -> core -> medusa <- backend; exit 1 if not.

Further: CUDA headers only in backend/cuda, pybind11 only in csrc/python, torch nowhere.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

# Who may include whose headers, besides its own.
ALLOWED = {
    "medusa": set(),
    "core": {"medusa"},
    "backend": {"medusa"},
    "python": {"core", "medusa"},
}
# Headers of other projects, and the one folder of csrc that may see them.
OUTSIDERS = {
    re.compile(r"cuda|cublas|curand"): "backend/cuda",
    re.compile(r"pybind11/|Python\.h"): "python",
    re.compile(r"torch/|ATen/|c10/"): None,
}


def faults(path: Path) -> list[str]:
    """What is wrong with the includes of one file."""
    inside = path.relative_to(ROOT / "csrc").as_posix()
    layer = inside.split("/")[0]
    found = []
    for header in INCLUDE.findall(path.read_text(encoding="utf-8")):
        target = header.split("/")[0]
        if target in ALLOWED and target != layer and target not in ALLOWED[layer]:
            found.append(f"{layer} may not include {header}")
        for pattern, home in OUTSIDERS.items():
            if pattern.match(header) and not (home and inside.startswith(home + "/")):
                found.append(f"{header} belongs in {home or 'no C++ file'}")
        if header.startswith("."):
            found.append(f"{header}: write includes from csrc")
    return [f"csrc/{inside}: {fault}" for fault in found]


def main() -> int:
    """Check every C++ and CUDA file below csrc."""
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    wrong = [fault for path in sorted(files) for fault in faults(path)]
    print("\n".join(wrong) if wrong else f"includes of {len(files)} files point the right way")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
