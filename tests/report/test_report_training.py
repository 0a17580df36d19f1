"""What the report says of a training: its budget, its worst moment, its curves and costs, from planted artifacts."""

from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from cfsd.report.budget import judge, plain_variant
from cfsd.report.run_record import RunRecord
from cfsd.report.summarise import headline, summarise
from cfsd.report.table import shown
from cfsd.report.training import (
    CURVE_POINTS,
    in_blocks,
    metrics_of,
    panels_of,
    stability_gap,
    training_of,
)
from cfsd.report.verdict import budget_lines, verdict, warnings
from cfsd.store.artifact import Artifact, Draft, key_of
from cfsd.train.controller import LOWEST
from tests.report.test_report import World, recipe_of, report_of

Metrics = dict[int, dict[str, float]]
METADATA = {"steps": 40, "tokens": 9000, "target_tokens": 3000, "rehearsal_tokens": 6000, "peak_memory": 1_234_000_000}
PLAIN = {"rehearsal_tokens": 0, "tokens": 3000}


def path_of(weights: list[float], budget: float) -> Metrics:
    """Return metrics as training writes them: a value per step, and watched ones every ten steps from step 0."""
    steps: Metrics = {}
    for step, weight in enumerate(weights, 1):
        steps[step] = {
            "train/target_loss": 2 - step / 40, "train/rehearsal_loss": budget * step / 40,
            "train/rehearsal_weight": weight, "train/divergence_estimate": budget * min(1.2, step / 20),
        }  # fmt: skip
    for step in range(0, len(weights) + 1, 10):
        peak = 1 - abs(step - 20) / 20  # at step 20
        steps.setdefault(step, {})
        steps[step] |= {
            "watch/probe_kl": budget * (step / 40 + 2 * peak), "watch/target_loss": 2 - step / 40,
            "watch/cap/acc": 0.9 - 0.4 * peak - step / 400,
        }  # fmt: skip
    return steps


class Trained(World):
    """A world whose variants have a recipe, metadata and metrics of training of their own."""

    def variant(
        self,
        name: str,
        *,
        loss: float,
        kl: float,
        metadata: dict[str, Any] | None = None,
        metrics: Metrics | None = None,
        **recipe: Any,
    ) -> RunRecord:
        run_record = self.trained(name, right=80, loss=loss, kl=kl)
        tuned = self.model(name, METADATA | (metadata or {}), metrics or {})
        steps = tuple(s.model_copy(update={"artifact": tuned}) if s.stage == "train" else s for s in run_record.steps)
        artifacts = run_record.artifacts | {"tuned": tuned, "final": tuned}
        return run_record.model_copy(
            update={"recipe": recipe_of(name, **recipe), "artifacts": artifacts, "steps": steps}
        )

    def model(self, name: str, metadata: dict[str, Any], metrics: Metrics) -> Artifact:
        def work(draft: Draft) -> None:
            draft.metadata |= metadata
            (draft.folder / "name.txt").write_text(name)
            for step, values in metrics.items():
                draft.journal.metrics(step, values)

        return self.store.make(
            "model", key_of("model", name, f"{metadata} {metrics}"), work, environment={"device": "cpu"}
        )[0]

    def plain(self, name: str = "finetune", **recipe: Any) -> RunRecord:
        return self.variant(name, loss=0.5, kl=0.8, metadata=PLAIN, **{"generate": {"rows": 0}} | recipe)

    def budgeted(self, name: str = "budget", kl: float = 0.1, loss: float = 0.55, **metadata: Any) -> RunRecord:
        metadata = {"budget": 0.1, "final_weight": 2.5, "divergence_estimate": 0.101, "most_row_views": 3} | metadata
        metrics = path_of([1.1**step for step in range(40)], budget=0.1)
        rehearsal = {"budget": 0.1, "loss": "kl"}
        recipe = {"generate": {"top_logprobs": 64}, "train": {"rehearsal": rehearsal}}
        return self.variant(name, loss=loss, kl=kl, metadata=metadata, metrics=metrics, **recipe)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("world"))


# --- the budget ----------------------------------------------------------------------------------------------------


def probe(value: float, half: float) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "unit": "nats/token"}


