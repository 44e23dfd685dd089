"""Medusa-2: the model learns with its heads, through LoRA; self-distilled it is held to itself."""

import math
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from numpy.typing import NDArray
from torch import nn

from medusa_ext.distill.records import Record
from medusa_ext.loading import Checkpoint, LoadError
from medusa_ext.loading.exporting import CALIBRATION_FILE
from medusa_ext.training.accuracy import compute_metrics
from medusa_ext.training.data import Data
from medusa_ext.training.heads import MedusaHeads, heads_config
from medusa_ext.training.loss import Target, cross_entropy, judge
from medusa_ext.training.settings import Settings
from medusa_ext.training.trainer import Sums

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")  # of a model's directory
_OWN = ("config.json", CALIBRATION_FILE)  # not copied, like the index of the weights


class WholeRecords(torch.utils.data.Dataset[Record]):
    """Records as they are; `pad` makes a batch of them."""

    def __init__(self, records: Sequence[Record]) -> None:
        """In their order."""
        self.records = records

    def __len__(self) -> int:
        """Records."""
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        """One of them."""
        return self.records[index]


def token_labels(record: Record, num_heads: int) -> NDArray[np.int64]:
    """[S, 1 + K]: what the model, then each head, is to say at each position; -100 for nothing.

    Position t learns token t + 1 + j from column j, as far as the model wrote all up to there.
    """
    length = len(record.ids)
    labels = np.full((length, 1 + num_heads), -100, np.int64)
    written = np.ones(length, np.bool_)
    for ahead in range(1, min(num_heads + 1, length - 1) + 1):
        written = written[: length - ahead] & record.generated[ahead:]
        labels[: length - ahead, ahead - 1][written] = record.ids[ahead:][written]
    return labels


