"""What larger models cost: tokens, FLOPs, hours, gigabytes and money of each stage, by the plan and stated assumptions.

python -m benchmarks.scaling        writes the tables into docs/scaling.md

Nothing is run, and no GPU was measured: token counts and memory are the plan's, rates and prices are HARDWARE.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._result import markdown
from cfsd import stages
from cfsd.estimate import GIB, STAGES, Estimate, disk_bytes, job_of, parameters_of
from cfsd.machine import Machine
from cfsd.recipe import Recipe
from flows._plan import Plan, checked, costs
from flows.mitigate import pipeline

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- made by python -m benchmarks.scaling -->", "<!-- end -->"
USABLE = 0.92  # of a GPU's memory
MODELS_WATCHED, NIGHTS = 100, 365


class Hardware(NamedTuple):
    """GPUs of one machine; `rate`: FLOPs a second that one reaches, `price`: of the whole machine, per hour."""

    name: str
    gpus: int
    gigabytes: int
    rate: float
    price: float


class Setting(NamedTuple):
    """What is trained: a shipped recipe, and changes to it."""

    name: str
    recipe: str
    changes: tuple[str, ...] = ()


HARDWARE = (
    Hardware("1 x 24 GB", 1, 24, 4e13, 0.8),
    Hardware("1 x 80 GB", 1, 80, 1e14, 2.0),
    Hardware("8 x 80 GB", 8, 80, 1e14, 16.0),
)
SETTINGS = (  # no commit of 70B: nothing of it is fetched
    Setting("OLMo-1B, all weights", "olmo-1b-metamath"),
    Setting("R1-Distill-Llama-8B, all weights", "r1-distill-llama-8b-medreason"),
    Setting("Qwen3-8B, QLoRA", "qwen3-8b-qlora"),
    Setting("70B, QLoRA", "qwen3-8b-qlora", (f"base=deepseek-ai/DeepSeek-R1-Distill-Llama-70B@{40 * '0'}",)),
)
WAYS: tuple[dict[str, Any], ...] = (  # to make it fit, the fastest first: fields of the machine
    {"micro_batch_tokens": 4096}, {"micro_batch_tokens": 4096, "gradient_checkpointing": True},
    {"micro_batch_tokens": 1024, "gradient_checkpointing": True},
)  # fmt: skip
PARTS = {
    "sample": (stages.GENERATE, stages.PROBE, stages.CHAT), "train": (stages.TRAIN,),
    "evaluate": (
        stages.EVALUATE, stages.EVALUATE_TARGET, stages.EVALUATE_TARGET_DIVERGENCE, stages.EVALUATE_PROBE,
        stages.EVALUATE_CHAT, stages.SHOW,
    ),
}  # fmt: skip
COLUMNS = ["machine", "stage", "memory, GiB", "tokens, millions", "FLOPs", "hours", "money"]
DIVERGENCES = (stages.EVALUATE_PROBE, stages.EVALUATE_CHAT)  # measured every night, beside the benchmarks


class Found(NamedTuple):
    """A plan on one machine."""

    plan: Plan
    machine: Machine
    costs: list[tuple[Any, Estimate]]

    def memory(self) -> dict[str, float]:
        """Return GiB of one process of each stage, of a stage that comes several times the most."""
        found: dict[str, float] = {}
        for step, cost in self.costs:
            found[step.stage] = max(found.get(step.stage, 0.0), (cost.memory or 0.0) / GIB)
        return found

    def hours(self, wanted: tuple[str, ...]) -> float:
        """Return hours of stages."""
        return sum(cost.seconds or 0 for step, cost in self.costs if step.stage in wanted) / 3600

    def tokens(self, wanted: tuple[str, ...]) -> float:
        """Return tokens that pass through the model in stages."""
        return sum(cost.tokens or 0 for step, cost in self.costs if step.stage in wanted)

    def flops(self, wanted: tuple[str, ...]) -> float:
        """Return 2 FLOPs per weight, token and pass."""
        job = job_of(self.plan.recipe, self.plan.base, self.plan.target, self.machine)
        works = [STAGES[step.stage](job, step.inputs) for step, _ in self.costs if step.stage in wanted]
        weights = parameters_of(self.plan.recipe, self.plan.base) or 0
        return sum(2 * weights * work.tokens * work.passes for work in works if work)


def main() -> None:
    """Write the tables."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.partition(END)[2]}")


