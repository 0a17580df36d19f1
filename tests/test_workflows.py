"""The nightly workflow's gate step, run by bash as the runner does, with a program that ends as the gate can."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

JOB = yaml.safe_load((ROOT / ".github" / "workflows" / "regress.yml").read_text())["jobs"]["gate"]
GATE = """#!/bin/bash
[ "$*" = "-m flows.regress deployments/recipes/tiny.yaml" ] || exit 99
if [ {verdict} = yes ]; then
  mkdir -p "$CFSD_HOME/reports/tiny-gate-1"
  echo "the verdict" > "$CFSD_HOME/reports/tiny-gate-1/verdict.md"
  echo "{{}}" > "$CFSD_HOME/reports/tiny-gate-1/verdict.json"
fi
exit {code}
"""


@pytest.mark.parametrize(
    ("code", "verdict", "ends", "said"),
    [
        (0, "yes", 0, ""),
        (1, "yes", 1, ""),
        (3, "yes", 0, "::warning::the gate cannot tell"),
        (1, "no", 1, "::error::the gate did not come to a verdict"),
        (2, "no", 2, ""),
    ],
)
def test_the_job_ends_as_the_gate_did_and_shows_the_verdict(
    tmp_path: Path, code: int, verdict: str, ends: int, said: str
) -> None:
    (step,) = (step["run"] for step in JOB["steps"] if step.get("name") == "gate")
    program, summary = tmp_path / ".venv" / "bin" / "python", tmp_path / "summary.md"
    program.parent.mkdir(parents=True)
    program.write_text(GATE.format(verdict=verdict, code=code))
    program.chmod(0o755)
    environment = {**os.environ, "CFSD_HOME": str(tmp_path / "regress-data"), "GITHUB_STEP_SUMMARY": str(summary)}
    done = subprocess.run(
        ["bash", "-e", "-c", step], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == ends, done.stderr
    assert said in done.stdout and ("::" in done.stdout) == bool(said)
    assert summary.read_text() == ("the verdict\n" if verdict == "yes" else "")


def test_the_report_is_kept_whatever_the_verdict() -> None:
    (upload,) = (step for step in JOB["steps"] if "upload-artifact" in step.get("uses", ""))
    assert upload["if"] == "always()"
    assert JOB["env"]["CFSD_HOME"].endswith("/" + Path(upload["with"]["path"]).parts[0])