@pytest.mark.parametrize(
    "value, half, outcome, tight",
    [
        (0.1, 0.005, "kept", True),
        (0.109, 0.005, "cannot tell", True),  # the value is below 0.11, its interval is not
        (0.112, 0.005, "cannot tell", True),
        (0.116, 0.005, "exceeded", True),
        (0.079, 0.005, "kept", None),
        (0.07, 0.005, "kept", False),
        (0.1, 0.04, "cannot tell", None),
        (0.5, 0.2, "exceeded", True),  # a wide interval, wholly above
        (0.05, 0.02, "kept", False),  # and wholly below
        (0.11, 0.0, "kept", True),
        (0.0, 0.0, "kept", False),
    ],
)
def test_a_budget_is_judged_by_the_probes_interval(value: float, half: float, outcome: str, tight: bool | None) -> None:
    for weight, binding in ((2.0, True), (LOWEST, False), (None, True)):
        judged = judge(probe(value, half), 0.1, weight)
        assert (judged["outcome"], judged["tight"], judged["binding"]) == (outcome, tight, binding)


def test_a_budget_that_merging_alone_keeps_tells_no_lambda(world: Trained) -> None:
    """The weight of rehearsal that was recorded steered nothing."""
    metrics, recipe = path_of([1e-5] * 40, budget=0.1), {"merge": {"budget": 0.1}}
    merged = world.variant("merged", loss=0.55, kl=0.09, metadata=PLAIN, metrics=metrics, **recipe)
    found = summarise(world.store, merged, [merged]).budget
    assert found and found["outcome"] == "kept" and found["binding"] and found["final_weight"] is None


def test_without_a_probe_or_an_interval_nothing_is_claimed() -> None:
    bare = {"value": 0.1, "low": None, "high": None, "unit": "nats/token"}
    for figure in (None, bare):
        judged = judge(figure, 0.1, 2.0)
        assert (judged["outcome"], judged["tight"], judged["needs"]) == ("cannot tell", None, None)


@pytest.mark.parametrize("value", [0.1, 0.108, 0.125])
def test_as_many_rows_as_are_asked_for_decide_if_the_value_stays(value: float) -> None:
    needs = judge(probe(value, 0.03), 0.1, 2.0)["needs"]
    assert needs and needs > 1
    for more, decided in ((1.05 * needs, True), (0.95 * needs, False)):
        narrower = judge(probe(value, 0.03 / more**0.5), 0.1, 2.0)
        assert (narrower["outcome"] != "cannot tell") == decided == (narrower["needs"] is None)


def test_a_budget_is_said_with_what_it_cost(world: Trained, tmp_path: Path) -> None:
    run_records = [world.plain(), world.budgeted()]
    summaries = [summarise(world.store, run_record, run_records) for run_record in run_records]
    budget = summaries[1].budget
    assert summaries[0].budget is None and budget is not None
    assert (budget["outcome"], budget["tight"], budget["plain"]) == ("kept", True, "finetune")
    assert budget["target_gain_cost"]["value"] == pytest.approx(0.05)
    assert budget["target_gain_cost"]["low"] > 0
    said = verdict(summaries)
    used = f"{shown(budget['ratio'], 100)} % of it was used; λ was 2.50 at the end"
    assert f"Budget of “budget”, 0.100 nats per token: kept and used up; {used}; it gave up" in said
    assert "; it gave up 0.0500 [0.0500, 0.0500] nats per token of the gain of “finetune”." in said
    cheap = summaries[1].model_copy(update={"budget": budget | {"target_gain_cost": probe(0.01, 0.02)}})
    unsure = "it is not shown to have given up any of the gain of “finetune” (0.0100 [-0.0100, 0.0300] nats per token)."
    assert budget_lines([cheap])[0].endswith(unsure)
    flat = headline(summaries[1])
    assert flat["budget/kept"] == flat["budget/tight"] == 1 and flat["budget/target_gain_cost"] == pytest.approx(0.05)
    alone = summarise(world.store, run_records[1]).budget
    assert alone and alone["target_gain_cost"] is None and alone["plain"] is None


def test_an_interval_too_wide_is_said_and_so_is_a_floor(world: Trained) -> None:
    found = summarise(world.store, world.budgeted()).model_copy(update={"name": "wide"})
    assert found.budget
    wide = found.model_copy(update={"budget": found.budget | judge(probe(0.1, 0.03), 0.1, 2.0)})
    said = (
        "kept or exceeded (the probe's interval is too wide to say); 100 [70.0, 130] % of it was used; "
        "about 9 times as many probe.rows would tell"
    )
    assert said in budget_lines([wide])[0]
    assert "budget/kept" not in headline(wide)
    lowest = found.model_copy(update={"budget": found.budget | judge(probe(0.01, 0.0005), 0.1, LOWEST)})
    assert "0.100 nats per token: kept with hardly any rehearsal; 10.0 [" in budget_lines([lowest])[0]


