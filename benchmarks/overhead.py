"""What cfsd adds to Prefect: a fully cached `tiny` against an empty flow, and the start-up of the command line.

make bench PART=overhead        about 5 minutes
"""

import json
import sys

from benchmarks._own_servers import own_servers
from benchmarks._result import row, seconds_in_turn, tell
from tests.conftest import ROOT

ROUNDS = 5
MOST = 3.0  # seconds that a fully cached run may take beyond an empty flow
TINY = "deployments/recipes/tiny.yaml"
EMPTY_FLOW = "from prefect import flow\n@flow\ndef empty(): pass\nempty()"


def main() -> None:
    """Measure on a server of its own."""
    with own_servers("overhead", 14300, 15100) as place:
        url = json.loads((place.data / "servers.json").read_text())["prefect"]["url"]
        tell("overhead", _rows(place.env | {"PREFECT_API_URL": f"{url}/api"}))


def _rows(env: dict[str, str]) -> list[dict[str, object]]:
    python = [sys.executable]
    commands = {
        "cached flow": [*python, "-m", "flows.mitigate", TINY],
        "empty flow": [*python, "-c", EMPTY_FLOW],
        "--plan": [*python, "-m", "flows.mitigate", TINY, "--plan"],
        "--help": [*python, "-m", "flows.mitigate", "--help"],
        "import prefect": [*python, "-c", "import prefect.flows"],
    }
    taken = seconds_in_turn(commands, ROUNDS, cwd=ROOT, env=env)
    beyond = [cached - empty for cached, empty in zip(taken["cached flow"], taken["empty flow"], strict=True)]
    return [
        row("fully cached tiny beyond an empty Prefect flow, s", beyond, [MOST] * ROUNDS, "<= 1"),
        row("fully cached tiny against an empty Prefect flow, s", taken["cached flow"], taken["empty flow"], "<= 2.5"),
        row("--plan against an empty Prefect flow, s", taken["--plan"], taken["empty flow"], "<= 1.5"),
        row("--help against importing Prefect's flows, s", taken["--help"], taken["import prefect"], "<= 1.5"),
    ]


if __name__ == "__main__":
    main()
