"""What a run is made of: all that changes the result, for the model card and for resume."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

METHODS = ("medusa1", "medusa2", "self-distill")


@dataclass(frozen=True)
class Settings:
    """Settings of a run; `None` is the method's own default (see `with_defaults`).

    Attributes:
        method: "medusa1" (heads alone), "medusa2" (heads, then the model with them through LoRA),
            "self-distill" (both together, the model held to what it said before).
        num_heads: K.
        head_layers: L.
        own_lm_head: each head trains a projection [V, d] of its own.
        head_decay: weight of head k's loss is head_decay**k.
        batch_size: positions of a batch (medusa1) or records (the others), on each process.
        accumulate: batches of one step of the optimizer.
        epochs: passes over the data; max_steps wins where it is given.
        learning_rate: of the heads for medusa1, of LoRA for the others, whose heads have four
            times as much.
        warmup: steps.
        weight_decay: of matrices, as AdamW has it.
        loss_vocab: learn to choose among this many of the data's most frequent tokens; 0: all.
        soft_share: of the base model's own distribution in what heads are to predict, in [0, 1].
        soft_top_k: its tokens that are kept.
        run_length: neighbouring positions that stay together in a batch, so that the base model's
            distributions there serve all heads.
        lora_rank, lora_alpha, lora_dropout: of peft's LoRA on every linear layer and lm_head.
        head_share: lambda0, of the heads' loss beside the model's own.
        heads_epochs: of the first stage of medusa2, the heads alone.
        seed: of order and dropout.
        precision: of products: "bf16" or "f32"; weights and sums are f32.
    """

    method: str = "medusa1"
    num_heads: int = 4
    head_layers: int = 1
    own_lm_head: bool = False
    head_decay: float = 0.8
    batch_size: int | None = None
    accumulate: int | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float | None = None
    warmup: int | None = None
    weight_decay: float = 0.0
    loss_vocab: int = 0
    soft_share: float = 0.0
    soft_top_k: int = 64
    run_length: int | None = None
    lora_rank: int = 32
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    head_share: float | None = None
    heads_epochs: float = 1.0
    held_out: float = 0.02
    max_length: int | None = None
    seed: int = 0
    precision: str = "bf16"

    def with_defaults(self) -> Settings:
        """The same with every None decided, but for max_steps and max_length; all checked.

        Raises:
            ValueError: a setting is impossible.
        """
        self._check()
        first = self.method == "medusa1"
        distils = self.method == "self-distill"
        chosen = {
            "batch_size": 1024 if first else 8,
            "accumulate": 1 if first else 16 if distils else 8,
            "learning_rate": 1e-3 if first else 1e-4 if distils else 5e-4,
            "warmup": 20 if distils else 40,
            "run_length": 32 if self.soft_share else 1,
            "head_share": 0.01 if distils else 0.2,
        }
        values = asdict(self)
        return Settings(**values | {k: v for k, v in chosen.items() if values[k] is None})

    def _check(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; wanted one of {', '.join(METHODS)}")
        if self.precision not in ("bf16", "f32"):
            raise ValueError(f"precision is {self.precision!r}; wanted bf16 or f32")
        at_least: dict[str, float] = {
            "num_heads": 1, "head_layers": 0, "batch_size": 1, "accumulate": 1, "max_steps": 1,
            "warmup": 0, "weight_decay": 0, "loss_vocab": 0, "soft_share": 0, "soft_top_k": 1,
            "run_length": 1, "lora_rank": 1, "head_share": 0, "heads_epochs": 0, "seed": 0,
            "max_length": 3,
        }  # fmt: skip
        above = ("head_decay", "epochs", "learning_rate", "lora_alpha", "held_out")
        at_most = {"soft_share": 1, "num_heads": 64, "head_layers": 64, "head_decay": 1}
        for name, least in at_least.items():
            self._refuse(name, lambda value, least=least: value >= least, f"{least} or more")
        for name in above:
            self._refuse(name, lambda value: value > 0, "more than 0")
        for name, most in at_most.items():
            self._refuse(name, lambda value, most=most: value <= most, f"{most} or less")
        for name in ("held_out", "lora_dropout"):
            self._refuse(name, lambda value: 0 <= value < 1, "from 0 to below 1")
        if self.head_layers == 0 and not self.own_lm_head:
            raise ValueError(
                "head_layers is 0, which leaves nothing to train in heads that share the model's "
                "lm_head; give 1 or more, or own_lm_head"
            )
        if self.method != "medusa1" and (self.soft_share or self.loss_vocab or self.own_lm_head):
            raise ValueError(
                "soft_share, loss_vocab and own_lm_head are for the method medusa1; "
                f"leave them out with {self.method}"
            )

    def _refuse(self, name: str, allowed: Any, wanted: str) -> None:  # noqa: ANN401 - a predicate
        value = getattr(self, name)
        if value is not None and not (math.isfinite(value) and allowed(value)):
            raise ValueError(f"{name} is {value}; wanted {wanted}")
