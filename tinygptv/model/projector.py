"""Projector: two linear layers without a nonlinearity between them, 768 -> 4096 -> 2560 at the paper's size.

The first has the shape of MiniGPT-4's projection to Vicuna-7B, so that one can be loaded as a start (paper section
3.1).
"""

from __future__ import annotations

from torch import Tensor, nn

from tinygptv.model.language_model import matrix_input


class Projector(nn.Module):
    """Query features [B, Q, F] to image embeddings [B, Q, D] of the language model's width."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(input_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, output_size)

    def forward(self, query_features: Tensor) -> Tensor:
        """Project [B, Q, F] to [B, Q, D]; the input is cast to the projector's dtype."""
        return self.linear_2(self.linear_1(matrix_input(query_features, self.linear_1)))
