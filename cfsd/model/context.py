"""How many tokens a model attends to."""

from cfsd.store.artifact import Artifact

UNLIMITED = 1 << 30  # as good as: no row is as long


def context_tokens(model: Artifact) -> int:
    """Return the most tokens that a fetched model attends to; UNLIMITED where its config names no limit."""
    context = model.metadata.get("context")
    return context if isinstance(context, int) else UNLIMITED
