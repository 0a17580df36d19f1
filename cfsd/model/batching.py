"""Rows arranged and padded into batches, and how many tokens fit into a forward pass that holds all logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from cfsd.machine import Machine

SHARE = 0.5  # of the free memory; the rest is for what is not counted here, and for fragments


def tokens_that_fit(model: PreTrainedModel, machine: Machine) -> int:
    """Return how many tokens, padding included, a batch should hold; an out-of-memory halves it anyway.

    On CUDA as many as the free memory takes, at least `machine.micro_batch_tokens`, which decides elsewhere.
    """
    if model.device.type != "cuda":
        return machine.micro_batch_tokens

    free, _ = torch.cuda.mem_get_info(model.device)
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return max(machine.micro_batch_tokens, int(SHARE * (free + unused) / bytes_per_token(model)))


def bytes_per_token(model: PreTrainedModel) -> int:
    """Return an upper estimate of what a token takes in a forward pass without gradients."""
    config: Any = model.config.get_text_config()
    size = model.dtype.itemsize
    logits = config.vocab_size * (size + 8)  # as they come, and twice in float32 on the way to a log-softmax
    block = size * (8 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size))
    return int(logits + block)


def arrange(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return positions grouped so that rows x longest row <= `max_tokens`, at least one row to a group.

    Rows of like length go together, so that little is padding.
    """
    groups: list[list[int]] = []
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for i in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def pad(rows: Sequence[Sequence[int]] | Sequence[Sequence[float]], dtype: torch.dtype = torch.long) -> Tensor:
    """Return rows of numbers as a (B, T) tensor, zeros to the right.

    Zeros to the right need no attention mask: a causal model never looks at them from a real token,
    and the losses count positions by length, never by token id.
    """
    return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)
