"""Loading: what the user names -> a model in memory, its tokenizer and its Medusa heads.

source (where it lies) -> checkpoint (config, plan of tensors) -> load | export | inspect.
"""

from medusa_ext.loading.checkpoint import Checkpoint, open_checkpoint
from medusa_ext.loading.converting import convert
from medusa_ext.loading.errors import LoadError
from medusa_ext.loading.exporting import export
from medusa_ext.loading.head_rows import HeadVocab, check_head_vocab
from medusa_ext.loading.heads import HeadsInfo
from medusa_ext.loading.inspection import Inspection, describe, inspect
from medusa_ext.loading.load import LoadedModel, load_checkpoint, load_model
from medusa_ext.loading.source import Source, resolve
from medusa_ext.loading.stored import Stored, check_types, weight_bytes

__all__ = [
    "Checkpoint",
    "HeadVocab",
    "HeadsInfo",
    "Inspection",
    "LoadError",
    "LoadedModel",
    "Source",
    "Stored",
    "check_head_vocab",
    "check_types",
    "convert",
    "describe",
    "export",
    "inspect",
    "load_checkpoint",
    "load_model",
    "open_checkpoint",
    "resolve",
    "weight_bytes",
]
