"""A model that only records what a training step asks of it, for tests of the step's calls."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from tests.training_batches import make_sample
from tinygptv.data.collate import collate
from tinygptv.training import train_step
from tinygptv.training.train_step import TrainStep


class RecordingModel(nn.Module):
    """The loss of a token is its id times a weight; what the step passes is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(1, 2)
        self.lm_head = nn.Linear(1, 1).requires_grad_(False)
        self.qformer = SimpleNamespace(query_tokens=torch.zeros(1))
        vision = SimpleNamespace(num_patches=train_step.MOST_PATCHES // 2 - 1)
        self.config = SimpleNamespace(image_token_id=256, vision_config=vision)
        self.device = torch.device("cpu")
        self.encoded: list[tuple[int, bool, torch.dtype]] = []
        nn.init.ones_(self.projector.weight)
        nn.init.zeros_(self.projector.bias)

    def encode_query_features(self, pixel_values):
        self.encoded.append((len(pixel_values), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return pixel_values.mean(dim=(1, 2, 3)).view(-1, 1, 1)

    def embed(self, ids, **options):
        self.embedded = (ids, options, torch.is_autocast_enabled("cpu"))
        return torch.zeros(*ids.shape, 4)

    def token_losses(self, inputs_embeds, positions, ids, **options):
        self.scored = (inputs_embeds, positions, ids, options, torch.is_autocast_enabled("cpu"))
        return self.projector.weight.sum() * ids.float()


def recording_step(model=None, num_sources=2, **options):
    model = model or RecordingModel()
    groups = [{"params": [parameter]} for parameter in model.projector.parameters()]
    return TrainStep(model, torch.optim.SGD(groups, lr=1.0), num_sources=num_sources, **options)


def batch_of(*answers, image=False):
    return collate([make_sample(answer, image=image) for answer in answers], 0)
