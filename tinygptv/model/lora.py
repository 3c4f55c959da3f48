"""LoRA adapters on the language model: added by peft, part of the model's own state, merged on demand.

The adapters live inside the model (not in a wrapper), so that a checkpoint folder is one state dict and
``from_pretrained`` rebuilds it from ``config.lora_rank`` alone. Paper section 3.2; the release's peft settings.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from tinygptv.config import LORA_TARGETS

ADAPTER_NAME = "default"


class AdaptedLinear(lora.Linear):
    """peft's LoRA layer with a forward that is nothing but its formula: one adapter, no copies between dtypes.

    Under autocast peft casts the input to the adapter's float32, which autocast casts back at once.

    Attributes:
        is_own: the adapter belongs to the model. Where peft puts adapters of a user on top (``get_peft_model``), it is
            added to the base weight first: peft would replace an adapter of the same name, and switch off any other.
    """

    is_own = False

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter."""
        self._merge_own()
        super().update_layer(adapter_name, *args, **kwargs)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the adapters that are used; peft calls it whenever it has added some, on every layer."""
        self._merge_own()
        super().set_adapter(adapter_names, inference_mode)

    def _merge_own(self) -> None:
        if self.is_own:
            self.is_own = False
            self.merge(safe_merge=True)
            self.merged_adapters.clear()
            self.delete_adapter(ADAPTER_NAME)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``base(x) + B(scale * A(dropout(x)))``: scaled where it is narrow, so that no wide gradient is copied."""
        if kwargs or not self.is_adapted:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.adapter[0].weight.dtype)
        return self._add_update(result, self.lora_dropout[ADAPTER_NAME](x))

    @property
    def is_adapted(self) -> bool:
        """Whether this model's adapter, and no other, is added in ``forward``."""
        return self.is_own and not self.disable_adapters and not self.merged

    @property
    def input_dropout(self) -> float:
        """Dropout on the adapter's input, 0 outside training."""
        dropout = self.lora_dropout[ADAPTER_NAME]
        return dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0

    @property
    def adapter(self) -> tuple[nn.Linear, nn.Linear]:
        """A and B."""
        return cast(nn.Linear, self.lora_A[ADAPTER_NAME]), cast(nn.Linear, self.lora_B[ADAPTER_NAME])

    @property
    def scale(self) -> float:
        """Factor of the adapter's product."""
        return self.scaling[ADAPTER_NAME]

    def forward_dropped(self, x: Tensor, dropped: Tensor) -> Tensor:
        """``forward`` of an adapted layer under autocast, where the caller has dropped from the adapter's input.

        Args:
            x: input of the frozen matrix.
            dropped: input of the adapter.
        """
        return self._add_update(self.base_layer(x), dropped)

    def _add_update(self, result: Tensor, dropped: Tensor) -> Tensor:
        down, up = self.adapter
        return (result + up(down(dropped) * self.scale)).to(result.dtype)


def add_lora(language_model: nn.Module, rank: int, alpha: int, dropout: float) -> None:
    """Put a LoRA adapter beside every fused q/k/v and output projection, in place.

    Args:
        language_model: a ``LanguageModel``; its own weights stay as they are.
        rank: columns of A, rows of B.
        alpha: scale numerator; the adapter's output is multiplied by ``alpha / rank``.
        dropout: dropout on the adapter's input while training.

    Raises:
        ValueError: the rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"lora_rank is {rank}; a LoRA adapter needs a rank of at least 1 (0 means: do not add one).")
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(LORA_TARGETS), bias="none")
    config._register_custom_module({nn.Linear: AdaptedLinear})
    trainable = {name for name, parameter in language_model.named_parameters() if parameter.requires_grad}
    inject_adapter_in_model(config, language_model, adapter_name=ADAPTER_NAME)
    # peft freezes everything else; which parameters train is the stage's business, so put that back.
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.replace("base_layer.", "") in trainable)
    for module in language_model.modules():
        if isinstance(module, AdaptedLinear):
            module.is_own = True


def freeze_below_adapters(model: nn.Module) -> None:
    """Freeze everything but peft's adapters, in place.

    ``get_peft_model`` does so itself, except on a model that has adapters already.
    """
    adapters = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for name, parameter in module.named_parameters()
        if not name.startswith(("base_layer.", "original_module."))
    }
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)


def set_lora_dropout(language_model: nn.Module, dropout: float) -> None:
    """Change the dropout on the adapters' input, in place; no weight changes."""
    for module in language_model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout[ADAPTER_NAME] = nn.Dropout(dropout) if dropout else nn.Identity()


def merge_lora(language_model: nn.Module) -> int:
    """Add every adapter's product to its base weight and remove the adapters, in place.

    Returns:
        Number of adapters merged.
    """
    merged = 0
    for name, module in list(language_model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent_name, _, child_name = name.rpartition(".")
            setattr(language_model.get_submodule(parent_name), child_name, module.get_base_layer())
            merged += 1
    return merged


@torch.no_grad()
def reset_lora(language_model: nn.Module) -> None:
    """Initialise the adapters: A Kaiming-uniform, B zero, so that they change nothing."""
    for module in language_model.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters(ADAPTER_NAME, init_lora_weights=True)
