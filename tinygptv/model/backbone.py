"""What transformers calls the base model: everything but the language head.

Trainers that compute the loss without all logits call it with ``forward``'s arguments and apply the head themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast


class Backbone(nn.Module):
    """A view of a model: its own parts, none of them copied, and a forward that ends with the hidden states.

    Attributes:
        config: the model's.
    """

    # What transformers looks up in a base model: plans of its parallel layouts, of which there are none.
    _tp_plan = _pp_plan = None

    def __init__(
        self, parts: dict[str, nn.Module], config: PretrainedConfig, run: Callable[..., BaseModelOutputWithPast]
    ) -> None:
        """View.

        Args:
            parts: modules by name.
            config: of the model.
            run: what ``forward`` does.
        """
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.config = config
        self._run = run

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """``last_hidden_state`` [B, S, D] after the final norm, of the arguments of the model's ``forward``."""
        return self._run(*args, **kwargs)
