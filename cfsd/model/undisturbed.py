"""Measuring that changes nothing else: random states and a model's mode are restored afterwards."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def seeded(device: torch.device, python_seed: int, other_seed: int) -> Iterator[None]:
    """Seed Python's random numbers, numpy's and torch's; put all their states back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        random.seed(python_seed)
        np.random.seed(other_seed)
        torch.manual_seed(other_seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def mode_kept(model: nn.Module) -> Iterator[None]:
    """Put the model back into the mode that it was in, training or evaluation."""
    was_training = model.training
    try:
        yield
    finally:
        model.train(was_training)
