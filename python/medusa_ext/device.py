"""Devices by name: "auto", "cpu", "cuda" and "cuda:N"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from medusa_ext import _core
from medusa_ext.options import choice, integer, shown

ISAS = ("", "generic", "avx2", "avx512")
_NAMES = re.compile("auto|cpu|cuda(:[0-9]+)?|cuda-emulated")  # the last one is for tests

# Nodes of tree="auto". A CPU streams weights for up to 8 or so rows in the time of one and computes
# beyond: a step of 16 nodes takes up to twice that of one, and the best 15 guesses hold most of
# what 63 would accept. A GPU is bound by its memory up to more than 64 rows.
AUTO_NODES = {"cpu": 16, "cuda": 64}


def open_device(device: object, *, threads: int | None = None, isa: str = "") -> _core.Backend:
    """Return the backend of a device.

    Args:
        device: "auto" is "cuda" where it can be used, else "cpu". What `threads` or `isa` is given
            for is the CPU.
        threads: of the CPU; None: one per core that this process may use.
        isa: instruction set of the CPU's kernels, "" for the best.

    Raises:
        ValueError: no such device, or threads or isa beside a CUDA device.
        NotImplementedError: this build has no backend for the device.
        medusa_ext.CudaError: the device cannot be used here, and why.
    """
    if not isinstance(device, str) or not _NAMES.fullmatch(device):
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {shown(device)}')
    choice("isa", isa, ISAS)
    num_threads = 0 if threads is None else integer("threads", threads, 1, 1024)
    given = "threads" if threads is not None else "isa" if isa else None
    if given is not None and device.startswith("cuda"):
        value = threads if given == "threads" else isa
        raise ValueError(
            f"{given}={value!r} is for the CPU, and device is {device!r}; leave {given} out, or "
            'use device="cpu"'
        )
    name = "cpu" if device == "auto" and given is not None else device
    return _core.Backend(name, threads=num_threads, isa=isa)


def check_model(config: Mapping[str, Any], dtype: str, kind: str) -> None:
    """Refuse, before weights are read, a model that the kernels of a kind of device do not compute.

    Raises:
        NotImplementedError: says what would work.
    """
    head_dim = config["head_dim"]
    if kind == "cpu" or (head_dim <= 256 and (dtype == "f32" or head_dim % 8 == 0)):
        return
    limit, remedy = "up to 256", 'device="cpu"'
    if head_dim <= 256:
        limit, remedy = "that are multiples of 8", 'dtype="f32" or device="cpu"'
    raise NotImplementedError(
        f"the model has heads of size {head_dim} in {dtype}; a GPU computes sizes {limit}: use "
        f"{remedy}"
    )


def kind_of(device: str) -> str:
    """Return "cpu" or "cuda" for the name of a device or of a backend; not for "auto"."""
    return "cuda" if device.startswith("cuda") else "cpu"
