"""Files of tensors, read one at a time: safetensors, pickles, and arrays made on the spot.

And files of any kind, written as a whole.
"""

import ctypes
import importlib.util
import json
import math
import mmap
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from medusa_ext import _core
from medusa_ext.loading import pickle_index
from medusa_ext.loading.errors import LoadError

FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_SAFETENSORS_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16", "I32": "i32", "I64": "i64"}
_TORCH_TYPES = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int64": "i64",
}
_NUMPY_TYPES = {"f32": "f4", "f16": "f2", "bf16": "u2", "i32": "i4", "i64": "i8"}


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


@runtime_checkable
class BlockFile(TensorFile, Protocol):
    """A file some of whose tensors lie in blocks (blocks.py); `dtype` gives the type of these."""

    def expands(self, dtype: str) -> bool:
        """Whether `read` expands blocks of this type."""

    def read_rows(self, name: str, dtype: str, rows: NDArray[Any]) -> NDArray[Any]:
        """Some rows of a tensor in blocks, as `read` expands them."""

    def read_blocks(self, name: str) -> NDArray[np.uint8]:
        """The blocks as they are, [rows, bytes]; LoadError where a scale is no finite number."""


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
    """A .bin or .pt file: a pickle, opened by torch with weights_only=True: it cannot run code.

    torch only tells where the tensors stand (pickle_index.py), in a process of its own that ends
    before any is read, unless this one has it already; the file is mapped here.
    """

    def __init__(self, path: Path) -> None:
        """Raises LoadError where torch is missing, or the file holds anything but named tensors."""
        if importlib.util.find_spec("torch") is None:
            raise LoadError(
                f"{path} is a pickle and needs torch; install it with: pip install "
                '"medusa-ext[torch]"'
            )
        self.path = path
        self.types: dict[str, str] = {}
        self.arrays: dict[str, NDArray[Any]] = {}
        direct = _can_be_mapped(path)
        try:
            # The temporary file has no name: nothing is left behind, however this process ends.
            with path.open("rb") if direct else tempfile.TemporaryFile() as file:
                places = _ask_torch(path, None if direct else file.fileno())
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise LoadError(f"{path} cannot be read as a checkpoint: {error}") from None
        for name, (word, num_bytes, shape, strides, offset) in places.items():
            self.types[name] = _TORCH_TYPES.get(word, word)
            dtype = _NUMPY_TYPES.get(self.types[name], f"V{num_bytes}")
            byte_strides = [stride * num_bytes for stride in strides]
            try:  # numpy checks that every element lies inside the buffer
                self.arrays[name] = np.ndarray(shape, dtype, content, offset, byte_strides)
            except ValueError:
                raise LoadError(f"{path}: tensor {name} does not lie inside the file") from None

    def names(self) -> Iterable[str]:
        """See TensorFile."""
        return self.arrays

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorFile."""
        return self.arrays[name].shape

    def dtype(self, name: str) -> str:
        """See TensorFile."""
        return self.types[name]

    def num_bytes(self, name: str) -> int:
        """See TensorFile."""
        return int(self.arrays[name].nbytes)

    def read(self, name: str, dtype: str) -> tuple[NDArray[Any], str]:
        """See TensorFile."""
        return np.require(self.arrays[name], requirements=["C", "ALIGNED"]), self.types[name]

    def release(self, name: str) -> None:
        """See TensorFile."""
        array = self.arrays[name]
        if array.flags.c_contiguous:
            drop_pages(array.ctypes.data, array.nbytes)


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


def _can_be_mapped(path: Path) -> bool:
    """Whether a pickle holds its tensors as they are in memory; before torch 1.6 none did."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return all(
                entry.compress_type == zipfile.ZIP_STORED
                and (
                    not entry.filename.endswith("/byteorder")
                    or archive.read(entry) == sys.byteorder.encode()
                )
                for entry in archive.infolist()
            )
    except Exception:  # zipfile raises whatever it met; torch says what is wrong
        return False


def _ask_torch(path: Path, rewritten: int | None) -> dict[str, Any]:
    """The places of a pickle's tensors, see pickle_index.py.

    Args:
        path: the pickle.
        rewritten: descriptor of an empty file to rewrite the pickle to, which the places are then
            in; None to leave it as it is.

    Raises:
        LoadError: torch cannot read the pickle.
        OSError: no process can be started.
    """
    target = "" if rewritten is None else f"/proc/self/fd/{rewritten}"
    answer: Any
    if sys.modules.get("torch") is not None:  # its memory is taken already
        answer = pickle_index.answer(str(path), target)
        if isinstance(answer, str):
            raise LoadError(answer)
        return dict(answer)
    # Isolated, and without relative folders: nothing is imported from the working directory.
    folders = [name for name in sys.path if isinstance(name, str) and Path(name).is_absolute()]
    done = subprocess.run(
        [
            sys.executable or "",
            "-I",
            Path(__file__).with_name("pickle_index.py"),
            json.dumps(folders),
            path,
            target,
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        pass_fds=[] if rewritten is None else [rewritten],
    )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        answer = None
    if isinstance(answer, str):
        raise LoadError(answer)
    if not isinstance(answer, dict):
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise LoadError(
            f"{path} cannot be read as a checkpoint: the process that opens it with torch ended "
            f"with status {done.returncode}: {last[:160]}"
        )
    return answer


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that has its name only once it is whole and on the disk.

    Raises:
        LoadError: the disk refuses; nothing stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: Exception) -> LoadError:
    """The error to raise when the disk refuses."""
    reason = error.strerror if isinstance(error, OSError) else None
    return LoadError(f"cannot write {path}: {reason or error}; nothing was left half-written")