def merged(run_record: RunRecord, alpha: float, before: float = 0.14) -> RunRecord:
    """Return `run_record` with what the control sample said of a budget of 0.1."""
    metadata = {"alpha": alpha, "control_kl": 0.095, "control_kl_at_most": before}
    fitted = Artifact(kind="scores", key="0" * 16, content="0" * 16, metadata=metadata)
    return run_record.model_copy(update={"artifacts": run_record.artifacts | {"fitted": fitted}})


def test_merging_that_kept_a_budget_is_said(world: Trained) -> None:
    found = summarise(world.store, merged(world.budgeted(), 0.7))
    assert found.budget and (found.budget["alpha"], found.budget["ratio_before_merging"]) == (0.7, pytest.approx(1.4))
    (said,) = budget_lines([found])
    assert said.endswith("; merging with the base at alpha 0.700 brought it down from 140 %.")
    assert headline(found)["budget/alpha"] == 0.7
    for alpha in (1.0, 0.5):  # as trained, and as asked for
        untouched = summarise(world.store, merged(world.budgeted(), alpha, before=0.095))
        assert "merging" not in budget_lines([untouched])[0]


def test_seeds_of_a_budget_are_counted(world: Trained) -> None:
    kls = [0.1, 0.1, 0.3]
    repeats = [summarise(world.store, world.budgeted(f"b seed={i}", kl=kl)) for i, kl in enumerate(kls)]
    assert budget_lines(repeats) == [
        "Budget of “b”, 0.100 nats per token: kept and used up in 2 of 3 seeds, exceeded in 1 of 3 seeds."
    ]


def test_the_cost_is_against_plain_training_of_the_same_seed(world: Trained) -> None:
    seeds = [{"train": {"seed": seed, "rehearsal": {"budget": None}}} for seed in (0, 1)]
    plain = [world.plain(f"finetune seed={i}", **recipe) for i, recipe in enumerate(seeds)]
    others = [
        world.plain("merged", merge={"alpha": 0.5}),
        world.plain("lora", train={"methods": {"lora": {"rank": 8}}}),
        world.plain("l2", train={"methods": {"l2": {"weight": 0.1}}}),
        world.plain("merged to a budget", merge={"budget": 0.5}),
        world.plain("flow", mix={"flow": "sample"}),
        world.variant("rehearse", loss=0.6, kl=0.2, train={"seed": 1}),
    ]
    own = world.variant("b", loss=0.6, kl=0.1, train={"seed": 1, "rehearsal": {"budget": 0.1}})
    assert plain_variant(own, others) is None
    found = plain_variant(own, [*others, *plain])
    assert found and found.name == "finetune seed=1"
    off = {"l2": {"weight": 0}, "ewc": {"weight": 0.0, "rows": 64}, "lora": {"rank": 0, "alpha": 16}}
    assert plain_variant(own, [world.plain("neutral", train={"methods": off}, merge={"alpha": 1.0})])
    elsewhere = plain[1].model_copy(update={"artifacts": plain[1].artifacts | {"base": world.probe}})
    assert plain_variant(own, [elsewhere]) is None


# --- worst moments -------------------------------------------------------------------------------------------------


def test_the_worst_moment_counts_from_the_worse_end(world: Trained) -> None:
    found = stability_gap(world.store, world.budgeted())
    assert found is not None and list(found) == ["probe_kl", "target_loss", "cap/acc"]
    kl, loss, cap = found["probe_kl"], found["target_loss"], found["cap/acc"]
    assert kl["worst_step"] == 20 and kl["worst"] == pytest.approx(0.25) and kl["final"] == pytest.approx(0.1)
    assert kl["gap"] == pytest.approx(0.15)
    assert loss["worst"] == 2 and loss["gap"] == 0  # it only improved
    assert (cap["start"], cap["worst"], cap["final"]) == (0.9, pytest.approx(0.45), pytest.approx(0.8))
    assert cap["gap"] == pytest.approx(0.35) and cap["unit"] == "fraction"
    assert stability_gap(world.store, world.plain()) is None


def with_errors(metrics: Metrics, **errors: float) -> Metrics:
    """Return what a watcher writes beside the watched values: the error of each change since the first look."""
    scales = {"watch/probe_kl": "kl", "watch/target_loss": "loss", "watch/cap/acc": "acc"}
    return {
        step: values
        | {
            name.replace("watch/", "watch_error/"): errors[short]
            for name, short in scales.items()
            if name in values and short in errors
        }
        for step, values in metrics.items()
    }


