"""Run what the README and the guide tell people to type, so that no command there goes stale.

    doc_blocks.py run                run all `sh run` and `python run` blocks; a page's Python blocks share their names
    doc_blocks.py install WORD       print the one `sh install` block of the README that holds WORD
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"sh": ["bash", "-euxo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


def blocks(page: Path, info: str) -> list[str]:
    """The contents of a page's fenced blocks with this info string, such as "sh run"."""
    pattern = rf"^```{re.escape(info)}\n(.*?)^```$"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run() -> int:
    """Run all marked blocks; returns how many ran. Raises CalledProcessError where one fails."""
    count = 0
    for page in PAGES:
        for language, command in LANGUAGES.items():
            found = blocks(page, f"{language} run")
            if found:
                print(f"{page.name}: {len(found)} blocks of {language}", flush=True)
                subprocess.run([*command, "\n".join(found)], check=True)
            count += len(found)
    return count


def main() -> int:
    """Do what the command line says."""
    match sys.argv[1:]:
        case ["run"]:
            return 0 if run() else 1
        case ["install", word]:
            found = [block for block in blocks(PAGES[0], "sh install") if word in block]
            if len(found) == 1:
                print(found[0], end="")
                return 0
            print(f"README.md: {len(found)} `sh install` blocks hold {word!r}; wanted 1", file=sys.stderr)
            return 1
        case _:
            print(__doc__, file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
