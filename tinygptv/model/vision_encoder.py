"""Vision encoder: EVA ViT-g as BLIP-2 built it, from timm's blocks, followed by one LayerNorm (``ln_vision``).

Notation: B images, R image side in pixels, P patch tokens, V vision width.
Source: upstream release, ``eva_vit_g.pth`` and ``ln_vision`` of BLIP-2.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from tinygptv.config import EvaVisionConfig


class _Eva(Eva):
    """timm's EVA; on the meta device nothing is initialised, where it would cost 0.2 s at 39 blocks for nothing."""

    def init_weights(self, needs_reset: bool = True) -> None:
        if not self.patch_embed.proj.weight.is_meta:
            super().init_weights(needs_reset)


class VisionEncoder(nn.Module):
    """Pixels to patch features; the class token stays first and is passed on.

    The ViT has no final norm, pooling or head: its output is the last block's, normalised by ``ln_vision``.
    """

    def __init__(self, config: EvaVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = _Eva(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            # timm multiplies and truncates: the half keeps int() from falling one below the wanted width.
            mlp_ratio=(config.intermediate_size + 0.5) / config.hidden_size,
            norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
            num_classes=0,
            global_pool="",
            use_post_transformer_norm=False,
            use_fc_norm=False,
        )
        self.ln_vision = nn.LayerNorm(config.hidden_size, eps=config.output_layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: [B, 3, R, R], normalised as by ``TinyGPTVImageProcessor``.

        Returns:
            Patch features [B, P + 1, V], class token first.

        Raises:
            ValueError: the images are not [3, R, R] for the R that the encoder was built for.
        """
        side = self.config.image_size
        if tuple(pixel_values.shape[1:]) != (3, side, side):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)} but this vision encoder takes "
                f"[N, 3, {side}, {side}]: process images at size {side}, or call model.set_image_size()."
            )
        for block in self.vit.blocks:
            # timm reads this weight past the layer. Where it is offloaded or packed (bitsandbytes), or has an adapter
            # (peft), only the layer itself can compute with it.
            qkv = block.attn.qkv
            if type(qkv) is not nn.Linear or qkv.weight.is_meta:
                block.attn.qkv_bias_separate = True
        patch_features_BPV = self.vit(pixel_values.to(self.vit.patch_embed.proj.weight.dtype))
        return self.ln_vision(patch_features_BPV.to(self.ln_vision.weight.dtype))

    def set_image_size(self, image_size: int) -> None:
        """Change R in place, resampling the position embedding as the release does between stages 3 and 4."""
        if image_size % self.config.patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {self.config.patch_size}.")
        if image_size == self.config.image_size:
            return
        grid = image_size // self.config.patch_size
        resampled = interpolate_position_embedding(self.vit.pos_embed.data, grid)
        trainable = self.vit.pos_embed.requires_grad
        self.vit.pos_embed = nn.Parameter(resampled.to(self.vit.pos_embed.dtype), requires_grad=trainable)
        self.vit.patch_embed.img_size = (image_size, image_size)
        self.vit.patch_embed.grid_size = (grid, grid)
        self.vit.patch_embed.num_patches = grid * grid
        self.config.image_size = image_size


def interpolate_position_embedding(position_embedding: Tensor, grid: int) -> Tensor:
    """Resample a learned position embedding to another patch grid (bicubic, corners not aligned, no antialiasing).

    Args:
        position_embedding: [1, P + 1, V] for a square grid, class token first.
        grid: patches per side wanted.

    Returns:
        [1, grid * grid + 1, V] in float32; the class token's row is unchanged.
    """
    class_row, patch_rows = position_embedding[:, :1].float(), position_embedding[:, 1:].float()
    side = round(patch_rows.shape[1] ** 0.5)
    if side * side != patch_rows.shape[1]:
        raise ValueError(f"a position embedding of {patch_rows.shape[1]} patches is no square grid.")
    if side == grid:
        return position_embedding.float()
    plane = patch_rows.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, V, side, side]
    plane = nn.functional.interpolate(plane, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([class_row, plane.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
