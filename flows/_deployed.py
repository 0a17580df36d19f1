"""What a Prefect server is told by `make up`: work pools, deployments with the menus of now, and automations."""

import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings

from cfsd.errors import BadEnvironment
from cfsd.machine import without_password

ROOT = Path(__file__).parent.parent
FILES = ROOT / "deployments"
TAG = "cfsd"  # of every deployment of ours
POOL_VARIABLE = "CFSD_POOL"
POOLS = {"cpu": "Machines without a GPU", "gpu": "Machines with CUDA"}


def pool() -> str:
    """Return the work pool of this machine: cpu or gpu, or what the environment says. Raises BadEnvironment."""
    given = os.environ.get(POOL_VARIABLE)
    if given and given not in POOLS:
        raise BadEnvironment(f"{POOL_VARIABLE} is {given!r}; give one of {', '.join(POOLS)}, or unset it")
    return given or ("gpu" if shutil.which("nvidia-smi") else "cpu")


def make_pools(url: str) -> None:
    """Make the work pools that the Prefect API at `url` does not have."""
    from prefect.workers.process import ProcessWorker  # seconds, which `status` and `down` do not need

    template = ProcessWorker.get_default_base_job_template()
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        known = {pool.name for pool in client.read_work_pools()}
        for name in sorted(POOLS.keys() - known):
            made = WorkPoolCreate(name=name, type="process", description=POOLS[name], base_job_template=template)
            with suppress(ObjectAlreadyExists):  # by a worker that starts just now
                client.create_work_pool(made)
        _automate(client, FILES / "automations" / "zombies.yaml")


def _automate(client: SyncPrefectClient, file: Path) -> None:
    """Create the automation of a file, or bring the one of its name up to date."""
    from prefect.events.schemas.automations import AutomationCore

    wanted = AutomationCore.model_validate(yaml.safe_load(file.read_text()))
    known = client.read_automations_by_name(wanted.name)
    if known:
        client.update_automation(known[0].id, wanted)
    else:
        client.create_automation(wanted)


def deploy(environment: dict[str, str]) -> None:
    """Deploy all of deployments/prefect.yaml to the server that `environment` names. Raises BadEnvironment.

    Schedules are given to new deployments alone: Prefect would replace those that people added, changed or paused.
    """
    config = yaml.safe_load((FILES / "prefect.yaml").read_text())
    ours = DeploymentFilterName(any_=[deployment["name"] for deployment in config["deployments"]])
    with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}), get_client(sync_client=True) as client:
        found = client.read_deployments(deployment_filter=DeploymentFilter(name=ours))
    known = {deployment.name for deployment in found if TAG in deployment.tags}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump(without_schedules(config, known)))
        run(["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)], environment)


def without_schedules(config: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return the content of a prefect.yaml, in which the deployments called `known` have no schedules."""
    deployments = [
        {name: value for name, value in deployment.items() if name != "schedules" or deployment["name"] not in known}
        for deployment in config["deployments"]
    ]
    return config | {"deployments": deployments}


def run(words: list[str], environment: dict[str, str]) -> None:
    """Run `python -m WORDS` to its end. Raises BadEnvironment with what it wrote."""
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        shown, said = " ".join(map(without_password, words)), f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
        raise BadEnvironment(f"{shown} failed with code {done.returncode}:\n{said}")