class Pad:
    """The collator: records of different lengths, padded on the right."""

    def __init__(self, num_heads: int) -> None:
        """K."""
        self.num_heads = num_heads

    def __call__(self, records: Sequence[Record]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask [B, S], labels [B, S, 1 + K]."""
        longest = max(len(record.ids) for record in records)
        ids = torch.zeros((len(records), longest), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        labels = torch.full((len(records), longest, 1 + self.num_heads), -100)
        for row, record in enumerate(records):
            length = len(record.ids)
            ids[row, :length] = torch.from_numpy(record.ids.astype(np.int64))
            mask[row, :length] = 1
            labels[row, :length] = torch.from_numpy(token_labels(record, self.num_heads))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def records_of(data: Data, eval_positions: int) -> tuple[WholeRecords, WholeRecords]:
    """What to learn from; and what was set aside, up to so many positions."""
    held_out, positions = [], 0
    for record, out in zip(data.records, data.held_out, strict=True):
        if out and positions < eval_positions:
            held_out.append(record)
            positions += int(record.generated.sum())
    return WholeRecords(data.learned()), WholeRecords(held_out)


class TunedModel(nn.Module):
    """A model with LoRA, its heads, and the loss of both; what the Trainer sees."""

    def __init__(self, base: Any, heads: MedusaHeads, settings: Settings) -> None:  # noqa: ANN401
        """base: a PeftModel around a causal language model."""
        super().__init__()
        self.base, self.heads, self.settings, self.sums = base, heads, settings, Sums()
        self.progress = 0.0  # share of the steps done; the Trainer keeps it

    def take_sums(self) -> dict[str, float]:
        """Mean losses of the model and of each head since the last call."""
        return self.sums.take()

    def gradient_checkpointing_enable(self, **options: Any) -> None:  # noqa: ANN401
        """Of the model; options are transformers'."""
        self.base.gradient_checkpointing_enable(**options)
        self.base.enable_input_require_grads()

    def activation_checkpointing_enable(self, **options: Any) -> None:  # noqa: ANN401
        """The same, by its name in transformers 5."""
        self.base.activation_checkpointing_enable(**options)
        self.base.enable_input_require_grads()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The loss; without gradients also what is known of each position.

        Arguments as `Pad` makes them.

        Returns:
            loss; in evaluation ranks [B, S, K] of the heads, -1 for none, and base [B, S, 3]:
            cross-entropy of the model, of the original, and KL(original || model), -1 for none.
        """
        learned = labels[..., 0] >= 0
        hidden = self._hidden(input_ids, attention_mask)[learned]
        original = None
        if not self.training or self.settings.method == "self-distill":
            with torch.no_grad(), self.base.disable_adapter():
                original = self._hidden(input_ids, attention_mask)[learned]
        if self.training:
            return {"loss": self._loss(hidden, original, labels[learned])}
        assert original is not None
        ranks, base, loss = self._figures(hidden, original, labels[learned])
        found = {
            "ranks": torch.full_like(labels[..., 1:], -1),
            "base": torch.full((*learned.shape, 3), -1.0, device=labels.device),
        }
        found["ranks"][learned], found["base"][learned] = ranks, base
        return {"loss": loss, **found}

    @property
    def _causal(self) -> Any:  # noqa: ANN401 - a model of transformers
        return self.base.get_base_model()

    def _hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """After the final norm, [B, S, d]."""
        out = self._causal.model(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    def _projection(self) -> torch.Tensor:
        """The model's own lm_head [V, d], frozen."""
        weight: torch.Tensor = self._causal.lm_head.base_layer.weight
        return weight

    def _low_rank(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What LoRA adds to the lm_head's product with x, as two factors."""
        layer = self._causal.lm_head
        (name,) = layer.lora_A
        inner = layer.lora_A[name](layer.lora_dropout[name](x.to(layer.lora_A[name].weight.dtype)))
        return inner * layer.scaling[name], layer.lora_B[name].weight

    def _heads_share(self) -> float:
        share = self.settings.head_share or 0.0
        rises = self.settings.method == "self-distill"
        return share * (math.sin(math.pi / 2 * self.progress) if rises else 1.0)

    def _loss(
        self, hidden: torch.Tensor, original: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        weight = self._projection()
        target = Target(labels[:, 0])
        if original is not None:
            target = Target(teacher=(original, weight))
        scale = torch.full((len(hidden),), 1 / max(len(hidden), 1), device=hidden.device)
        loss, terms = cross_entropy(hidden, weight, target, scale, self._low_rank(hidden))
        self.sums.add([("base_loss", terms.mean())] if len(terms) else [])
        for head, x in enumerate(self.heads(hidden)):
            valid = labels[:, 1 + head] >= 0
            count = int(valid.sum())
            share = self._heads_share() * self.settings.head_decay**head
            scale = torch.full((count,), share / max(count, 1), device=hidden.device)
            x, target = x[valid], Target(labels[valid, 1 + head])
            part, terms = cross_entropy(x, weight, target, scale, self._low_rank(x))
            loss = loss + part
            self.sums.add([(f"head{head}_loss", terms.mean())] if count else [])
        return loss

    def _figures(
        self, hidden: torch.Tensor, original: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of N positions: ranks [N, K], base [N, 3] and the loss."""
        weight, ones = self._projection(), torch.ones(len(hidden), device=hidden.device)
        right, low = Target(labels[:, 0]), self._low_rank(hidden)
        teacher = Target(teacher=(original, weight))
        base = [
            cross_entropy(hidden, weight, right, ones, low)[1],
            cross_entropy(original, weight, right, ones)[1],
            cross_entropy(hidden, weight, teacher, ones, low)[1],
        ]
        ranks = torch.full_like(labels[:, 1:], -1)
        distils = self.settings.method == "self-distill"
        loss = base[2 if distils else 0].mean()
        for head, x in enumerate(self.heads(hidden)):
            valid = labels[:, 1 + head] >= 0
            if valid.any():
                x, label = x[valid], labels[valid, 1 + head]
                ranks[valid, head], terms = judge(x, weight, label, self._low_rank(x))
                share = (self.settings.head_share or 0.0) * self.settings.head_decay**head
                loss = loss + share * terms.mean()
        return ranks, torch.stack(base, -1), loss


def tuned_metrics(prediction: Any) -> dict[str, float]:  # noqa: ANN401 - EvalPrediction
    """For the Trainer: figures of the heads, and of the model beside its original."""
    ranks, base = prediction.predictions
    known = base.reshape(-1, 3)
    known = known[known[:, 0] >= 0]
    means = known.mean(0) if len(known) else np.zeros(3)
    names = ("base_loss", "base_loss_before", "base_kl")
    figures = {name: float(value) for name, value in zip(names, means, strict=True)}
    prediction.predictions = ranks.reshape(-1, ranks.shape[-1])
    return compute_metrics(prediction) | figures


def load_tuned(checkpoint: Checkpoint, heads: MedusaHeads, settings: Settings) -> TunedModel:
    """The base model with LoRA on every linear layer, and its heads.

    Raises:
        LoadError: transformers cannot load the model.
    """
    from peft import LoraConfig, get_peft_model

    causal = _load_causal(checkpoint, settings)
    if causal.config.tie_word_embeddings:
        # LoRA changes the lm_head alone; the embeddings stay what they were.
        causal.lm_head.weight = nn.Parameter(causal.lm_head.weight.detach().clone())
        causal.config.tie_word_embeddings = False
    causal.requires_grad_(False)
    torch.manual_seed(settings.seed)  # LoRA's first factor is drawn
    lora = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=settings.lora_dropout,
        target_modules=[*_LINEARS, "lm_head"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about names in transformers
        return TunedModel(get_peft_model(causal, lora), heads, settings)


def _load_causal(checkpoint: Checkpoint, settings: Settings) -> Any:  # noqa: ANN401 - of transformers
    from transformers import AutoModelForCausalLM

    source = checkpoint.source
    options: dict[str, Any] = {"local_files_only": True}
    folder = source.path
    if source.kind == "gguf":
        folder, options["gguf_file"] = source.path.parent, source.path.name
        try:
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
        except ImportError:  # before transformers 5 it always expands
            pass
    elif source.kind != "directory":
        raise LoadError(f"{source.given} is an exported file; give the model that it was made from")
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    try:
        return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, **options)
    except Exception as error:  # transformers raises whatever the files led it to
        lines = str(error).strip().splitlines() or [repr(error)]
        raise LoadError(f"transformers cannot load {source.given}: {lines[0][:200]}") from error


def save_merged(model: TunedModel, checkpoint: Checkpoint, folder: Path) -> None:
    """Write model and heads as one directory (format D) into an existing folder.

    LoRA is merged into the weights, which are stored in bf16.
    """
    causal = model.base.merge_and_unload()
    state = {name: value.detach().to("cpu") for name, value in causal.state_dict().items()}
    state |= {f"medusa_head.{name}": value for name, value in model.heads.tensors().items()}
    state = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    save_torch_state_dict(state, folder)
    source = checkpoint.source
    if source.kind == "directory":
        for pattern in _COPIED:
            for path in source.path.glob(pattern):
                if not path.name.endswith(".index.json") and path.name not in _OWN:
                    shutil.copyfile(path, folder / path.name)
    else:
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save_pretrained(str(folder))
        text = '{"eos_token_id": ' + str(checkpoint.eos_ids) + "}\n"
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
    config = causal.config
    if hasattr(config, "quantization_config"):  # of the file it came from, which is expanded
        del config.quantization_config
    config.update(heads_config(model.heads) | {"tie_word_embeddings": False})
    config.dtype = torch.bfloat16
    config.save_pretrained(str(folder))
