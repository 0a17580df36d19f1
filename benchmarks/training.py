"""Our training against TRL's SFTTrainer and against the machine; what rehearsal by the divergence costs and yields.

make bench PART=training                             SmolLM2-135M, about 15 minutes, alone on the machine; needs trl
python -m benchmarks.training --model FOLDER         the same for a transformers folder
python -m benchmarks.training --quick                tries the benchmark itself; its numbers mean nothing

The demo's mixture: the same rows in the same global batches and order, float32, AdamW, the gradient clipped at 1, two
threads. Useful tokens are those whose loss counts: responses and rehearsal. A step is all from batch to batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._result import RESULTS, Worker, row, tell

ROOT = Path(__file__).parents[1]
RUN = [sys.executable, "-m", "benchmarks._training_run"]
THREADS = 2
DEFAULTS = ("padded", True)  # SFTTrainer's: layout and gradient checkpointing
SETTINGS = [(layout, on) for layout in ("padded", "padding-free", "packed") for on in (False, True)]
FORMS = {"nll": {}, "kl stored": {"loss": "kl"}, "kl base": {"loss": "kl", "reference": "base"}}
AIMS = {"kl stored": "<= 1.15", "kl base": "<= 1.6"}
EQUAL = 1e-3  # nats
OURS = "nll"
LEAN, LEAN_MACHINE = "nll in micro-batches of 256 tokens", {"micro_batch_tokens": 256}  # less memory, smaller products
Answer = dict[str, Any]


class Plan(NamedTuple):
    """What is measured: rounds of a few steps, after `warm` steps of each contender that do not count."""

    rounds: int = 3
    steps: int = 3
    warm: int = 2
    tried_steps: int = 2  # of each of SFTTrainer's settings, to find its best; after one that does not count
    checked: int = 8  # rows of each kind whose losses are compared
    rows: int = 120
    length: int = 64
    probe_rows: int = 96


QUICK = Plan(2, 1, 1, 1, 2, 70, 16, 8)


class Round(NamedTuple):
    """The same steps by one contender; `bound` is the seconds of their matrix products at the machine's best rate."""

    contender: str
    seconds: float
    useful: int
    bound: float
    peak_mb: float


class Place(NamedTuple):
    """Where everything lies, and the target, rehearsal and real tokens of each step."""

    data: Path
    batches: list[dict[str, int]]
    single: list[dict[str, int]]

    def worker(self, name: str, role: str, **settings: Any) -> Worker:
        """Start a contender; it waits for its first job."""
        command = [*RUN, role, str(self.data), json.dumps({"name": name, **settings})]
        log = (self.data / f"{name}.log").open("w")
        return Worker(name, command, cwd=ROOT, env=_environment(self.data), stderr=log)

    def ours(self, name: str, **settings: Any) -> Worker:
        """Start our trainer; `settings` are those of TrainSpec, but for `mixture` and `machine`."""
        mixture, machine = settings.pop("mixture", "mixture"), settings.pop("machine", {})
        return self.worker(name, "ours", train=settings, mixture=mixture, machine=machine)

    def peer(self, layout: str, *, checkpointing: bool, **settings: Any) -> Worker:
        """Start SFTTrainer."""
        name = f"SFTTrainer {layout}, checkpointing {'on' if checkpointing else 'off'}"
        return self.worker(name, "peer", layout=layout, checkpointing=checkpointing, **settings)


