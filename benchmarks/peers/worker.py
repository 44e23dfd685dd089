"""The process of one contestant: `python -m benchmarks.peers.worker NAME`.

It speaks JSON lines. The first line that it reads is the job, then each is a question; each gets
one line of answer, and an error ends it. The end of its input ends it too.

    {"model": ..., "threads": 2, ...}   -> {"detail": ..., "imports_mib": ..., "loaded_mib": ...}
    {"ids": [...], "max_tokens": 128}   -> {"tokens": [...], "marks": [...], "peak_mib": ...}
                                        or {"error": "ValueError: ..."}
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.contestants import CONTESTANTS, Job
from benchmarks.peers.trace import Trace

_PR_SET_PDEATHSIG = 1


def memory_mib(field: str) -> float:
    """MiB that the kernel reports of this process: VmRSS is now, VmHWM the most so far."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise OSError(f"/proc/self/status has no {field}")


def serve(name: str, requests: io.TextIOBase, replies: io.TextIOBase) -> None:
    """Load a contestant and answer until the input ends."""

    def reply(**content: Any) -> None:  # noqa: ANN401 - JSON
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    contestant = CONTESTANTS[name]
    try:
        job = Job(**json.loads(requests.readline()))
        for module in contestant.modules:
            importlib.import_module(module)
        imports_mib = memory_mib("VmRSS")
        loaded = contestant.load(job)
        reply(detail=loaded.detail, imports_mib=imports_mib, loaded_mib=memory_mib("VmRSS"))
        for line in requests:
            question = json.loads(line)
            trace = Trace()
            loaded.answer(question["ids"], question["max_tokens"], trace)
            reply(tokens=trace.tokens, marks=trace.marks, peak_mib=memory_mib("VmHWM"))
    except Exception as error:  # whatever an engine may raise: the others go on
        lines = str(error).strip().splitlines() or ["no message"]
        reply(error=f"{type(error).__name__}: {lines[0][:300]}")


def main() -> None:
    """Serve on standard input and output; what the engines print goes to standard error."""
    # Whoever waits for its turn is stopped, and would stay so for ever after its parent's death.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.stdin, replies)  # type: ignore[arg-type]
    replies.close()
    os._exit(0)  # some engines crash as they end


if __name__ == "__main__":
    main()
