"""A process that runs variants one after the other on the one device that it sees; `flows._parallel` starts it.

python -m flows._variant_process ANSWERS        requests on standard input, answers to that open file; a JSON each line
"""

import json
import os
import pkgutil
import signal
import sys
import traceback
from typing import Any, TextIO
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from pydantic import BaseModel, JsonValue

from cfsd.errors import CfsdError
from cfsd.machine import Machine
from cfsd.process.child import KINDS, end_with_parent
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from flows._cli import INTERRUPTED
from flows._explained import explained
from flows._plan import once_checked
from tasks import record

READY = "ready"  # the first answer: from here on the process may hold work
MARK = "\x1e"  # begins the line of the output that names the variant which the next lines are of


class Request(BaseModel):
    """A variant to run: `flow`, as module:name, in the Prefect run that was made for it, below an MLflow run."""

    name: str
    flow: str
    flow_run: UUID
    recipe: Recipe
    machine: Machine
    comparison: str | None


class Answer(BaseModel):
    """What a variant led to: its run record, or the kind and the message of its error."""

    run_record: RunRecord | None = None
    error: tuple[str, str] = ("", "")

    def content(self) -> RunRecord | CfsdError:
        """Return the run record or the error."""
        return self.run_record or KINDS[self.error[0]](self.error[1])


def main() -> None:
    """Answer requests until there are no more. SIGINT and SIGTERM act as Ctrl-C does on a command."""
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with os.fdopen(int(sys.argv[1]), "w") as answers:
            _write(answers, READY)
            for line in sys.stdin:
                request = Request.model_validate_json(line)
                print(MARK + request.name, flush=True)
                _write(answers, _answer(request).model_dump(mode="json"))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _write(answers: TextIO, content: JsonValue) -> None:
    sys.stdout.flush()
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _answer(request: Request) -> Answer:
    try:
        with once_checked(), record.below(request.comparison):
            return Answer(run_record=_run(request))
    except Exception as error:
        known = explained(error)
        if known is None:
            traceback.print_exc(file=sys.stdout)
        kind = next((kind for kind, cls in KINDS.items() if isinstance(known, cls)), "crash")
        return Answer(error=(kind, str(known or f"{type(error).__name__}: {error}")))


def _run(request: Request) -> RunRecord:
    flow: Flow[Any, Any] = pkgutil.resolve_name(request.flow)
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(request.flow_run)
    made: Any = run_flow(flow, flow_run=flow_run, parameters={"recipe": request.recipe, "machine": request.machine})
    return made if isinstance(made, RunRecord) else made.only()


if __name__ == "__main__":
    main()
