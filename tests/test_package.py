"""What is installed: `cfsd` alone is a typed library, and `cfsd[pipeline]` adds what flows and tasks need."""

import re
import subprocess
import sys
import tomllib
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.processes

PIPELINE = {"fastapi", "mlflow", "prefect"}
EVERY_MODULE = f"""
import importlib.util, pkgutil, sys
for name in {sorted(PIPELINE)}:
    sys.modules[name] = None  # importing it fails, as where it is not installed
import cfsd
names = [module.name for module in pkgutil.walk_packages(cfsd.__path__, "cfsd.")]
if importlib.util.find_spec("trl") is None:  # an extra of its own
    names.remove("cfsd.integrations.trl")
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def project() -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return content


def named(requirements: list[str]) -> set[str]:
    return {re.split(r"[^a-z0-9-]", requirement.lower())[0] for requirement in requirements}


def test_only_the_extra_asks_for_prefect_and_mlflow() -> None:
    extras = project()["optional-dependencies"]
    assert named(extras["pipeline"]) == PIPELINE | {"sqlalchemy"}  # which both servers bring, in an older version
    assert not named(project()["dependencies"]) & PIPELINE
    assert all(re.match(r"cfsd\[.*\bpipeline\b", extras[name][0]) for name in ("ray", "dev"))


def test_every_module_of_the_library_imports_without_the_pipeline() -> None:
    done = subprocess.run([sys.executable, "-c", EVERY_MODULE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "cfsd" / "py.typed").is_file()
