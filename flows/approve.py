"""A person says whether a candidate becomes the champion.

python -m flows.approve tiny --by ada                 here, at the terminal
python -m flows.regress … --baseline champion --approve    asks in Prefect's pages: the run pauses until it is resumed
"""

import shlex
from typing import Annotated, Any

import typer
from prefect import flow
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.settings import PREFECT_API_URL
from pydantic import Field

from cfsd.errors import BadInput
from flows._cli import Home, start
from tasks import record, registry

DAY = 24 * 3600
POLL_SECONDS = 2


class Decision(RunInput):
    """What a person answers; the form in Prefect's pages has these fields."""

    approve: bool = Field(description="Make this version the champion")
    by: str = Field("", description="Who says so")
    reason: str = Field("", description="Why, for those who read it later")


def check_asked(*, is_champion: bool) -> None:
    """Raise BadInput where nobody could be asked: no champion is moved, or no server has pages to answer in."""
    if not is_champion:
        raise BadInput("--approve is about the champion, and this run moves none; add --baseline champion, or leave it")
    if not PREFECT_API_URL.value():
        raise BadInput("--approve asks in Prefect's pages, and no server runs; start one (make up), or leave it out")


@flow(name="approve", flow_run_name="{recipe_name} version {version}")
def approve(recipe_name: str, version: int | None = None, wait_seconds: Annotated[int, Field(ge=1)] = DAY) -> str:
    """Pause until a person answers, then make the version the champion or leave it; return a sentence that says so.

    `version` is the candidate if it is left out. Without an answer the champion stays.
    """
    asked = _asked(recipe_name, version)
    name = registry.model_name(recipe_name)
    record.say(f"waiting for a person: shall version {asked.version} of {name!r} become the champion? {asked.verdict}")
    words = f"**Version {asked.version} of {name}** waits to become the champion.\n\n{asked.verdict}\n\n{_link(asked)}"
    form: Any = Decision.with_initial_data(description=words, approve=False)
    try:
        said = pause_flow_run(wait_for_input=form, timeout=wait_seconds, poll_interval=POLL_SECONDS)
    except FlowPauseTimeout:
        later = f"python -m flows.approve {shlex.quote(recipe_name)} --by YOUR_NAME"
        return f"the champion stays: nobody answered within {wait_seconds} s; later: {later}"
    return decide(recipe_name, asked.version, said)


def decide(recipe_name: str, version: int, said: Decision) -> str:
    """Carry out what a person said; return a sentence on it."""
    who, why = said.by or "a person who gave no name", f": {said.reason}" if said.reason else ""
    if not said.approve:
        return f"the champion stays: {who} did not approve version {version}{why}"
    moved = registry.promote(recipe_name, version, approved_by=f"{who}{why}")
    if moved is None:
        return "the champion stays, because MLflow cannot be reached; approve it again later"
    if moved != version:
        return f"the champion stays: {who} approved version {version}, but version {moved} is the candidate by now"
    return f"champion of {registry.model_name(recipe_name)!r} is version {version}, approved by {who}{why}"


def _asked(recipe_name: str, version: int | None) -> registry.Registered:
    """Return the candidate. Raises BadInput where there is none, or it is not the version that is meant."""
    found = registry.candidate(recipe_name)
    if found is None:
        raise BadInput(f"MLflow has no candidate of {recipe_name!r}; the gate registers one: --baseline champion")
    if version not in (None, found.version):
        raise BadInput(f"version {version} of {recipe_name!r} is no candidate any more; version {found.version} is")
    return found


def _link(asked: registry.Registered) -> str:
    page = record.run_url(asked.run_id)
    return f"[The gate's run in MLflow]({page})" if page else f"The gate's run in MLflow is {asked.run_id}."


def approve_command(
    recipe_name: Annotated[str, typer.Argument(help="The recipe's name, as in `name:`")],
    by: Annotated[str, typer.Option(help="Who says so")],
    reason: Annotated[str, typer.Option(help="Why, for those who read it later")] = "",
    no: Annotated[bool, typer.Option("--no", help="Reject the candidate: the champion stays")] = False,
    home: Home = None,
) -> None:
    """Make the candidate of a recipe the champion, or say that it does not become it."""
    asked = _asked(recipe_name, None)
    record.say(asked.verdict)
    record.say(decide(recipe_name, asked.version, Decision(approve=not no, by=by, reason=reason)))


if __name__ == "__main__":
    start(approve_command)
