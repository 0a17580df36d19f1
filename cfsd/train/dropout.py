"""Dropout of a model in training: whether there is any, and turning it off."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from cfsd.errors import BadInput
from cfsd.model.decoder import decoder_of
from cfsd.model.loading import skeleton
from cfsd.model.undisturbed import mode_kept, seeded
from cfsd.train.spec import TrainSpec

TRIAL = (2, 16)  # rows, tokens


class Place(NamedTuple):
    """Where a probability of dropping something stands."""

    holder: Any
    name: str
    probability: float


def has_dropout(model: PreTrainedModel) -> bool:
    """Say whether training drops anything at random: by a layer, a number that attention reads, or as is tried."""
    return any(True for _ in _of_layers(model)) or _passes_differ(model)


def check_dropout(spec: TrainSpec, *, drops: bool, sharded: bool) -> None:
    """Raise BadInput where a model that drops something cannot be trained so."""
    if drops and sharded:  # a process without rehearsal rows would wait
        raise BadInput(
            "machine.sharding is shard, but the base has dropout, and rehearsal rows pass it apart, without dropout; "
            "set train.dropout to 0, or machine.sharding to replicate"
        )
    if drops and spec.methods.divergence():
        raise BadInput(
            "train.methods.target_divergence compares the model with the base on target rows, which pass with dropout: "
            "the divergence would not be 0 at the base; set train.dropout to 0, and lora.dropout if that is set"
        )


def check_layers_drop(folder: Path, spec: TrainSpec, *, sharded: bool) -> None:
    """Raise BadInput as `check_dropout` by the layers of the model in `folder`; reads no weights.

    Probabilities that a model reads from its config as it goes are found once it is loaded.
    """
    model = skeleton(folder) if spec.dropout is None else None
    check_dropout(spec, drops=model is not None and any(True for _ in _of_layers(model)), sharded=sharded)


def turn_off_dropout(model: PreTrainedModel) -> Callable[[], None]:
    """Set every probability of `model` and of its config to 0; return what puts them back, before it is saved."""
    configs = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    places = [*_of_layers(model), *(place for config in configs.values() for place in _numbers_of(config))]
    for place in places:
        setattr(place.holder, place.name, 0.0)

    def put_back() -> None:
        for place in places:
            setattr(*place)

    return put_back


def _of_layers(model: nn.Module) -> Iterator[Place]:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield Place(module, "p", module.p)
        yield from _numbers_of(module)


def _numbers_of(holder: Any) -> Iterator[Place]:
    for name, value in list(vars(holder).items()):
        if "drop" in name and isinstance(value, float) and value > 0:
            yield Place(holder, name, value)


@torch.no_grad()
def _passes_differ(model: PreTrainedModel) -> bool:
    """Some models read a probability from their config as they go: two passes show it."""
    count = model.config.get_text_config(decoder=True).vocab_size
    token_ids = torch.randint(count, TRIAL, generator=torch.Generator().manual_seed(0)).to(model.device)
    decoder: Any = decoder_of(model)
    with mode_kept(model), seeded(model.device, 0, 0):
        model.train()
        one, two = (decoder(input_ids=token_ids, use_cache=False)[0] for _ in range(2))
    return not torch.equal(one, two)
