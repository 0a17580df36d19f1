"""How flow runs are found among others: a name and tags that say model, target and variant."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectHTTPStatusError

from cfsd.recipe import Recipe

VARIANT = ": "  # between a recipe's name and its variant's, as `Comparison.recipes` puts them together


def name_flow_run(recipe: Recipe, what: str = "") -> None:
    """Name the flow run at hand after `recipe`, and tag it; `what` follows the name, such as "gate"."""
    name = " ".join(filter(None, (recipe.name, what, f"({recipe.base.label()} on {target_label(recipe)})")))
    call_flow_run(name, tags_of(recipe))


def call_flow_run(name: str, tags: Sequence[str]) -> None:
    """Give the flow run at hand a name, and tags besides its own.

    A server that does not answer is no reason to end a run: it has the name then that Prefect gave it.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    both = list(dict.fromkeys([*context.flow_run.tags, *tags]))
    with suppress(httpx.HTTPError, PrefectHTTPStatusError), get_client(sync_client=True) as client:
        client.update_flow_run(context.flow_run.id, name=name, tags=both)


def tags_of(recipe: Recipe) -> list[str]:
    """Return the tags of a run of `recipe`."""
    _, _, variant = recipe.name.partition(VARIANT)
    tags = [f"model:{recipe.base.label()}", f"target:{target_label(recipe)}"]
    return [*tags, f"variant:{variant}"] if variant else tags


def target_label(recipe: Recipe) -> str:
    """Return a short name of the target for people."""
    return Path(recipe.target.path or recipe.target.name or "target").name
