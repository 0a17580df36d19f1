"""Shards on a Ray cluster: each is a Prefect task of its own, sent through Prefect's task runner for Ray.

A shard whose worker died is lost, no more than that: whoever asked for it finds it missing and asks again.
"""

import logging
import os
import platform
import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from cfsd.errors import BadInput, Crashed
from cfsd.generate.shard_job import Look, Sampler, Shard, ShardJob
from cfsd.machine import Machine
from tasks.record import say

if TYPE_CHECKING:
    from prefect_ray import RayTaskRunner
    from prefect_ray.task_runners import PrefectRayFuture

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 1.0
AHEAD = 500  # shards that Ray is told of at a time: its autoscaler sees the need, a million do not fill its memory
LOCAL, AUTO, CLIENT = "local", "auto", re.compile(r"ray://.+:\d+")


def check_cluster(machine: Machine) -> None:
    """Raise BadInput when `machine.cluster` cannot be meant or Ray is not installed; nothing is started."""
    named = machine.cluster
    if named is None:
        return
    if named not in (LOCAL, AUTO) and not CLIENT.fullmatch(named):
        raise BadInput(f"machine.cluster is {named!r}; allowed: {LOCAL}, {AUTO}, or an address as ray://HOST:10001")
    if missing := [name for name in ("ray", "prefect_ray") if find_spec(name) is None]:
        raise BadInput(
            f"machine.cluster is {named}, but {' and '.join(missing)} cannot be imported here; "
            "install the extra: pip install 'cfsd[ray]', or leave machine.cluster empty"
        )


@contextmanager
def sampler_of(machine: Machine) -> Iterator[Sampler | None]:
    """Give what maps shards over `machine.cluster`, or None for this machine alone.

    The cluster is joined when the first shard is asked for and left with the block; one of our own ends there.
    Raises BadInput as `check_cluster` does, and when the cluster does not answer.
    """
    check_cluster(machine)
    with ExitStack() as stack:
        runner = cache(lambda: stack.enter_context(_joined(machine)))
        yield (lambda job, shards, look: _map(runner(), job, shards, look)) if machine.cluster else None


@task(name="sample-shard", task_run_name="shard {shard.index}", cache_policy=NO_CACHE, persist_result=False,
      retries=0, log_prints=True)  # fmt: skip
def sample_one(job: ShardJob, shard: Shard) -> None:
    """Write one shard, on the node that Ray chose."""
    from cfsd.generate.shard_sampling import sample_shard

    if not job.folder.is_dir():
        raise BadInput(
            f"node {platform.node()} has no {job.folder}; "
            "a cluster needs the data folder on a disk that all its nodes share, at the same path"
        )
    if not shard.is_done(job.folder):  # a shared disk may show it late to whoever asked
        sample_shard(job, shard)


@contextmanager
def _joined(machine: Machine) -> "Iterator[RayTaskRunner[Any]]":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from prefect_ray import RayTaskRunner

    named = machine.cluster or LOCAL
    address = named if CLIENT.fullmatch(named) else None
    with ExitStack() as stack:
        runner: RayTaskRunner[Any] = RayTaskRunner(address, _terms(named, machine))
        try:
            stack.enter_context(runner)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise BadInput(
                f"machine.cluster is {named}, which cannot be joined ({' '.join(str(error).split())}); give a cluster "
                f"that runs, with RAY_AUTH_MODE=token in the environment where it wants a token, or {LOCAL}"
            ) from error
        _say_if_nothing_fits(_needs(machine), ray.nodes())
        yield runner


def _terms(named: str, machine: Machine) -> dict[str, Any]:
    """Return what `ray.init` is told. What workers print goes to Prefect's log of the shard, not to this terminal."""
    quiet: dict[str, Any] = {"log_to_driver": False}
    if named == LOCAL:
        room = {name: each * machine.resolved_processes() for name, each in _needs(machine).items()}
        return quiet | room | {"address": LOCAL, "include_dashboard": False, "logging_level": logging.ERROR}
    code = {"runtime_env": {"env_vars": {"PYTHONPATH": f"{ROOT}:${{PYTHONPATH}}"}}}
    return quiet | code | ({"address": AUTO} if named == AUTO else {})


