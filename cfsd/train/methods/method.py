"""Method: settings of one way to hold a model near its base, and what it declares to the training."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import reduce
from operator import mul
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from cfsd.spec import Spec


class Estimate(Spec):
    """Settings of what is measured before the training: a number for each weight of the base, from its own text."""

    noun: ClassVar[str]  # what is measured, for messages

    rows: PositiveInt = Field(256, description="Context-free rows of the corpus")


class Pull(NamedTuple):
    """A quadratic penalty: scale x sum of c (theta - theta*)^2 over the trained parameters, theta* the base's."""

    scale: float
    figure: Callable[[float], float]  # what people look at, as a function of the sum without the scale
    curvature: Estimate | None = None  # what gives each weight's c; None: c is 1

    def copies(self) -> int:
        """Return how many tensors of the size of all trained weights it holds in memory."""
        return 1 if self.curvature is None else 2


class TrainedAdapter(NamedTuple):
    """What PEFT trains beside the base's weights in place of them, and adds to them at the end."""

    kind: Literal["lora", "osf"]
    settings: dict[str, Any]  # of PEFT's config, by its own names
    targets: tuple[str, ...] = ()  # names of layers, or of experts' weights; empty: all linear ones but the head
    parameters: tuple[str, ...] = ()  # names of experts' weights on top of those
    rank: int = 0  # of what is added; 0: the layer's smaller side without its share `preserved`
    preserved: float = 0.0
    quantise: str | None = None  # the number format that the base's layers are held in meanwhile

    def halves(self, bfloat16: bool) -> bool:
        """Say whether the frozen layers are held in bfloat16 where they are computed in it.

        DoRA adds to them before the product, so it reads their float32; OSFT takes them apart.
        """
        return bfloat16 and self.kind == "lora" and not self.quantise and not self.settings["use_dora"]

    def keeps_the_base(self) -> bool:
        """Say whether the base's weights stay in the trained model as they are, so that it is its own reference."""
        return self.kind == "lora"

    def rank_at(self, smaller: int) -> int:
        """Return the rank beside a matrix whose smaller side is `smaller`."""
        return self.rank or smaller - int(smaller * self.preserved)


class TargetTokens(Protocol):
    """What the model, as it is now, says of some tokens of the target: arrays with an entry for each."""

    @property
    def probability(self) -> Any:
        """What the model gives to the token."""

    def entropy(self, likeliest: int) -> Any:
        """Return the entropy of the `likeliest` tokens' distribution, renormalised, in nats."""


class Weigh(NamedTuple):
    """What becomes of -log p at each token of the target's responses.

    `factor` multiplies it at each step, and is not differentiated; `learned` says once, from the base's -log p in nats,
    which tokens are in the loss at all.
    """

    factor: Callable[[TargetTokens], Any] | None = None
    learned: Callable[[Any], Any] | None = None


class AlongSpec(Spec):
    """What is stored of the base's distribution at each token of the target's responses."""

    top_logprobs: PositiveInt = Field(64, description="Likeliest tokens")
    tail_samples: PositiveInt = Field(16, description="Samples of the other tokens, which stand for them")


class TargetDivergence(NamedTuple):
    """weight x KL(base || model) at each token of the target's responses, on top of its loss there."""

    weight: float
    stored: AlongSpec | None  # None: the base is in memory


class Method(Spec, ABC):
    """A method says whether it is on, and what it declares; the training asks for nothing else."""

    strength: ClassVar[str]  # the setting that people look at; at 0 the method is off
    unsharded: ClassVar[str | None] = None  # why its weights cannot be sharded; None: they can

    @abstractmethod
    def is_on(self) -> bool:
        """Say whether the settings ask for anything."""

    def unread(self) -> dict[str, str]:
        """Return what has no effect while the method is off: all but its strength."""
        others = type(self).model_fields.keys() - {self.strength}
        return {} if self.is_on() else dict.fromkeys(others, self.strength)

    def pull(self) -> Pull | None:
        """Return what is added to the gradient of every global batch."""
        return None

    def adapter(self) -> TrainedAdapter | None:
        """Return what is trained in place of the base's weights."""
        return None

    def weigh(self) -> Weigh | None:
        """Return what the loss of each of the target's tokens is multiplied by."""
        return None

    def divergence(self) -> TargetDivergence | None:
        """Return what is added to the loss of each of the target's tokens."""
        return None


class MethodSet(Spec):
    """Methods by field. Penalties add up, weights of tokens multiply; a method that is off is in no key."""

    @field_validator("*")
    @classmethod
    def _off_is_neutral(cls, method: Method) -> Method:
        """Take what is off as nothing given."""
        return method if method.is_on() else type(method)()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        on = self.by_name()
        held, added = list(self.pulls()), [name for name, method in on.items() if method.adapter()]
        if held and added:
            raise ValueError(
                f"methods {' and '.join(held)} with {' and '.join(added)}: {held[0]} holds the base's weights, which "
                f"{added[0]} does not train; {self._advice(held[0], added[0])}"
            )
        if len(added) > 1:
            raise ValueError(f"methods {' and '.join(added)} both train other weights; {self._advice(*added)}")
        measured = {name: pull.curvature for name, pull in self.pulls().items() if pull.curvature}
        if len(set(measured.values())) > 1:
            raise ValueError(f"methods {' and '.join(measured)} need different estimates; {self._advice(*measured)}")
        return self

    def _advice(self, *names: str) -> str:
        settings = (f"{name}.{getattr(self, name).strength}=0" for name in names)
        return f"turn one of them off, such as {' or '.join(settings)}"

    def by_name(self) -> dict[str, Method]:
        """Return the methods that are on, in the order of the fields."""
        methods = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: method for name, method in methods.items() if method.is_on()}

    def pulls(self) -> dict[str, Pull]:
        """Return the penalties of the methods that are on."""
        return {name: pull for name, method in self.by_name().items() if (pull := method.pull())}

    def adapter(self) -> TrainedAdapter | None:
        """Return what is trained in place of the base's weights; None: they are trained themselves."""
        return next(iter(self.adapters().values()), None)

    def adapters(self) -> dict[str, TrainedAdapter]:
        """Return that by the name of the method, of which there is one at most."""
        return {name: adapter for name, method in self.by_name().items() if (adapter := method.adapter())}

    def divergence(self) -> TargetDivergence | None:
        """Return the divergence on the target's rows, if there is one."""
        return next((found for method in self.by_name().values() if (found := method.divergence())), None)

    def factor(self) -> Callable[[TargetTokens], Any] | None:
        """Return the product of what the losses of the target's tokens are multiplied by, None without any."""
        return _product([weigh.factor for weigh in self._weighs() if weigh.factor])

    def learned(self) -> Callable[[Any], Any] | None:
        """Return what says by the base's losses which tokens of the target are learned, None: all of them."""
        return _product([weigh.learned for weigh in self._weighs() if weigh.learned])

    def _weighs(self) -> list[Weigh]:
        return [weigh for method in self.by_name().values() if (weigh := method.weigh())]

    def estimate(self) -> Estimate | None:
        """Return what the methods need measured on the base before the training."""
        return next((pull.curvature for pull in self.pulls().values() if pull.curvature), None)

    def _identity(self) -> dict[str, Any]:
        return {name: method.digest() for name, method in self.by_name().items()}


def _product(factors: list[Callable[[Any], Any]]) -> Callable[[Any], Any] | None:
    return (lambda tokens: reduce(mul, (factor(tokens) for factor in factors))) if factors else None