def _environment(data: Path) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false", "CFSD_HOME": str(data),
    }  # fmt: skip


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a transformers folder; default: the packaged SmolLM2-135M")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark itself")
    given = parser.parse_args()
    if find_spec("trl") is None:
        parser.error("TRL is not installed, against which training is measured: pip install --editable '.[trl]'")
    plan, started = QUICK if given.quick else Plan(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cfsd-training-") as folder:
        wanted = {**plan._asdict(), "model": str(given.model.absolute()) if given.model else None}
        made = _once(Path(folder), "prepare", json.dumps(wanted))
        _bench(plan, Place(Path(folder), made["mixture"], made["single"]), started, quick=given.quick)


def _once(data: Path, role: str, *rest: str) -> Answer:
    command, log = [*RUN, role, str(data), *rest], data / f"{role}.log"
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=ROOT, env=_environment(data), stdout=subprocess.PIPE, stderr=file, text=True
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{role} ended with {done.returncode}:\n{log.read_text()[-2000:]}")
    answer: Answer = json.loads(done.stdout.splitlines()[-1])
    return answer


def _bench(plan: Plan, place: Place, started: float, *, quick: bool) -> None:
    _say(started, "model, corpus and mixture are here")
    apart = _losses_apart(plan, place)
    _say(started, f"losses row by row: at most {max(apart):.1e} nats apart")
    tried = {setting: _try(plan, place, *setting) for setting in SETTINGS}
    _say(started, "SFTTrainer's settings tried")
    able = {setting: entry for setting, entry in tried.items() if "error" not in entry}
    best = min(able, key=lambda setting: able[setting]["seconds"])
    found, errors = _contest(plan, place, best)
    _say(started, "contest over")
    ours = _mean(_figures(place, OURS)[0], place.batches[0])
    for entry in able.values():
        entry["apart"] = abs(entry["loss"] - ours)
    moved, tail = _once(place.data, "tuned"), _once(place.data, "tail")
    rows = [*_against(found, best, min(entry["peak_mb"] for entry in able.values())), *_forms(found), *_tails(tail)]
    notes = [*_notes(plan, place, found, tail, started), *_compared(apart, tried), *errors]
    detail = {"measured": [entry._asdict() for entry in found], "tried": list(tried.values()), "tail": tail}
    tell("training", rows, notes, folder=place.data if quick else RESULTS, moved=moved, **detail)
    if max(*apart, *(entry["apart"] for entry in able.values())) > EQUAL:
        raise SystemExit(f"losses at the base's weights differ by more than {EQUAL}: the figures compare unlike things")


def _say(started: float, what: str) -> None:
    print(f"{time.monotonic() - started:6.0f} s  {what}", flush=True)


def _losses_apart(plan: Plan, place: Place) -> list[float]:
    """Return by how much the two trainers' mean losses differ, batch by batch of one target and one rehearsal row.

    At learning rate 0 every step is at the base's weights.
    """
    with place.ours("ours, row by row", learning_rate=0.0, mixture="single") as ours:
        _steps(ours, plan.checked + 1)  # a step's figures are written by the time of the next
        mine = _figures(place, ours.name)
    with place.peer(*DEFAULTS[:1], checkpointing=DEFAULTS[1], learning_rate=0.0, mixture="single") as peer:
        theirs = _steps(peer, plan.checked)["losses"]
    means = [_mean(figures, counts) for figures, counts in zip(mine, place.single, strict=False)]
    return [abs(a - b) for a, b in zip(means, theirs, strict=False)]


def _mean(figures: dict[str, float], counts: dict[str, int]) -> float:
    """Return our loss as SFTTrainer counts: per token of either kind."""
    nats = figures["train/target_loss"] * counts["target"] + figures["train/rehearsal_loss"] * counts["rehearsal"]
    return nats / _useful(counts)


def _figures(place: Place, name: str) -> list[dict[str, float]]:
    """Return what our trainer wrote of each step."""
    found: dict[int, dict[str, float]] = {}
    for line in (place.data / "runs" / name / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["step"], {})[record["name"]] = record["value"]
    return [found[step] for step in sorted(found)]


def _useful(counts: dict[str, int]) -> int:
    return counts["target"] + counts["rehearsal"]


def _steps(worker: Worker, steps: int) -> Answer:
    answer = worker.ask("steps", steps=steps)
    if "error" in answer:
        raise SystemExit(f"{worker.name}: {answer['error']}")
    return answer


def _try(plan: Plan, place: Place, layout: str, checkpointing: bool) -> Answer:
    """Return seconds, peak memory and loss of a few steps of SFTTrainer with one setting, or its error."""
    with place.peer(layout, checkpointing=checkpointing) as peer:
        first = peer.ask("steps", steps=1)
        if "error" in first:
            return {"setting": peer.name, "error": first["error"]}
        answer = peer.ask("steps", steps=plan.tried_steps)
    seconds = statistics.median(answer["seconds"])
    return {"setting": peer.name, "seconds": seconds, "peak_mb": answer["peak_mb"], "loss": first["losses"][0]}


def _contest(plan: Plan, place: Place, best: tuple[str, bool]) -> tuple[list[Round], list[str]]:
    """Measure SFTTrainer's defaults, its best setting, and ours in each form, in turn; return the errors of some."""
    found, errors, able = [], [], []
    with ExitStack() as stack:
        workers = {name: stack.enter_context(place.ours(name, rehearsal=form)) for name, form in FORMS.items()}
        workers[LEAN] = stack.enter_context(place.ours(LEAN, machine=LEAN_MACHINE))
        for name, (layout, checkpointing) in {"A": DEFAULTS, "B": best}.items():
            if name == "A" or best != DEFAULTS:
                workers[name] = stack.enter_context(place.peer(layout, checkpointing=checkpointing))
        bound = stack.enter_context(
            Worker("bound", [*RUN, "bound", str(place.data)], cwd=ROOT, env=_environment(place.data))
        )
        for name, worker in workers.items():
            answer = worker.ask("steps", steps=plan.warm)
            errors += [f"{name} cannot run: {answer['error']}"] if "error" in answer else []
            able += [] if "error" in answer else [name]
        for turn in range(plan.rounds):
            first = plan.warm + turn * plan.steps
            counts = place.batches[first : first + plan.steps]
            limit = bound.ask("rate", tokens=counts[0]["tokens"])
            for name in able:
                answer = _steps(workers[name], plan.steps)
                least = sum(_flops(limit, entry) for entry in counts) / limit["gflops"] / 1e9
                useful = sum(map(_useful, counts))
                found.append(Round(name, sum(answer["seconds"]), useful, least, answer["peak_mb"]))
    return found, errors


def _flops(limit: Answer, counts: dict[str, int]) -> float:
    return float(limit["body"] * counts["tokens"] + limit["head"] * _useful(counts))


def _of(found: list[Round], name: str) -> list[Round]:
    return [entry for entry in found if entry.contender == name]


def _against(found: list[Round], best: tuple[str, bool], leanest: float) -> list[Answer]:
    """Return speed and memory against SFTTrainer's defaults (A) and its best setting (B)."""
    ours, lean, rows = _of(found, OURS), _of(found, LEAN), []
    named = f"{best[0]}, checkpointing {'on' if best[1] else 'off'}"
    for label, peer, aim in ((f"A: {DEFAULTS[0]}, checkpointing on", _of(found, "A"), ">= 2"),
                             (f"B: {named}", _of(found, "B") or _of(found, "A"), ">= 1")):  # fmt: skip
        rows.append(row(f"useful tokens/s, {label}", _speeds(ours), _speeds(peer), aim))
        rows.append(row(f"share of bound, {label}", _shares(ours), _shares(peer), "ours >= 0.6"))
    mine = [max(entry.peak_mb for entry in ours)]
    rows.append(row("peak resident MB, A", mine, [max(entry.peak_mb for entry in _of(found, "A"))], "<= 0.5"))
    rows.append(row("peak resident MB, the leanest B", mine, [leanest], "<= 1"))
    theirs = _speeds(_of(found, "B") or _of(found, "A"))
    rows.append(row("useful tokens/s, ours in micro-batches of 256 tokens, B", _speeds(lean), theirs, ">= 1"))
    small = [max(entry.peak_mb for entry in lean)]
    rows.append(row("peak resident MB, ours in micro-batches of 256 tokens, the leanest B", small, [leanest], "<= 1"))
    return rows


def _speeds(entries: list[Round]) -> list[float]:
    return [entry.useful / entry.seconds for entry in entries]


def _shares(entries: list[Round]) -> list[float]:
    return [entry.bound / entry.seconds for entry in entries]


def _forms(found: list[Round]) -> list[Answer]:
    """Return seconds per round of rehearsal by the divergence (ours) against that by the likelihood (peer)."""
    plain = [entry.seconds for entry in _of(found, OURS)]
    return [
        row(f"seconds, rehearsal by {name} against nll", [entry.seconds for entry in entries], plain, aim)
        for name, aim in AIMS.items()
        if (entries := _of(found, name))
    ]


def _tails(tail: Answer) -> list[Answer]:
    """Return mean stored forms (ours) against the whole divergence (peer); the range is one standard error wide."""
    whole = tail["nats_per_token"]
    return [
        {
            "metric": f"{name.replace(' ', ', k = ')}, over the whole divergence: nats/token",
            "ours": round(form["ratio"] * whole, 4), "peer": round(whole, 4), "ratio": round(form["ratio"], 3),
            "ratio_low": round(form["ratio"] - form["error"], 3), "ratio_high": round(form["ratio"] + form["error"], 3),
            "aim": "",
        }
        for name, form in tail["forms"].items()
    ]  # fmt: skip


def _notes(plan: Plan, place: Place, found: list[Round], tail: Answer, started: float) -> list[str]:
    ours = _of(found, OURS)
    sizes = ", ".join(f"{size:.0f} at k = {k}" for k, size in tail["bytes_per_token"].items())
    seconds = statistics.median(entry.seconds for entry in ours) / plan.steps
    tokens = statistics.mean(counts["tokens"] for counts in place.batches)
    useful = statistics.mean(map(_useful, place.batches))
    return [
        f"a batch: {tokens:.0f} tokens, {useful:.0f} of them useful; {seconds:.2f} s a step of ours. Bound: best "
        "measured float32 matrix product of the round over 6 x body weights x tokens + 6 x head weights x useful.",
        f"{THREADS} threads; {plan.rounds} rounds of {plan.steps} steps in turn after {plan.warm} steps, "
        f"{(time.monotonic() - started) / 60:.1f} minutes in all.",
        f"stored forms: {tail['rows']} rows of the base, under the target's fine-tuning of one epoch; ratio of means "
        f"over tokens, range +- one standard error over rows. Bytes per token on disk, text and all: {sizes}.",
    ]


def _compared(apart: list[float], tried: dict[tuple[str, bool], Answer]) -> list[str]:
    """Say what SFTTrainer's settings gave, and how near the losses at the base's weights are."""
    lines = [f"losses at the base's weights, {len(apart)} batches of one row of either kind: {max(apart):.1e} apart"]
    for entry in tried.values():
        figures = "cannot run: " + entry["error"] if "error" in entry else (
            f"{entry['seconds']:.2f} s a step, {entry['peak_mb']:.0f} MB, first loss {entry['apart']:.1e} from ours"
        )  # fmt: skip
        lines.append(f"{entry['setting']}: {figures}")
    return lines


if __name__ == "__main__":
    main()
