"""The page of what is refused and what to do: every input of `tests/inputs.py` brought as a user would.

python docs/refusals.py            runs them (10 minutes) and writes docs/reference/refusals.md
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.progress import track

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.inputs import INPUTS, Input, make  # noqa: E402 - the tests are no package that is installed

PAGE = ROOT / "docs" / "reference" / "refusals.md"
INTRODUCTION = """# What is refused, and what to do

Every input below was brought to `python -m flows.mitigate` as a user would; `make docs-refusals` runs them all again
and writes this page. What cannot be used ends with one message and exit code 2 before anything is sampled or trained;
nothing is changed or left out in silence.
"""


class Wrong(Exception):
    """An input that did not end as its entry says."""


def main() -> None:
    """Run every input and write the page."""
    PAGE.write_text("\n".join(_lines()) + "\n")


def _lines() -> Iterator[str]:
    yield INTRODUCTION
    for title, inputs in INPUTS.items():
        yield f"\n## {title}\n\n| what you bring | what happens |\n|---|---|"
        for brought in track(inputs, title):
            with tempfile.TemporaryDirectory(prefix="cfsd-input-") as folder:
                yield row(brought, make(Path(folder) / "case"))


def row(brought: Input, folder: Path) -> str:
    """Return the line of the page for an input; `folder` holds the good case. Raises Wrong."""
    return f"| {brought.what} | {_cell(outcome(brought, folder))} |"


def outcome(brought: Input, folder: Path) -> str:
    """Return what a run on `folder`, which holds the good case, says of the input. Raises Wrong."""
    brought.build(folder)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "CFSD_"))}
    env |= {"CFSD_HOME": "data", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {name: value.format(folder=folder) for name, value in brought.environment.items()}
    command = [sys.executable, "-m", "flows.mitigate", "recipe.yaml"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    message = done.stderr.rpartition("error: ")[2].strip() if brought.refused else _said(brought, done.stdout)
    wanted = (2, brought.refused) if brought.refused else (0, brought.said)
    if done.returncode != wanted[0] or wanted[1] not in message or "Traceback" in done.stdout + done.stderr:
        raise Wrong(f"{brought.what}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return message.replace(str(folder), ".")


def _said(brought: Input, printed: str) -> str:
    if not brought.said:
        return "works"
    return next((f"works: {line.strip()}" for line in printed.splitlines() if brought.said in line), "")


def _cell(message: str) -> str:
    return re.sub(r"\s*\n\s*", " ", message).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
