"""Control of the emulated CUDA device ("cuda-emulated"): the schedules that tests run under.

The emulator is a library beside the module _core; its one test function is reached by ctypes, so
that the module itself knows nothing of emulation.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medusa_ext import _core

# Which of the threads of a block that can run goes on, and the order of the blocks of a grid.
# "unfair" lets one warp run as far ahead of the others as it can.
ORDERS = ["forward", "reverse", "random", "unfair"]


@contextmanager
def emulation(
    thread_order: str = "forward",
    block_order: str = "forward",
    seed: int = 1,
    lazy_streams: bool = False,
) -> Iterator[None]:
    """Run the kernels of the block in this order, those of all backends and threads.

    With lazy_streams, copies and kernels wait in their streams until a call that synchronises, as
    they may on a GPU: host memory that is reused too early, or read too early, is seen.
    """
    options = _library().medusa_emulation_options
    options.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_bool]
    options.restype = None
    options(ORDERS.index(thread_order), ORDERS.index(block_order), seed, lazy_streams)
    try:
        yield
    finally:
        options(0, 0, 1, False)


def _library() -> ctypes.CDLL:
    """The library that make_backend has loaded, or will load."""
    return ctypes.CDLL(str(Path(_core.__file__).with_name("libmedusa_cuda_emulated.so")))
