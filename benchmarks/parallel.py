"""Four variants on two slots against one: how much sooner is a comparison done?

make bench PART=parallel        about 10 minutes on two free cores

Both sides have one thread per variant, so that all that differs is how many run at once. The store is emptied before
each: nothing is cached. The servers run throughout, so that their start counts on neither side.
"""

import sys
from pathlib import Path

import yaml

from benchmarks._own_servers import own_servers
from benchmarks._result import row, seconds_in_turn, tell
from tests.conftest import ROOT, save_model, write_rows

ROUNDS = 3
VARIANTS = {
    "finetune": {"generate.rows": 0},
    "rehearse": {},
    "strong": {"train.rehearsal.weight": 3.0},
    "slow": {"train.learning_rate": 1e-4},
}
STEPS = 1200  # of each variant: half a minute on a free core, so that the processes' start is a small part


def main() -> None:
    """Measure on servers of its own."""
    with own_servers("parallel", 14500, 15500, OMP_NUM_THREADS="1") as place:
        tell("parallel", [_measured(place.data.parent, place.env)])


def _measured(folder: Path, env: dict[str, str]) -> dict[str, object]:
    rows, model = write_rows(folder / "rows.jsonl", count=408), save_model(folder / "model")
    recipe = {
        "name": "four", "base": str(model), "target": {"path": str(rows), "held_out": 8},
        "probe": {"rows": 32, "length": 24}, "generate": {"rows": 64, "length": 24},
        "mix": {"target_rows": 1, "rehearsal_tokens": 64}, "train": {"learning_rate": 1e-3, "epochs": STEPS // 400},
    }  # fmt: skip
    file = folder / "comparison.yaml"
    file.write_text(yaml.safe_dump({"recipe": recipe, "variants": VARIANTS}, sort_keys=False))
    compare = f"{sys.executable} -m flows.compare {file} --machine threads=1 --machine devices="
    commands = {
        f"{devices} at once": ["bash", "-c", f"rm -rf $CFSD_HOME/store $CFSD_HOME/reports; exec {compare}{devices}"]
        for devices in (2, 1)
    }
    taken = seconds_in_turn(commands, ROUNDS, cwd=ROOT, env=env)
    what = "four variants, two at once against one after the other, s"
    return row(what, taken["2 at once"], taken["1 at once"], "<= 0.65")


if __name__ == "__main__":
    main()