def test_a_gap_stands_beside_what_chance_gives(world: Trained, tmp_path: Path) -> None:
    metrics = with_errors(path_of([1.0] * 40, budget=0.1), kl=0.01, acc=0.3)
    run_record = world.variant("looked at", loss=0.55, kl=0.1, metrics=metrics, train={"watch": {"every": 10}})
    found = stability_gap(world.store, run_record)
    assert found
    kl, loss, cap = found["probe_kl"], found["target_loss"], found["cap/acc"]
    level = stats.norm.ppf(0.95 ** (1 / 3))  # three looks between the first and the last
    assert kl["looks"] == 5 and kl["null_band"] == pytest.approx(0.01 * level) and kl["gap"] > kl["null_band"]
    assert cap["null_band"] == pytest.approx(0.3 * level) and cap["gap"] < cap["null_band"]
    assert loss["null_band"] is None
    assert headline(summarise(world.store, run_record))["stability_gap_band/probe_kl"] == pytest.approx(0.01 * level)
    panels = {panel.name: panel for panel in panels_of(world.store, [run_record])}
    assert panels["probe_kl"].bands == {"looked at": pytest.approx((0.1, 0.1 + 0.01 * level))}
    end = 0.9 - 0.1
    assert panels["watch/cap/acc"].bands == {"looked at": pytest.approx((100 * end, 100 * (end - 0.3 * level)))}
    assert panels["target_loss"].bands == {}
    page = report_of(world, [run_record], tmp_path / "report.html")
    worst = page.part("The worst moment", "These are the values of training")
    assert worst.count("found") == 2 and worst.count("not known") == 1  # a gap, and the words that say what found means
    assert "Shaded: how far beyond the worse" in page.words


def test_a_training_that_recorded_no_errors_has_no_band(world: Trained, tmp_path: Path) -> None:
    page = report_of(world, [world.budgeted()], tmp_path / "report.html")
    assert page.part("The worst moment", "These are the values").count("not known") == 3
    assert "Shaded" not in page.words


def test_a_benchmark_of_unknown_sign_is_read_by_its_metric(world: Trained) -> None:
    watched = {"watch/wiki/word_perplexity": 9.0, "watch/other/f1": 0.5}
    series = {0: watched, 1: dict.fromkeys(watched, 0.7), 2: dict.fromkeys(watched, 0.6)}
    found = stability_gap(world.store, world.variant("unknown", loss=0.5, kl=0.1, metrics=series))
    assert found and found["wiki/word_perplexity"]["worst_step"] == 0 and found["other/f1"]["worst_step"] == 0


# --- curves, costs, page -------------------------------------------------------------------------------------------


def test_only_what_exists_is_drawn(world: Trained) -> None:
    kl = world.budgeted("kl")
    nll = world.variant("nll", loss=0.6, kl=0.2, metrics={
        s: {"train/target_loss": 1.0, "train/rehearsal_loss": 3.0, "train/rehearsal_weight": 1.0} for s in (1, 2)
    })  # fmt: skip
    panels = {panel.name: panel for panel in panels_of(world.store, [kl, nll])}
    assert list(panels) == [
        "target", "rehearsal nll", "rehearsal kl", "weight", "divergence", "probe_kl", "target_loss", "watch/cap/acc",
    ]  # fmt: skip
    assert list(panels["rehearsal nll"].lines) == ["nll"] and list(panels["rehearsal kl"].lines) == ["kl"]
    assert panels["weight"].is_log and panels["divergence"].levels == {"kl": 0.1}
    assert panels["watch/cap/acc"].lines["kl"][1][0] == 90 and panels["watch/cap/acc"].lines["kl"][0][0] == 0
    constant = [panel.name for panel in panels_of(world.store, [nll])]
    assert constant == ["target", "rehearsal nll"]
    assert panels_of(world.store, [world.plain()]) == []


@pytest.mark.parametrize("change", [{"filter": {"duplicates": True}}, {"generate": {"temperature": 0.7}}])
def test_a_divergence_along_rows_that_are_no_sample_is_called_that(world: Trained, change: dict[str, Any]) -> None:
    metrics = {1: {"train/rehearsal_loss": 0.2}, 2: {"train/rehearsal_loss": 0.1}}
    recipe = {"train": {"rehearsal": {"loss": "kl"}}, "generate": {"top_logprobs": 8} | change.get("generate", {})}
    changed = world.variant(
        "along", loss=0.5, kl=0.1, metrics=metrics, **{**recipe, "filter": change.get("filter", {})}
    )
    (panel,) = panels_of(world.store, [changed])
    assert panel.label == "divergence along the rehearsed rows, nats per token" and list(panel.lines) == ["along"]
    (panel,) = panels_of(world.store, [world.variant("exact", loss=0.5, kl=0.1, metrics=metrics, **recipe | {
        "generate": {"top_logprobs": 8}})])  # fmt: skip
    assert panel.label == "rehearsal divergence, nats per token"


