"""Print the commands of a README block that is marked `<!-- ci: NAME -->` on the line before its fence.

CI runs what the README tells people to type; a renamed or lost block fails there.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(text: str, name: str) -> list[str]:
    """The contents of all fenced blocks marked with this name."""
    pattern = rf"<!-- ci: {re.escape(name)} -->\n+```\w*\n(.*?)^```"
    return re.findall(pattern, text, re.MULTILINE | re.DOTALL)


def main() -> int:
    """Print the blocks named on the command line."""
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} NAME", file=sys.stderr)
        return 2
    found = blocks(README.read_text(encoding="utf-8"), sys.argv[1])
    if not found:
        print(f"{README.name} has no block marked <!-- ci: {sys.argv[1]} -->", file=sys.stderr)
        return 1
    print("".join(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
