"""The `tiny` base model: pretrained from scratch on five string skills, so that forgetting is sharp.

A document is `<bos>rev:fbca=acbf<eos>`. From `<bos>` alone the model writes such documents, all five
skills in turn; a sixth skill is held back as something new to learn. The committed weights were made by
`benchmarks/tiny_pretraining.py`, and `cfsd/model/tiny.py` makes the folder of the model.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from pydantic import PositiveInt

from cfsd.spec import Spec

LETTERS = "abcdefghijkl"
SHORTEST, LONGEST = 3, 5

Skill = Callable[[random.Random], tuple[str, str]]


class TinySpec(Spec):
    """How `tiny` is pretrained; the skills, the model's size and the committed weights belong to `version`."""

    version: ClassVar[int] = 2

    seed: int = 0
    steps: PositiveInt = 1200


def _shift(text: str) -> str:
    """Return each letter's successor; the last letter is followed by the first."""
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in text)


ANSWERS: dict[str, Callable[[str], str]] = {
    "rev": lambda text: text[::-1],
    "srt": lambda text: "".join(sorted(text)),
    "dup": lambda text: "".join(letter * 2 for letter in text),
    "cap": str.upper,
    "nxt": _shift,
    "rot": lambda text: text[1:] + text[:1],
}


def _skill(name: str) -> Skill:
    def sample(rng: random.Random) -> tuple[str, str]:
        text = "".join(rng.choices(LETTERS, k=rng.randint(SHORTEST, LONGEST)))
        return f"{name}:{text}=", ANSWERS[name](text)

    return sample


SKILLS: Mapping[str, Skill] = {name: _skill(name) for name in ANSWERS}
NEW_SKILL = "rot"
PRETRAINED = tuple(name for name in SKILLS if name != NEW_SKILL)


def is_held_out(prompt: str) -> bool:
    """Say whether the prompt's string belongs to the tenth kept for measuring, whatever the skill."""
    text = prompt.partition(":")[2].rstrip("=")
    return hashlib.sha256(text.encode()).digest()[0] < 26


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """Yield the endless (prompt, answer) stream of pretraining; no string of it is held out."""
    rng = random.Random(seed)
    while True:
        yield sample_row(rng.choice(PRETRAINED), rng, held_out=False)


def sample_row(name: str, rng: random.Random, *, held_out: bool) -> tuple[str, str]:
    """Return a (prompt, answer) of the skill `name`, for measuring or for training."""
    while True:
        prompt, answer = SKILLS[name](rng)
        if is_held_out(prompt) == held_out:
            return prompt, answer
