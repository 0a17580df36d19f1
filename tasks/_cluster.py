"""Shards on a Ray cluster: each is a Prefect task of its own, sent through Prefect's task runner for Ray.

A shard whose worker died is lost, no more: whoever asked for it finds it missing and asks again.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from cfsd.errors import BadInput
from cfsd.machine import Machine
from cfsd.shards import Look, Sampler, Shard, ShardJob
from tasks.record import say

if TYPE_CHECKING:
    from prefect_ray import RayTaskRunner
    from prefect_ray.task_runners import PrefectRayFuture

POLL_SECONDS = 1.0
AHEAD = 256  # shards that Ray knows of: its autoscaler sees the need, and a million do not wait in its memory
CLIENT = "ray://"
LOCAL, AUTO = "local", "auto"


@contextmanager
def sampler_of(machine: Machine) -> Iterator[Sampler | None]:
    """Give what maps shards over `machine.cluster`, or None for this machine alone.

    The cluster is entered when the first shard is asked for and left with the block; a local one ends there.
    Raises BadInput when Ray is not installed or the address is none.
    """
    if machine.cluster is None:
        yield None
        return
    check_cluster(machine)
    with ExitStack() as stack:
        runner = cache(lambda: stack.enter_context(_entered(machine)))
        yield lambda job, shards, look: _map(runner(), job, shards, look)


def check_cluster(machine: Machine) -> None:
    """Raise BadInput for a cluster that cannot be spoken to from here; nothing is started."""
    named = machine.cluster
    if named and named not in (LOCAL, AUTO) and not named.startswith(CLIENT):
        raise BadInput(f"machine.cluster is {named!r}; allowed: {LOCAL}, {AUTO} or {CLIENT}HOST:10001")
    if named and (missing := [name for name in ("ray", "prefect_ray") if find_spec(name) is None]):
        raise BadInput(
            f"machine.cluster is {named}, which needs {' and '.join(missing)}, not installed here; "
            "pip install 'cfsd[ray]', or leave machine.cluster empty"
        )


@task(name="sample-shard", task_run_name="shard {shard.index}", cache_policy=NO_CACHE, persist_result=False, retries=0)
def sample_one(job: ShardJob, shard: Shard) -> None:
    """Write one shard of a draft; runs on whatever node Ray chose."""
    from cfsd.shard_rows import sample_shard

    if not job.folder.is_dir():
        raise BadInput(
            f"{os.uname().nodename} does not see {job.folder}; "
            "a cluster needs the data folder at the same path on a disk that all its nodes share"
        )
    if not shard.done(job.folder):
        sample_shard(job, shard)


@contextmanager
def _entered(machine: Machine) -> "Iterator[RayTaskRunner[Any]]":
    import ray
    from prefect_ray import RayTaskRunner

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    named = machine.cluster or LOCAL
    runner: RayTaskRunner[Any] = RayTaskRunner(named if named.startswith(CLIENT) else None, _init_of(machine))
    with ExitStack() as stack:
        try:
            stack.enter_context(runner)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise BadInput(f"machine.cluster is {named}, but: {type(error)} {error}; ") from error
        yield runner


def _init_of(machine: Machine) -> dict[str, Any]:
    if machine.cluster != LOCAL:
        root = Path(__file__).parents[1]
        named = {} if machine.cluster != AUTO else {"address": AUTO}
        return named | {"runtime_env": {"env_vars": {"PYTHONPATH": f"{root}:${{PYTHONPATH}}"}}}
    needs, processes = _needs(machine), machine.resolved_processes()
    return {"address": LOCAL, "include_dashboard": False} | {name: n * processes for name, n in needs.items()}


def _needs(machine: Machine) -> dict[str, int]:
    """Return what one shard takes of the cluster: threads on CPU, a device on CUDA."""
    if machine.resolved_device() == "cuda":
        return {"num_cpus": 1, "num_gpus": 1}
    return {"num_cpus": machine.resolved_threads(machine.resolved_processes())}


def _map(runner: "RayTaskRunner[Any]", job: ShardJob, shards: list[Shard], look: Look) -> None:
    import ray
    from prefect_ray.context import remote_options

    there, waiting = _settled(job), deque(shards)
    running: dict[Any, PrefectRayFuture[Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < AHEAD:
                with remote_options(**_needs(job.machine), max_retries=0, max_calls=0):
                    future = runner.submit(sample_one, {"job": there, "shard": waiting.popleft()})
                running[future.wrapped_future] = future
            ended, _ = ray.wait(list(running), num_returns=len(running), timeout=POLL_SECONDS)
            for future in map(running.pop, ended):
                _end(future)
            look(0.0)
    finally:
        for reference in running:
            ray.cancel(reference)


def _end(future: Any) -> None:
    future.wait()
    state = future.state
    if state.is_crashed():
        say(f"lost {state.message}")
    elif state.is_failed():
        state.result()


def _settled(job: ShardJob) -> ShardJob:
    """Return the job with what this machine resolved, so that every node does the same."""
    machine = job.machine
    fixed = {"device": machine.resolved_device(), "threads": machine.resolved_threads(machine.resolved_processes())}
    return job.model_copy(update={"machine": machine.model_copy(update=fixed)})
