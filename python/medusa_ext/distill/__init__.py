"""Training data from the model itself: its own answers to given prompts or to its own."""

from __future__ import annotations

from medusa_ext.distill.compose import Recipe, remake, seed_of
from medusa_ext.distill.prompts import Prompt, Prompts, read_prompts
from medusa_ext.distill.run import Progress, check_goals, distill

__all__ = [
    "Progress",
    "Prompt",
    "Prompts",
    "Recipe",
    "check_goals",
    "distill",
    "read_prompts",
    "remake",
    "seed_of",
]
