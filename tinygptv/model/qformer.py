"""Q-Former: learned query tokens that read the image's patch features (BLIP-2, transformers' implementation).

Notation: B images, P patch tokens, V vision width, Q query tokens, F Q-Former width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel


class QFormer(nn.Module):
    """Patch features to Q query features; text branch, language head and word embeddings are not built."""

    def __init__(self, config: Blip2QFormerConfig, num_query_tokens: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, config.hidden_size))
        self.encoder = Blip2QFormerModel(config)

    def forward(self, patch_features: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Summarise patch features.

        Args:
            patch_features: [B, P + 1, V].
            attention_mask: [B, P + 1], 1 where a patch may be read; None reads all.

        Returns:
            Query features [B, Q, F].
        """
        query_embeds = self.query_tokens.expand(patch_features.shape[0], -1, -1)
        output = self.encoder(
            query_embeds=query_embeds,
            encoder_hidden_states=patch_features.to(self.query_tokens.dtype),
            encoder_attention_mask=attention_mask,
        )
        return output.last_hidden_state
