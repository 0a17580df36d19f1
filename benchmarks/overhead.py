"""What cfsd adds to Prefect: a fully cached flow against an empty one, and the start-up of the command line.

make bench PART=overhead        about 5 minutes
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks._result import row, seconds_in_turn, tell
from tests.conftest import ROOT, save_model, write_rows

ROUNDS = 5
EMPTY_FLOW = "from prefect import flow\n@flow\ndef empty(): pass\nempty()"


def main() -> None:
    """Measure on a server of its own."""
    folder = Path(tempfile.mkdtemp(prefix="cfsd-overhead-"))
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "CFSD_"))}
    own["CFSD_HOME"] = str(folder / "data")
    serve = [sys.executable, "-m", "flows.serve"]
    subprocess.run([*serve, "up", "--prefect-port", "14300", "--mlflow-port", "15100"], cwd=ROOT, env=own, check=True)
    try:
        url = json.loads((folder / "data" / "servers.json").read_text())["prefect"]["url"]
        own["PREFECT_API_URL"] = f"{url}/api"
        tell("overhead", _rows(folder, own))
    finally:
        subprocess.run([*serve, "down"], cwd=ROOT, env=own, check=True)


def _rows(folder: Path, env: dict[str, str]) -> list[dict[str, object]]:
    recipe = folder / "recipe.yaml"
    rows, model = write_rows(folder / "rows.jsonl"), save_model(folder / "model")
    recipe.write_text(
        f"name: cached\nbase: {model}\ntarget: {{path: {rows}, held_out: 8}}\n"
        "probe: {rows: 32, length: 24}\ngenerate: {rows: 32, length: 24}\n"
    )
    python = [sys.executable]
    commands = {
        "cached flow": [*python, "-m", "flows.mitigate", str(recipe)],
        "empty flow": [*python, "-c", EMPTY_FLOW],
        "--plan": [*python, "-m", "flows.mitigate", str(recipe), "--plan"],
        "--help": [*python, "-m", "flows.mitigate", "--help"],
        "import prefect": [*python, "-c", "import prefect.flows"],
    }
    taken = seconds_in_turn(commands, ROUNDS, cwd=ROOT, env=env)
    return [
        row("fully cached flow against an empty Prefect flow, s", taken["cached flow"], taken["empty flow"], "<= 5"),
        row("--plan against an empty Prefect flow, s", taken["--plan"], taken["empty flow"], "<= 1.5"),
        row("--help against importing Prefect's flows, s", taken["--help"], taken["import prefect"], "<= 1.5"),
    ]


if __name__ == "__main__":
    main()