def test_variants_of_one_training_share_its_curve(world: Trained) -> None:
    one = world.budgeted("wise alpha=0.5")
    both = [one, one.model_copy(update={"name": "wise alpha=1"})]
    (lines,) = [panel.lines for panel in panels_of(world.store, both) if panel.name == "weight"]
    assert list(lines) == ["wise alpha=0.5"]


def test_long_curves_are_averaged_and_what_is_no_number_stays_out(world: Trained) -> None:
    steps, values = in_blocks({step: float(step % 2) for step in range(1, 10_001)}, 10)
    assert len(steps) <= CURVE_POINTS and all(4.5 < value < 5.5 for value in values)
    assert in_blocks({1: 5.0}) == ([1], [5.0]) and in_blocks({1: 5.0, 2: 6.0}) == ([1, 2], [5.0, 6.0])
    burst = world.model("burst", METADATA, {2: {"x": 1.0}, 1: {"x": 3.0}, 3: {"x": float("nan")}})
    assert metrics_of(world.store, burst) == {"x": {1: 3.0, 2: 1.0}}


def test_the_page_tells_the_training(world: Trained, tmp_path: Path) -> None:
    run_records = [world.plain(), world.budgeted(stopped_at_step=31)]
    path = tmp_path / "report.html"
    page = report_of(world, run_records, path)
    training = page.part("Losses are those of each training step", "Answers that changed")
    assert "The worst moment" in training and "Dashed: a budget" in training
    for label in ("rehearsal weight λ (log scale)", "moving mean of the divergence", "cap: acc, %", "budget 0.1"):
        assert label in page.words
    assert "budget of probe_kl, nats/token 0.100" in page.words
    assert "Warning: the training of “budget” was stopped at step 31" in page.words
    costs = page.part("Training, model by model", "Peak memory is that of the training process")
    for text in ("9,000", "6,000", "1.23 3", "31 of 40"):
        assert text in costs
    assert "nan" not in path.read_text()


@pytest.mark.parametrize(("steps", "said"), [(28, ["λ of “budget” had only 28 steps"]), (80, [])])
def test_a_budget_with_too_few_steps_to_steer_is_told(world: Trained, steps: int, said: list[str]) -> None:
    run_record = world.budgeted(steps=steps)
    found = warnings([summarise(world.store, merged(run_record, 0.7))])
    assert len(found) == len(said) and all(words in line for words, line in zip(said, found, strict=True))
    assert (
        warnings([summarise(world.store, merged(run_record, 1.0, before=0.095))]) == []
    )  # it was kept without merging
    assert warnings([summarise(world.store, world.plain())]) == []
    unsteered = merged(world.budgeted(steps=steps, divergence_estimate=None), 0.7)
    assert warnings([summarise(world.store, unsteered)]) == []


@pytest.mark.parametrize(("share", "told"), [(0.62, 1), (0.08, 0)])
def test_weights_that_rounding_took_back_are_told(world: Trained, share: float, told: int) -> None:
    """Of the final model: merged, it was rounded anew."""
    found = warnings([summarise(world.store, world.budgeted(steps=80, rounding_undid=share))])
    assert len(found) == told and all("takes back 62.0 % of what the training of “budget” changed" in f for f in found)


def test_an_old_summary_without_these_parts_still_reads(world: Trained) -> None:
    summary = summarise(world.store, world.budgeted())
    plain = type(summary)(**summary.model_dump(exclude={"budget", "stability_gap", "training"}))
    started = ("budget/", "stability_gap/", "worst/", "training/")
    assert not [name for name in headline(plain) if name.startswith(started)] and warnings([plain]) == []
    assert "budget" not in verdict([plain]).replace("“budget”", "")


def test_the_weight_is_told_of_tokens_and_of_strings(world: Trained) -> None:
    counts = {"target_rows": 100, "target_tokens": 1200, "rehearsal_rows": 50, "rehearsal_tokens": 3000}
    run_record = world.budgeted()
    mixture = run_record.artifacts["mixture"].model_copy(update={"metadata": counts})
    found = training_of(
        world.store, run_record.model_copy(update={"artifacts": run_record.artifacts | {"mixture": mixture}})
    )
    assert found and found["rehearsal_weight"] == pytest.approx(1.1**39)
    assert found["string_weight"] == pytest.approx(1.1**39 * 12 / 60)
    assert "string_weight" not in (training_of(world.store, world.plain()) or {})
