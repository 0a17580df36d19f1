"""How fast this machine could run a model if all it did were its matrix products, in float32."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

SQUARES = (512, 1024, 2048)
SECONDS = 0.2  # per product and measurement


class Product(NamedTuple):
    """`rows` x `inner` times `inner` x `columns`."""

    rows: int
    inner: int
    columns: int

    def flops(self) -> float:
        """Return its floating-point operations."""
        return 2.0 * self.rows * self.inner * self.columns


class Limit(NamedTuple):
    """What a forward pass cannot exceed; `product` is the one that reached `gflops` a second."""

    gflops: float
    product: Product
    tokens_per_second: float  # every product at `gflops`
    own_tokens_per_second: float  # every product at its own rate: what this batch's shapes allow


def limit(model: nn.Module, rows: int, *, fixed: bool = False) -> Limit:
    """Measure the model's products over `rows` tokens and large squares, with torch's present number of threads.

    fixed: The weights stay as they are, so that they may lie as suits the product (oneDNN's packed weights): the bound
    is the better one of both ways.
    """
    own = products_of(model, rows)
    squares = [Product(size, size, size) for size in SQUARES]
    seconds = {product: _seconds(product, fixed=fixed) for product in [*own, *squares]}
    best = max(seconds, key=lambda product: product.flops() / seconds[product])
    rate = best.flops() / seconds[best]
    total = sum(seconds[product] * count for product, count in own.items())
    return Limit(rate / 1e9, best, rate / flops_per_token(model), rows / total)


def _seconds(product: Product, *, fixed: bool) -> float:
    rows, inner, columns = product
    x, weight, out = torch.randn(rows, inner), torch.randn(columns, inner), torch.empty(rows, columns)
    # a weight lies as nn.Linear keeps it; the result's memory is there already
    best = _best(lambda: torch.mm(x, weight.t(), out=out))
    if fixed and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        best = min(best, _best(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")))
    return best


def _best(multiply: Callable[[], object]) -> float:
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - started)
    return best


def skeleton(folder: Path) -> nn.Module:
    """Return the model in `folder` without its numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return model


def products_of(model: nn.Module, rows: int) -> Counter[Product]:
    """Return how often each matrix product occurs in a forward pass over `rows` tokens, attention's own left out."""
    return Counter(Product(rows, *reversed(weight.shape)) for weight in _weights(model))


def flops_per_token(model: nn.Module) -> int:
    """Return twice the weights that multiply, the head included and the embedding's look-up not.

    Training takes three times as many. Attention's own products come on top: see `attention_flops`.
    """
    return 2 * sum(weight.numel() for weight in _weights(model))


def training_flops(model: nn.Module) -> tuple[int, int]:
    """Return what a training step takes for each real token, and on top for each token whose loss counts.

    The layers see every token; the head is needed only where there is a loss. Attention's own products are left out.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    total = 3 * flops_per_token(model)
    at_loss = 6 * head.weight.numel()
    return total - at_loss, at_loss


def attention_flops(model: nn.Module, position: int) -> int:
    """Return what attention's own products add for the token that sees `position` others."""
    config: Any = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(4 * position * width * config.num_attention_heads * config.num_hidden_layers)


def _weights(model: nn.Module) -> list[torch.Tensor]:
    owners = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    weights = (getattr(module, "weight", None) for module in owners)
    return [weight for weight in weights if isinstance(weight, torch.Tensor) and weight.dim() == 2]
