"""Addresses of pages: a run's in MLflow, the flow run's in Prefect. None where nobody serves such a page."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from prefect.context import FlowRunContext, TaskRunContext
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_UI_ENABLED
from prefect.utilities.urls import url_for

from tasks.record.client import VARIABLE, tracked

if TYPE_CHECKING:
    from tasks.record.server import Server


def run_url(run_id: str | None) -> str | None:
    """Return the page of a run where an MLflow server is used; None for a database file and an MLflow that is away."""
    return None if run_id is None else _url(lambda server: server.page(run_id))


def experiment_url() -> str | None:
    """Return the page that shows our variants with the figures that people compare; None as for `run_url`."""
    return _url(lambda server: server.page())


def _url(page: "Callable[[Server], str]") -> str | None:
    address = urlsplit(os.environ.get(VARIABLE, ""))
    if address.scheme not in ("http", "https"):
        return None
    place = address._replace(netloc=address.netloc.rpartition("@")[2], path=address.path.rstrip("/"), query="")
    found = tracked(page)
    return f"{place.geturl()}/{found}" if found else None


def prefect_tags() -> dict[str, str]:
    """Return the tags that lead from a run to Prefect's flow run at hand; the page only where a server shows one."""
    task, flow = TaskRunContext.get(), FlowRunContext.get()
    run = flow.flow_run if flow else None
    number = run.id if run else task.task_run.flow_run_id if task else None
    if number is None:
        return {}
    shown = PREFECT_API_URL.value() and PREFECT_SERVER_UI_ENABLED.value()
    page = url_for("flow-run", obj_id=number) if shown else None
    return {"cfsd.prefect_flow_run": str(number)} | ({"cfsd.prefect_url": page} if page else {})