def tables() -> str:
    """Return the tables of costs, setting by setting, and that of nightly gates."""
    found = {(setting, hardware): _fitting(setting, hardware) for setting in SETTINGS for hardware in HARDWARE}
    parts = []
    for setting in SETTINGS:
        rows = [row for hardware in HARDWARE for row in _rows(setting, hardware, found[setting, hardware])]
        parts += [f"### {setting.name}\n", markdown([COLUMNS, *rows])]
    gates = [["", "machine", "one gate, hours", f"{MODELS_WATCHED} models, {NIGHTS} nights, hours", "money"]]
    gates += [_gate(setting, hardware, one) for (setting, hardware), one in found.items() if one]
    return "\n".join([*parts, "### A gate every night\n", markdown(gates)])


def _fitting(setting: Setting, hardware: Hardware) -> Found | None:
    ways = (_planned(setting, hardware, way) for way in WAYS)
    return next(
        (found for found in ways if max(found.memory().values()) <= USABLE * hardware.gigabytes * 1e9 / GIB), None
    )


def _planned(setting: Setting, hardware: Hardware, way: dict[str, Any]) -> Found:
    shared = {"training_processes": hardware.gpus, "processes": hardware.gpus}
    sharding = "shard" if hardware.gpus > 1 and "QLoRA" not in setting.name else "replicate"
    machine = Machine(device="cuda", sharding=sharding, **shared, **way)
    recipe = Recipe.load(ROOT / "deployments" / "recipes" / f"{setting.recipe}.yaml", list(setting.changes))
    with checked([recipe], machine, pipeline, only_plan=True) as plans:
        found = list(costs(plans, machine, hardware.rate))
    return Found(plans[0], machine, found)


def _rows(setting: Setting, hardware: Hardware, found: Found | None) -> Iterator[list[str]]:
    if found is None:
        least = _planned(setting, hardware, WAYS[-1]).memory()
        stage, most = max(least.items(), key=lambda entry: entry[1])
        yield [hardware.name, f"does not fit: {stage}", f"{most:.0f}", *["-"] * 4]
        return
    memory, every = found.memory(), tuple(stage for wanted in PARTS.values() for stage in wanted)
    for part, wanted in PARTS.items():
        hours = found.hours(wanted)
        cost = f"{found.flops(wanted):.1e}", f"{hours:.2f}", f"{hours * hardware.price:.2f}"
        most = max(memory.get(stage, 0) for stage in wanted)
        yield [hardware.name, part, f"{most:.0f}", f"{found.tokens(wanted) / 1e6:.1f}", *cost]
    hours = found.hours(every)
    disk = disk_bytes(found.plan.recipe, parameters_of(found.plan.recipe, found.plan.base)) / GIB
    settings = f"**all**, {_settings(found.machine)}, disk {disk:.0f} GiB"
    yield [hardware.name, settings, "", "", "", f"**{hours:.1f}**", f"**{hours * hardware.price:.0f}**"]


def _settings(machine: Machine) -> str:
    used = [f"{machine.micro_batch_tokens:,} tokens", *(["checkpointing"] * machine.gradient_checkpointing)]
    return ", ".join([*used, *([machine.sharding] if machine.resolved_training_processes() > 1 else [])])


def _gate(setting: Setting, hardware: Hardware, found: Found) -> list[str]:
    hours = found.hours(DIVERGENCES) + found.hours((stages.EVALUATE,)) / 2  # half of the plan's scores are the base's
    year = hours * MODELS_WATCHED * NIGHTS
    return [setting.name, hardware.name, f"{hours:.2f}", f"{year:,.0f}", f"{year * hardware.price:,.0f}"]


if __name__ == "__main__":
    main()
