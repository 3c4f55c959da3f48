"""An engine whose runner follows a script instead of computing: what is launched, copied and cleared is noted."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from tests.serving_model import make_tokenizer
from tinygptv.inference.engine import Engine
from tinygptv.inference.request import Request
from tinygptv.inference.runner import Drawn
from tinygptv.inference.sampling import SamplingParams, TokenLogprobs

END, WORD = 0, 70
BROKEN = Drawn(0, is_finite=False)


class Runner:
    """Computes nothing: the n-th token of a slot is what the script of its prompt's length says, else ``WORD``."""

    num_slots = 9

    def __init__(self, scripts, num_ahead):
        self.scripts, self.num_ahead = scripts, num_ahead
        self.launches, self.cleared, self.copied, self.admitted = [], [], [], []
        self.tokens, self.params = {}, {}

    def admit(self, slot, params, prompt_ids, num_positions):
        self.admitted.append((slot, prompt_ids.tolist(), num_positions))
        self.params[slot] = params
        self.tokens[slot] = iter(self.scripts.get(num_positions, ()))

    def launch(self, rows, pieces):
        self.launches.append(
            ([(r.slot, r.length) for r in rows], [(p.slot, p.start, p.end, p.is_last) for p in pieces])
        )
        assert all(len(p.inputs_embeds) == p.end - p.start for p in pieces)
        drawn = [self._draw(each.slot) for each in (*rows, *(p for p in pieces if p.is_last))]
        return type("Launch", (), {"read": lambda self: drawn})()

    def _draw(self, slot):
        token = next(self.tokens[slot], WORD)
        return token if isinstance(token, Drawn) else Drawn(token, True, TokenLogprobs(token, -1.0))

    def copy_prefix(self, source, target, length):
        self.copied.append((source, target, length))

    def clear(self, slot):
        self.cleared.append(slot)


def make(model, scripts=None, num_ahead=0, **options):
    engine = Engine(model, make_tokenizer(), runner="flat", **{"max_batch_size": 2, **options})
    engine.runner = Runner(scripts or {}, num_ahead)
    return engine


def request(ids, salt=0, **params):
    ids = np.asarray(ids, dtype=np.int64)
    return Request(ids, torch.zeros(len(ids), 4), SamplingParams(**params), salt)


def prompt(length, start=1):
    """So many ids; prompts of other lengths share no beginning."""
    return (np.arange(length) + start + 7 * length) % 300 + 1


def finish(engine):
    """All deltas by request."""
    found = defaultdict(list)
    while engine.has_work:
        for key, delta in engine.step():
            found[key].append(delta)
    return found
