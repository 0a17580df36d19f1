"""How many tokens fit into one forward pass whose logits are all kept, as lm-eval keeps them."""

from typing import Any

from transformers import PreTrainedModel

from cfsd.machine import Machine

SHARE = 0.5  # of the free memory; the rest is for what is not counted here, and for fragments


def tokens_that_fit(model: PreTrainedModel, machine: Machine) -> int:
    """Return how many tokens, padding included, a batch should hold; an out-of-memory halves it anyway.

    On CUDA as many as the free memory takes, at least `machine.micro_batch_tokens`, which decides elsewhere.
    """
    if model.device.type != "cuda":
        return machine.micro_batch_tokens
    import torch

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