def _needs(machine: Machine) -> dict[str, int]:
    """Return what one shard takes of a node."""
    if machine.resolved_device() == "cuda":
        return {"num_cpus": 1, "num_gpus": 1}
    return {"num_cpus": machine.resolved_threads(machine.resolved_processes())}


def _say_if_nothing_fits(needs: dict[str, int], nodes: list[dict[str, Any]]) -> None:
    wanted = {name.removeprefix("num_")[:-1].upper(): each for name, each in needs.items()}
    if not any(all(node["Resources"].get(name, 0) >= n for name, n in wanted.items()) for node in nodes):
        words = " and ".join(f"{n} {name}" for name, n in wanted.items())
        say(f"no node of the cluster has {words}: shards wait for one that does, or lower machine.threads")


def _map(runner: "RayTaskRunner[Any]", job: ShardJob, shards: list[Shard], look: Look) -> None:
    """Sample `shards`, each at most once. Raises what the first that failed raised; the others are cancelled."""
    import ray
    from prefect_ray.context import remote_options

    waiting, running, lost = deque(shards), dict[Any, "PrefectRayFuture[Any]"](), list["PrefectRayFuture[Any]"]()
    there, needs = _settled(job), _needs(job.machine)
    try:
        # max_retries: whoever asked asks again; max_calls: a worker with a GPU would load the model for every shard
        with remote_options(**needs, max_retries=0, max_calls=0):
            while waiting or running:
                until = time.monotonic() + POLL_SECONDS
                while waiting and len(running) < AHEAD and time.monotonic() < until:
                    future = runner.submit(sample_one, {"job": there, "shard": waiting.popleft()})
                    running[future.wrapped_future] = future
                ended, _ = ray.wait(list(running), num_returns=len(running), timeout=POLL_SECONDS)
                lost += _lost([running.pop(reference) for reference in ended])
                look(0.0)
    finally:
        with suppress(ConnectionError, ray.exceptions.RayError):
            for reference in running:
                ray.cancel(reference)
        _close([*lost, *running.values()])


def _settled(job: ShardJob) -> ShardJob:
    """Return the job with what this machine resolved: every node must compute alike."""
    machine = job.machine
    fixed = {"device": machine.resolved_device(), "threads": machine.resolved_threads(machine.resolved_processes())}
    return job.model_copy(update={"machine": machine.model_copy(update=fixed)})


def _lost(ended: "list[PrefectRayFuture[Any]]") -> "list[PrefectRayFuture[Any]]":
    """Return those whose worker died, and say so. Raises what a shard itself raised."""
    reasons = {i: why for i, future in enumerate(ended) if (why := _why_lost(future))}
    if reasons:
        why = ", ".join(sorted(set(reasons.values())))
        say(f"shards lost with their workers: {len(reasons)} ({why}); they are sampled again")
    return [ended[i] for i in reasons]


def _why_lost(future: "PrefectRayFuture[Any]") -> str:
    """Return an empty text for a shard that was made."""
    import ray
    from prefect.settings import PREFECT_API_URL

    try:
        state = ray.get(future.wrapped_future)
    except (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError) as error:
        raise BadInput(
            f"a node of the cluster could not begin a shard ({str(error).strip().splitlines()[-1]}); every node needs "
            f"the packages of this one, the code at {ROOT} and a way to the Prefect server {PREFECT_API_URL.value()}"
        ) from error
    except ray.exceptions.LocalRayletDiedError as error:
        raise Crashed(f"the cluster is gone ({type(error).__name__}); finished shards are kept") from error
    except ray.exceptions.RayError as error:
        return type(error).__name__
    if state.is_failed():
        state.result()
    return str(state.name) if state.is_crashed() else ""


def _close(futures: "list[PrefectRayFuture[Any]]") -> None:
    """End in Prefect's eyes what no worker is left to end."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterId, TaskRunFilterState
    from prefect.client.schemas.filters import TaskRunFilterStateType as Types
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed as CrashedState

    if not futures:
        return
    ids = TaskRunFilterId(any_=[future.task_run_id for future in futures])
    begun = TaskRunFilterState(type=Types(any_=[StateType.PENDING, StateType.RUNNING]))
    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        for run in client.read_task_runs(task_run_filter=TaskRunFilter(id=ids, state=begun)):
            client.set_task_run_state(run.id, CrashedState(message="its worker was lost or stopped"), force=True)
