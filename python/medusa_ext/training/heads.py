"""Medusa heads as a torch module, and their files (formats B and C of the loader)."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from medusa_ext.loading import Checkpoint, LoadError
from medusa_ext.loading.heads import open_heads
from medusa_ext.loading.plan import Entry
from medusa_ext.training.files import write_tensors


class MedusaHeads(nn.Module):
    """K heads of L blocks u + SiLU(A u + b); `own` gives each a projection [V, d] of its own."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_layers: int, own: torch.Tensor | None = None
    ) -> None:
        """Blocks are zero, so that a head first repeats what the model itself says; own [V, d]."""
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(num_layers))
            for _ in range(num_heads)
        )
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        copies = [] if own is None else [own.float().clone() for _ in range(num_heads)]
        self.projections = nn.ParameterList(copies)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(list(self.layers(0)))

    def layers(self, head: int) -> Iterator[nn.Linear]:
        """The blocks of a head."""
        blocks = self.blocks[head]
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            assert isinstance(block, nn.Linear)
            yield block

    def forward(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """[..., d] -> what each head's projection reads, [..., d] f32."""
        outputs = []
        for head in range(len(self.blocks)):
            u = hidden.float()
            for block in self.layers(head):
                u = u + nn.functional.silu(block(u))
            outputs.append(u)
        return outputs

    def tensors(self) -> dict[str, torch.Tensor]:
        """Names of formats A to D, in bf16."""
        state = {}
        for head in range(len(self.blocks)):
            for layer, block in enumerate(self.layers(head)):
                state[f"{head}.{layer}.linear.weight"] = block.weight
                state[f"{head}.{layer}.linear.bias"] = block.bias
        for head, weight in enumerate(self.projections):
            state[f"{head}.{self.num_layers}.weight"] = weight
        return {name: value.detach().to("cpu", torch.bfloat16) for name, value in state.items()}

    def save(self, folder: Path, model: str) -> None:
        """Write medusa_lm_head.safetensors and config.json into an existing folder.

        Format C where the heads share the model's lm_head, else B.
        """
        write_tensors(folder / "medusa_lm_head.safetensors", self.tensors())
        config = heads_config(self) | {"base_model_name_or_path": model}
        if not len(self.projections):
            config["version"] = "2"
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def heads_config(heads: MedusaHeads) -> dict[str, object]:
    """Keys that config.json has for heads."""
    return {"medusa_num_heads": len(heads.blocks), "medusa_num_layers": heads.num_layers}


def lm_head(checkpoint: Checkpoint) -> torch.Tensor:
    """The model's own projection [V, d] in bf16, as the engine has it."""
    name = "embed_tokens.weight" if checkpoint.config["tied_embeddings"] else "lm_head.weight"
    entry = next(entry for entry in checkpoint.entries if entry.name == name)
    return read_entry(entry)


def read_entry(entry: Entry) -> torch.Tensor:
    """The values of a tensor in bf16."""
    array, stored = entry.read("bf16")
    if stored == "bf16":
        return torch.from_numpy(array.copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, np.float32)).to(torch.bfloat16)


def new_heads(
    checkpoint: Checkpoint,
    num_heads: int,
    num_layers: int,
    *,
    own_lm_head: bool = False,
    start: Path | None = None,
) -> MedusaHeads:
    """Heads to train: zero blocks, or those of a folder.

    Args:
        checkpoint: the model they are for.
        num_heads: K.
        num_layers: L.
        own_lm_head: each head trains a projection of its own, a copy of the model's at first.
        start: heads in any format; further heads begin as copies of its last one, further layers
            as zero.

    Raises:
        LoadError: `start` holds no heads, more than are wanted, or projections of its own where
            none are wanted.
    """
    own = lm_head(checkpoint) if own_lm_head else None
    heads = MedusaHeads(checkpoint.config["hidden_size"], num_heads, num_layers, own)
    if start is None:
        return heads
    found = open_heads(start, checkpoint.config)
    info = found.info
    if info.num_heads > num_heads or info.num_layers > num_layers:
        raise LoadError(
            f"{start} holds {info.num_heads} heads of {info.num_layers} layers; wanted at most "
            f"{num_heads} of {num_layers}: raise --num-heads and --head-layers"
        )
    if not info.shared_lm_head and not own_lm_head:
        raise LoadError(
            f"{start}: these heads have projections of their own; go on with --own-lm-head"
        )
    if not info.shared_lm_head and info.head_vocab != checkpoint.config["vocab_size"]:
        raise LoadError(f"{start}: these heads guess {info.head_vocab} tokens, not all; start anew")
    _copy(heads, {entry.name: read_entry(entry) for entry in found.entries}, info.num_heads)
    return heads


def _copy(heads: MedusaHeads, state: dict[str, torch.Tensor], num_stored: int) -> None:
    with torch.no_grad():
        for head in range(len(heads.blocks)):
            source = min(head, num_stored - 1)
            for layer, block in enumerate(heads.layers(head)):
                if f"heads.{source}.{layer}.weight" in state:
                    block.weight.copy_(state[f"heads.{source}.{layer}.weight"])
                    block.bias.copy_(state[f"heads.{source}.{layer}.bias"])
            if f"heads.{source}.lm_head.weight" in state:
                heads.projections[head].copy_(state[f"heads.{source}.lm_head.weight"])
