"""A contestant's process, seen from the one that leads.

One runs at a time: the others are stopped by a signal, so that no thread of theirs that waits by
spinning takes a core away.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.peers.contestants import Job

ROOT = Path(__file__).resolve().parents[2]


class ContestantError(Exception):
    """A contestant cannot go on; says why in one line."""


class Worker:
    """A process that runs only while it is asked.

    Attributes:
        ready: what it said when it had loaded.
    """

    def __init__(self, name: str, job: Job) -> None:
        """Start it and load the model.

        Raises:
            ContestantError: it could not load.
        """
        self._name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            env=worker_environment(job.threads),
        )
        try:
            self.ready = self._exchange(dataclasses.asdict(job))
        except BaseException:
            self.close()
            raise

    def ask(self, ids: list[int], max_tokens: int) -> dict[str, Any]:
        """Let it answer a prompt.

        Raises:
            ContestantError: it failed.
        """
        return self._exchange({"ids": ids, "max_tokens": max_tokens})

    @property
    def process_id(self) -> int:
        """Of the contestant's process."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        self._process.kill()  # also where it is stopped
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # it had ended before it read everything
                    continue
        self._stderr.close()

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.send_signal(signal.SIGCONT)
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ContestantError(self._last_words())
        process.send_signal(signal.SIGSTOP)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ContestantError(reply["error"])
        return reply

    def _last_words(self) -> str:
        status = self._process.wait()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return f"its process ended with {how}" + (f": {lines[-1][:300]}" if lines else "")

    def __enter__(self) -> Worker:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self.close()


def worker_environment(threads: int) -> dict[str, str]:
    """The environment of a contestant: threads, no network, and this repository's modules."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
