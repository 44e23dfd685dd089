"""Where, when and with what a result came about."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.peers.process import ROOT

PACKAGES = (
    "medusa_ext",
    "llama-cpp-python",
    "openvino-genai",
    "openvino",
    "ctranslate2",
    "transformers",
    "torch",
    "numpy",
)


def describe() -> dict[str, Any]:
    """Date, machine, versions and commit, ready for JSON."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "cpu": _proc("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(_memory_kib() / 2**20, 1),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": _versions(),
        "commit": _commit(),
    }


def _proc(path: str, field: str) -> str | None:
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except OSError:
        return None
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(field))
    return next(found, None)


def _memory_kib() -> int:
    found = _proc("/proc/meminfo", "MemTotal")
    return int(found.split()[0]) if found else 0


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
