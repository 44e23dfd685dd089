"""Writing that leaves whole files and folders behind, or none."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from medusa_ext.loading import LoadError
from medusa_ext.loading.files import cannot_write, write_whole


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file; it has its name only once it is whole and on the disk.

    Raises:
        LoadError: the disk refuses; nothing stays.
    """
    write_whole(path, save({name: value.contiguous() for name, value in tensors.items()}))


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


@contextmanager
def lock_folder(path: Path, *, wait: bool) -> Iterator[None]:
    """Keep other processes out of a folder, which is made where it does not exist.

    Args:
        path: of the folder.
        wait: until another process has left it.

    Raises:
        LoadError: the disk refuses, or another process is there and `wait` is False.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / ".lock").open("w")
    except OSError as error:
        raise cannot_write(path, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise LoadError(
                f"another run is writing to {path}; wait for it, or give another --out"
            ) from None
        yield  # the lock is given back when the file is closed
