"""Whether two models that already exist can be compared token by token."""

from cfsd.artifact import Artifact
from cfsd.errors import BadInput


def check_comparable(base: Artifact, tuned: Artifact) -> None:
    """Raise BadInput when the two models do not share a vocabulary: their distributions cannot be compared."""
    if any(base.facts[fact] != tuned.facts[fact] for fact in ("tokenizer", "vocabulary")):
        raise BadInput(
            f"base and tuned have different vocabularies ({base.facts['vocabulary']} and "
            f"{tuned.facts['vocabulary']} tokens, or other tokens under the same numbers); "
            "a divergence between them is not defined: give a model that was tuned from this base"
        )
