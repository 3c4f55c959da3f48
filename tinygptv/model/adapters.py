"""Adapters of a whole model: its own LoRA, and those that peft puts on top of it."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from tinygptv.config import TinyGPTVConfig
from tinygptv.model.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers._typing import PeftConfigLike


class AdapterMixin:
    """Adding, merging and freezing adapters of a model with a ``language_model``.

    Attributes:
        config: tells the rank of the model's own adapters; changed when they are added or merged.
    """

    config: TinyGPTVConfig
    language_model: LanguageModel

    def merge_lora(self) -> int:
        """Fold the LoRA adapters into the base weights, in place; returns how many there were."""
        merged = lora_module().merge_lora(self.language_model)
        self.config.lora_rank = 0
        self.config.lora_merged = self.config.lora_merged or merged > 0
        return merged

    @property
    def peft_config(self) -> dict[str, PeftConfigLike]:
        """Adapters of a user by name; set by ``peft.get_peft_model``, absent before."""
        adapters: dict[str, PeftConfigLike] = self._peft_config
        return adapters

    @peft_config.setter
    def peft_config(self, configs: dict[str, PeftConfigLike]) -> None:
        self._peft_config = configs
        # The model's own adapters are part of its weights now, and peft tells nobody when it adds a user's to them.
        self.config.lora_rank, self.config.lora_merged = 0, True
        lora_module().freeze_below_adapters(self)

    @peft_config.deleter
    def peft_config(self) -> None:
        del self._peft_config

    def add_lora(self, rank: int, alpha: int, dropout: float) -> None:
        """Add fresh LoRA adapters to a model that has none, in place; they start as a zero change."""
        if self.config.lora_rank:
            raise ValueError(f"the model already has LoRA adapters of rank {self.config.lora_rank}: merge them first.")
        lora_module().add_lora(self.language_model, rank, alpha, dropout)
        self.config.lora_rank, self.config.lora_alpha, self.config.lora_dropout = rank, alpha, dropout

    def set_lora_dropout(self, dropout: float) -> None:
        """Change the dropout on the adapters' input while training, in place."""
        lora_module().set_lora_dropout(self.language_model, dropout)
        self.config.lora_dropout = dropout


def lora_module() -> ModuleType:
    """The module of adapters; it imports peft, which takes 60 MB with bitsandbytes."""
    from tinygptv.model import lora

    return lora
