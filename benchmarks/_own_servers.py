"""Servers and a data folder that a benchmark has for itself."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT


class Place(NamedTuple):
    """The data folder, and the environment in which commands use it and its servers."""

    data: Path
    env: dict[str, str]


@contextmanager
def own_servers(name: str, prefect_port: int, mlflow_port: int, **env: str) -> Iterator[Place]:
    """Start the servers of a new data folder, and end them after the block; the folder stays."""
    data = Path(tempfile.mkdtemp(prefix=f"cfsd-{name}-")) / "data"
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "CFSD_"))}
    own |= {"CFSD_HOME": str(data), **env}
    serve, ports = [sys.executable, "-m", "flows.serve"], {"prefect": prefect_port, "mlflow": mlflow_port}
    begin = [*serve, "up", *(part for server, port in ports.items() for part in (f"--{server}-port", str(port)))]
    subprocess.run(begin, cwd=ROOT, env=own, check=True)
    try:
        yield Place(data, own)
    finally:
        subprocess.run([*serve, "down"], cwd=ROOT, env=own, check=True)
