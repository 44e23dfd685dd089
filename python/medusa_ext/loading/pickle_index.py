"""Where in its file each tensor of a pickle stands, found by torch.

PickledTensors runs this file as a process of its own, since importing torch takes 200 MB, which end
with it; where the importing process has torch already, it calls `answer`.

Arguments of the program: the importer's sys.path as JSON; the pickle; "" or, where the pickle
cannot be mapped, a file to rewrite it to, which is then the file meant below.

The last line of the output is JSON: the text of an error, or {name: place} with a place [torch's
word for the type, bytes per element, shape, strides in elements, offset of the first element in the
file in bytes].
"""

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any


class _Refused(Exception):
    """The text is for the user."""


def _index(path: str, rewritten: str) -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of its own is missing
        raise _Refused(
            f"{path} is a pickle and needs torch, which fails to start: {_why(error)}"
        ) from None
    try:
        warnings.simplefilter("ignore")  # torch's own deprecations, of no use to our users
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=not rewritten)
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not all(
            isinstance(value, torch.Tensor) for value in state.values()
        ):
            raise _Refused(f"{path} holds a {type(state).__name__}; wanted tensors by name")
        if rewritten:
            torch.save(dict(state), rewritten)
            state = torch.load(rewritten, map_location="cpu", weights_only=True, mmap=True)
    except _Refused:
        raise
    except Exception as error:  # torch raises whatever its parser met
        raise _Refused(f"{path} cannot be read as a checkpoint: {_why(error)}") from None
    mappings = _mappings()
    places = {}
    for name, value in state.items():
        if value.is_quantized:
            form = _word(value.dtype)
        elif value.is_nested or value.is_conj() or value.is_neg():
            form = "nested, conjugated or negated"
        else:
            form = value.device.type if value.device.type != "cpu" else _word(value.layout)
        offset = _offset(value, mappings) if form == "strided" else None
        if offset is None:
            raise _Refused(f"{path}: tensor {name} is stored as {form}; wanted its plain values")
        shape, strides = list(value.shape), list(value.stride())
        places[str(name)] = [_word(value.dtype), value.element_size(), shape, strides, offset]
    return places


def _mappings() -> list[tuple[int, int, int]]:
    """Every part of memory that shows a file: start, end, and the start's offset in the file."""
    found = []
    for line in Path("/proc/self/maps").read_bytes().splitlines():
        span, _, offset, _, inode = line.split()[:5]
        if inode != b"0":
            start, _, end = span.partition(b"-")
            found.append((int(start, 16), int(end, 16), int(offset, 16)))
    return found


def _offset(value: Any, mappings: list[tuple[int, int, int]]) -> int | None:  # noqa: ANN401
    """Where a tensor that torch mapped begins in its file, in bytes.

    From its address, for that is what torch itself would read. The offsets that torch notes under
    FakeTensorMode are sums over the records before, and wrong for a file that was zipped again.
    """
    address = value.data_ptr()
    if value.numel() == 0:
        return 0
    for start, end, offset in mappings:
        if start <= address < end:
            return int(address - start + offset)
    return None


def _word(thing: Any) -> str:  # noqa: ANN401 - a type or a layout
    return str(thing).removeprefix("torch.")


def _why(error: BaseException) -> str:
    """One line; torch's own advice to load with weights_only=False is not passed on."""
    text = str(error)
    code = re.search(r"GLOBAL ([\w.]+)", text)
    if code:
        return f"it asks for {code[1]}, and code in checkpoints is never run"
    if "weights_only" in text or not text.strip():
        return "it is damaged, or holds more than tensors"
    return text.strip().splitlines()[0][:160]


def answer(path: str, rewritten: str) -> dict[str, Any] | str:
    """What the program prints, see above."""
    with warnings.catch_warnings():
        try:
            return _index(path, rewritten)
        except _Refused as refused:
            return str(refused)


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    print("\n" + json.dumps(answer(*sys.argv[2:])))  # a line of its own, whatever torch printed
