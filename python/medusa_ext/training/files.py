"""Writing that leaves whole files and folders behind, or none."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from medusa_ext.loading import LoadError


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file; it has its name only once it is whole and on the disk.

    Raises:
        LoadError: the disk refuses; nothing stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            with partial.open("wb") as file:
                file.write(save({name: value.contiguous() for name, value in tensors.items()}))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends well.

    Raises:
        LoadError: the disk refuses, or something has that name by then; nothing stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        partial.rename(path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cannot_write(path: Path, error: Exception) -> LoadError:
    """The error to raise when the disk refuses."""
    reason = error.strerror if isinstance(error, OSError) else None
    return LoadError(f"cannot write {path}: {reason or error}; nothing was left half-written")
