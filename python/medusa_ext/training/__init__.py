"""Training Medusa heads, on transformers' Trainer. Needs the extra `train`; inference never does.

data (records) -> hidden_cache (hidden states) -> medusa1 | medusa2 -> heads (files) -> report.
"""

import importlib.util

_PACKAGES = ("torch", "accelerate", "peft", "matplotlib")


def require_packages() -> None:
    """Refuse to start where a package of the extra `train` is missing.

    Raises:
        ImportError: which one, and how to install it.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"training needs {', '.join(missing)}; install what it needs with: "
            'pip install "medusa_ext[train]"'
        )
