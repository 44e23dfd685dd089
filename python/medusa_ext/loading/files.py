"""Files of tensors, read one at a time: safetensors, pickles, and arrays made on the spot."""

import ctypes
import math
import mmap
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medusa_ext import _core
from medusa_ext.loading.errors import LoadError

FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_SAFETENSORS_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16", "I32": "i32", "I64": "i64"}


class TensorFile(Protocol):
    """Tensors by name. Types: "f32", "f16", "bf16", "i32", "i64", or the file's word for others."""

    @property
    def path(self) -> Path:
        """The file, for messages."""

    def names(self) -> Iterable[str]:
        """Names of the tensors, in the file's order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Outermost first."""

    def dtype(self, name: str) -> str:
        """As stored."""

    def num_bytes(self, name: str) -> int:
        """As stored."""

    def read(self, name: str, dtype: str) -> tuple[NDArray[Any], str]:
        """The values and their type, bf16 as uint16. Quantised blocks are expanded to `dtype`."""

    def release(self, name: str) -> None:
        """The values are not needed any more."""


class SafetensorsTensors:
    """A safetensors file, mapped and checked by the C++ reader."""

    def __init__(self, path: Path) -> None:
        """Raises LoadError naming the file and the tensor that is at fault."""
        self.path = path
        try:
            self.file = _core.SafetensorsFile(str(path))
        except (ValueError, OSError) as error:
            text = str(error)
            raise LoadError(text if str(path) in text else f"{path}: {text}") from None

    @property
    def metadata(self) -> dict[str, str]:
        """The text entries of the header."""
        return self.file.metadata

    def names(self) -> Iterable[str]:
        """See TensorFile."""
        return self.file.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorFile."""
        return tuple(self.file.shape(name))

    def dtype(self, name: str) -> str:
        """See TensorFile."""
        word = self.file.dtype(name)
        return _SAFETENSORS_TYPES.get(word, word)

    def num_bytes(self, name: str) -> int:
        """See TensorFile."""
        return int(self.file.array(name).nbytes)

    def read(self, name: str, dtype: str) -> tuple[NDArray[Any], str]:
        """See TensorFile."""
        return self.file.array(name), self.dtype(name)

    def release(self, name: str) -> None:
        """See TensorFile."""
        self.file.release(name)


class PickledTensors:
    """A .bin or .pt file: a pickle, opened by torch with weights_only=True: it cannot run code."""

    def __init__(self, path: Path) -> None:
        """Raises LoadError where torch is missing, or the file holds anything but named tensors."""
        try:
            import torch
        except ModuleNotFoundError:
            raise LoadError(
                f"{path} is a pickle and needs torch; install it with: pip install "
                '"medusa-ext[torch]"'
            ) from None
        self.path = path
        try:
            mapped = zipfile.is_zipfile(path)  # the older format cannot be mapped
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own deprecations, of no use to our users
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # torch raises whatever its parser met
            raise LoadError(f"{path} cannot be read as a checkpoint: {_why(error)}") from None
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not all(
            isinstance(value, torch.Tensor) for value in state.values()
        ):
            raise LoadError(f"{path} holds a {type(state).__name__}; wanted tensors by name")
        self.mapped = mapped
        self.state: dict[str, Any] = {str(name): value.detach() for name, value in state.items()}

    def names(self) -> Iterable[str]:
        """See TensorFile."""
        return self.state

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorFile."""
        return tuple(self.state[name].shape)

    def dtype(self, name: str) -> str:
        """See TensorFile."""
        word = str(self.state[name].dtype).removeprefix("torch.")
        known = {
            "float32": "f32",
            "float16": "f16",
            "bfloat16": "bf16",
            "int32": "i32",
            "int64": "i64",
        }
        return known.get(word, word)

    def num_bytes(self, name: str) -> int:
        """See TensorFile."""
        return int(self.state[name].nbytes)

    def read(self, name: str, dtype: str) -> tuple[NDArray[Any], str]:
        """See TensorFile."""
        import torch

        tensor = self.state[name].contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(np.uint16), "bf16"
        return tensor.numpy(), self.dtype(name)

    def release(self, name: str) -> None:
        """See TensorFile."""
        tensor = self.state[name]
        if self.mapped and tensor.is_contiguous():
            drop_pages(tensor.data_ptr(), tensor.nbytes)


class ArrayTensors:
    """Arrays in memory, for what a checkpoint only implies; `path` is where it implies them."""

    def __init__(self, path: Path) -> None:
        """Starts empty."""
        self.path = path
        self.arrays: dict[str, NDArray[Any]] = {}

    def names(self) -> Iterable[str]:
        """See TensorFile."""
        return self.arrays

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorFile."""
        return self.arrays[name].shape

    def dtype(self, name: str) -> str:
        """See TensorFile."""
        return {"float32": "f32", "int32": "i32"}[self.arrays[name].dtype.name]

    def num_bytes(self, name: str) -> int:
        """See TensorFile."""
        return int(self.arrays[name].nbytes)

    def read(self, name: str, dtype: str) -> tuple[NDArray[Any], str]:
        """See TensorFile."""
        return self.arrays[name], self.dtype(name)

    def release(self, name: str) -> None:
        """See TensorFile."""


def drop_pages(address: int, num_bytes: int) -> None:
    """Give clean pages of a read-only mapping back to the system; a later read maps them again.

    Whole pages inside the range only: the borders may hold other tensors' values, which are cheap
    to keep.
    """
    if sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    start = math.ceil(address / page) * page
    length = (address + num_bytes) // page * page - start
    if length > 0:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _why(error: BaseException) -> str:
    """One line; torch's own advice to load with weights_only=False is not passed on."""
    text = str(error)
    code = re.search(r"GLOBAL ([\w.]+)", text)
    if code:
        return f"it asks for {code[1]}, and code in checkpoints is never run"
    if "weights_only" in text or not text.strip():
        return "it is damaged, or holds more than tensors"
    return text.strip().splitlines()[0][:160]
