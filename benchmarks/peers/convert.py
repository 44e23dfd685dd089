"""A .gguf file in the form of CTranslate2: `python -m benchmarks.peers.convert MODEL FOLDER`."""

import shutil
import sys
from pathlib import Path

from ctranslate2.converters import TransformersConverter
from transformers import AutoTokenizer

from benchmarks.peers.contestants import load_torch_model


def convert(model: Path, folder: Path) -> None:
    """Write FOLDER/checkpoint, which transformers reads, and from it FOLDER/model in 8 bits."""
    checkpoint = folder / "checkpoint"
    load_torch_model(model).save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(checkpoint)
    TransformersConverter(str(checkpoint)).convert(str(folder / "model"), quantization="int8")
    shutil.rmtree(checkpoint)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
