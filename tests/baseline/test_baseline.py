"""The committed baseline: what it keeps, that it reads back, and what it is compared with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfsd.baseline.file import (
    Baseline,
    Measured,
    as_text,
    baseline_of,
    check_place,
    commit_here,
    guarded,
    other_documents,
    parsed,
    read_baseline,
    with_margins,
    write_baseline,
)
from cfsd.baseline.measured import measured
from cfsd.errors import BadInput
from cfsd.recipe import Recipe
from cfsd.statistics.figures import FRACTION, MEAN, NATS
from cfsd.statistics.gate import judge
from cfsd.store.artifact import Artifact
from cfsd.store.tables import CORPUS, table_of
from tests.conftest import ROOT
from tests.report.test_report import World

DOCUMENTS = 60
Run = dict[str, Measured]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.load(ROOT / "deployments" / "recipes" / "tiny.yaml")


def runs(count: int, seed: int = 0, *, loss: float = 0.0, documents: str = "same") -> list[Run]:
    """Return what `count` seeds came to; `loss` is the share of documents lost beyond the usual 20 %."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        shares = {name: (rng.uniform(size=DOCUMENTS) < 0.2 + loss).astype(float) for name in ("half", "none")}
        ones, tokens = np.ones(DOCUMENTS), rng.integers(5, 6, DOCUMENTS).astype(float)
        benchmarks = {
            f"forgetting/{name}": Measured(FRACTION, False, 1, lost, ones, documents, correction)
            for (name, lost), correction in zip(shares.items(), (2.0, 1.0), strict=True)
        }
        gain = Measured(NATS, True, 0, rng.normal(5, 0.5, DOCUMENTS), tokens, documents)
        level = rng.lognormal(-6, 0.3)  # seeds scatter by factors
        kl = Measured(NATS, False, 0, level * rng.lognormal(-0.3, 0.8, DOCUMENTS) * tokens, tokens, documents)
        found.append({"target_gain": gain, "probe_kl": kl, **benchmarks})
    return found


def test_a_figure_of_another_metric_is_refused(recipe: Recipe) -> None:
    def of_metric(metric: str, unit: str = FRACTION) -> list[Run]:
        named = {"metric": metric, "unit": unit}
        return [run | {"forgetting/half": run["forgetting/half"]._replace(**named)} for run in runs(5)]

    known = baseline_of(recipe, range(5), of_metric("acc"), [10.0] * 5, replaces="")
    assert known.figures["forgetting/half"].metric == "acc" and guarded(known, of_metric("acc"))
    with pytest.raises(BadInput, match="forgetting/half as acc, and this recipe measures it as acc_norm"):
        guarded(known, of_metric("acc_norm"))
    known.check_metrics({"forgetting/half": "acc", "forgetting/none": None, "forgetting/new": "f1"})
    with pytest.raises(BadInput, match="forgetting/half as acc, and this recipe measures it as f1"):
        known.check_metrics({"forgetting/half": "f1"})
    unnamed = {name: figure.model_copy(update={"metric": ""}) for name, figure in known.figures.items()}
    before = known.model_copy(update={"figures": unnamed})
    assert guarded(before, of_metric("acc_norm"))  # a file of before metrics were kept
    with pytest.raises(BadInput, match="forgetting/half as fraction, and this recipe measures it as nats/token"):
        guarded(before, of_metric("ppl", NATS))


def made(recipe: Recipe, count: int = 5) -> Baseline:
    return baseline_of(recipe, range(count), runs(count), [10.0] * count, replaces="")


def test_it_reads_back_as_written_with_one_line_per_list(recipe: Recipe, tmp_path: Path) -> None:
    baseline, file = made(recipe), tmp_path / "new" / "tiny.json"
    write_baseline(file, baseline)
    assert read_baseline(file) == baseline
    assert ' "seeds": [0, 1, 2, 3, 4],' in file.read_text().splitlines()
    assert [path.name for path in file.parent.iterdir()] == ["tiny.json"]


def test_it_says_where_it_comes_from(recipe: Recipe) -> None:
    source = made(recipe).provenance
    assert source.recipe_digest == recipe.digest() and source.commit == commit_here()
    assert {"python", "torch", "transformers"} <= set(source.versions) and "UTC" in source.date
    assert Recipe.model_validate(made(recipe).recipe) == recipe


def test_the_mean_weighs_benchmarks_by_their_chance(recipe: Recipe) -> None:
    baseline = made(recipe)
    own = [np.array(baseline.figures[f"forgetting/{name}"].values) for name in ("half", "none")]
    assert np.allclose(baseline.figures[MEAN].values, (2 * own[0] + own[1]) / 2, atol=1e-5)


def test_fewer_seeds_than_five_are_refused(recipe: Recipe) -> None:
    with pytest.raises(BadInput, match="5 or more"):
        made(recipe, 4)


def test_the_same_again_passes_and_what_forgets_fails(recipe: Recipe) -> None:
    baseline = made(recipe, 8)
    honest, worse = (judge(guarded(baseline, runs(2, seed=9, loss=loss))) for loss in (0.0, 0.7))
    assert honest.outcome != "fail" and worse.outcome == "fail"
    failed = {finding.name for finding in worse.findings if finding.outcome == "fail"}
    assert {"forgetting/half", "forgetting/none", MEAN} >= failed and MEAN in failed


@pytest.mark.parametrize("reach", [1.0, 100.0])  # ROUGE, chrF
def test_a_graded_score_that_was_always_the_same_may_change_by_a_document(recipe: Recipe, reach: float) -> None:
    def scored(of_one_document: float) -> Run:
        lost = np.zeros(DOCUMENTS)
        lost[0] = of_one_document * reach
        graded = Measured("f1", False, reach, lost, np.ones(DOCUMENTS), "same")
        return runs(1)[0] | {"forgetting/graded": graded}

    known = baseline_of(recipe, range(5), [scored(0.0)] * 5, [10.0] * 5, replaces="")
    old = known.figures["forgetting/graded"].model_copy(update={"margin": 0.0, "least_spread": 0.0})
    for baseline in (known, known.model_copy(update={"figures": known.figures | {"forgetting/graded": old}})):
        (finding,) = (f for f in judge(guarded(baseline, [scored(0.05)] * 2)).findings if f.name.endswith("graded"))
        assert finding.outcome != "fail" and finding.worsening == pytest.approx(0.05 * reach / DOCUMENTS)
    (finding,) = (f for f in judge(guarded(known, [worse(scored(0.0), reach)] * 2)).findings if f.outcome == "fail")
    assert finding.name == "forgetting/graded"


def worse(run: Run, reach: float) -> Run:
    graded = run["forgetting/graded"]
    return run | {"forgetting/graded": graded._replace(sums=graded.sums + 0.3 * reach)}


def test_other_documents_are_less_sharp_and_named(recipe: Recipe) -> None:
    baseline = made(recipe)
    same, others = ({g.name: g for g in guarded(baseline, runs(2, 9, documents=d))} for d in ("same", "others"))
    assert other_documents(baseline, runs(1, 9)[0]) == []
    assert "target_gain" in other_documents(baseline, runs(1, 9, documents="others")[0])
    assert others["forgetting/half"].document_variance > same["forgetting/half"].document_variance
    assert others["forgetting/half"].document_variance == pytest.approx(0.16 / 60 * 2, rel=0.7)


def test_a_divergence_is_judged_as_a_ratio_whatever_its_size(recipe: Recipe) -> None:
    def larger(runs: list[Run], factor: float) -> list[Run]:
        return [run | {"probe_kl": run["probe_kl"]._replace(sums=factor * run["probe_kl"].sums)} for run in runs]

    found = []
    for size in (1.0, 10.0):
        known = baseline_of(recipe, range(5), larger(runs(5), size), [1.0] * 5, replaces="")
        fresh = larger(runs(2, seed=9), 3 * size)
        figure = next(g for g in guarded(known, fresh) if g.name == "probe_kl")
        assert figure.as_ratio and not any(g.as_ratio for g in guarded(known, fresh) if g.name != "probe_kl")
        found.append((judge([figure]).findings[0], figure.document_variance, known.figures["probe_kl"]))
    (small, variance, _), (large, same, kept) = found
    assert kept.margin_is == "factor" and kept.margin > 1 and set(made(recipe).figures) == set(known.figures)
    assert small.worsening == pytest.approx(large.worsening, rel=1e-4) and variance == pytest.approx(same, rel=1e-3)
    values = [[run["probe_kl"].value for run in some] for some in (runs(5), runs(2, seed=9))]
    expected = np.log(3) + np.mean(np.log(values[1])) - np.mean(np.log(values[0]))
    assert small.worsening == pytest.approx(expected, rel=1e-4)


def version_1(baseline: Baseline, margin: float) -> str:
    content = json.loads(as_text(baseline))
    for figure in content["figures"].values():
        del figure["margin_is"]
    content["figures"]["probe_kl"]["margin"] = margin
    return json.dumps(content | {"version": 1})


def test_a_baseline_of_version_1_passes_as_much_as_it_did_and_says_so(recipe: Recipe) -> None:
    known = made(recipe)
    read = parsed(version_1(known, 0.002), "b.json")
    mean = float(np.exp(np.mean(np.log(known.figures["probe_kl"].values))))
    assert mean * read.figures["probe_kl"].margin == pytest.approx(mean + 0.002, rel=1e-4)
    others = {name: figure for name, figure in read.figures.items() if name != "probe_kl"}
    assert others == {name: figure for name, figure in known.figures.items() if name != "probe_kl"}
    (said,) = read.said
    assert said.startswith("the margin of probe_kl, 0.002 nats/token in a baseline of version 1")
    again = parsed(as_text(read), "b.json")
    assert again.figures == read.figures and again.version == 2 and not again.said


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("probe_kl", {"margin": 0.005}, r"probe_kl is judged by ratios.*such as 1\.5 \(given 0\.005, factor\)"),
        ("probe_kl", {"margin_is": "difference"}, "probe_kl is judged by ratios: set margin_is to factor"),
        ("target_gain", {"margin_is": "factor"}, "target_gain may be below 0: set margin_is to difference"),
    ],
)
def test_a_margin_of_the_wrong_kind_is_refused(
    recipe: Recipe, name: str, changes: dict[str, Any], message: str
) -> None:
    content = json.loads(as_text(made(recipe)))
    content["figures"][name] |= changes
    with pytest.raises(BadInput, match=message):
        parsed(json.dumps(content), "b.json")


def test_the_verdict_shows_a_ratio_as_a_factor_and_in_nats(recipe: Recipe) -> None:
    from flows._verdict import listed, sentence_of, table, warnings

    known = parsed(version_1(made(recipe), 0.002), "b.json")
    fresh = runs(2, seed=9)
    worse = [run | {"probe_kl": run["probe_kl"]._replace(sums=1000 * run["probe_kl"].sums)} for run in fresh]
    found = judge(guarded(known, worse))
    first, factor = found.findings[0], np.exp(found.findings[0].worsening)
    assert first.name == "probe_kl" and factor == pytest.approx(first.after / first.before)
    shown = f"{factor:.3g} times ({first.after - first.before:+.3g} nats/token)"
    assert f"probe_kl by {shown} (margin {np.exp(first.margin):.3g} times (+0.002 nats/token))" in sentence_of(
        found, known
    )
    assert f"| probe_kl | {first.before:.3g} nats/token | {first.after:.3g} nats/token | {shown} |" in table(
        found, known, recipe, []
    )
    assert warnings(known, recipe, [1.0], worse[0])[0] == known.said[0]
    assert f"times ({0.002:+.3g})" in listed(known)
    odd = found.model_copy(update={"findings": (first.model_copy(update={"name": "a|b<script>"}),)})
    assert "| a\\|b\\<script> | " in table(odd, known, recipe, ["[x](http://e)"])
    assert "* [x\\](http:\\//e)" in table(odd, known, recipe, ["[x](http://e)"])


def test_a_figure_that_is_not_measured_any_more_is_named(recipe: Recipe) -> None:
    run = runs(1)[0]
    del run["forgetting/half"]
    with pytest.raises(BadInput, match="forgetting/half"):
        guarded(made(recipe), [run])


@pytest.mark.parametrize("text", [None, "{", '{"name": "x"}'])
def test_what_is_no_baseline_is_said_with_what_to_do(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadInput, match="--update-baseline"):
        read_baseline(file)


def test_the_committed_ones_are_of_the_recipes_they_name() -> None:
    for file in (ROOT / "deployments" / "baselines").glob("*.json"):
        baseline = read_baseline(file)
        Recipe.model_validate(baseline.recipe)
        assert file.stem == baseline.name and len(baseline.seeds) >= 5


def test_the_last_bits_of_scores_do_not_make_other_documents(tmp_path: Path) -> None:
    world = World(tmp_path)
    run_record = world.trained("rehearse", right=80, loss=0.6, kl=0.05)
    elsewhere = run_record.model_copy(
        update={"before": run_record.before.model_copy(update={"target": world.responses("base", 2.000001, 1)})}
    )
    other = run_record.model_copy(
        update={"artifacts": run_record.artifacts | {"target": run_record.artifacts["mixture"]}}
    )
    here, there, others = (measured(world.store, t)["target_gain"] for t in (run_record, elsewhere, other))
    assert here.documents == there.documents != others.documents and here.value != there.value
    probes = [probe_of(world, *given) for given in ((5, -1.0), (5, -1.000001), (6, -1.0))]
    runs = [run_record.model_copy(update={"artifacts": run_record.artifacts | {"probe": probe}}) for probe in probes]
    here, there, others = (measured(world.store, t)["probe_kl"] for t in runs)
    assert here.documents == there.documents != others.documents


def probe_of(world: World, token_id: int, logprob: float) -> Artifact:
    row = {"row_id": 0, "source": "context-free", "token_ids": [0, token_id], "logprobs": [None, logprob],
           "finish_reason": "length", "shard": 0, "seed": 0, "text": "a"}  # fmt: skip
    return world.artifact("corpus", f"{token_id} {logprob}", {"rows": 1}, {"corpus": table_of(CORPUS, [row])})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"figures": {}}, "at least 1 item"),
        ({"version": 3}, "version"),
        ({"seeds": [0, 1, 2, 3, 4, 5]}, "5 values for 6 seeds"),
        ({"figures": "without half"}, "made of forgetting/half"),
    ],
)
def test_what_was_edited_to_pieces_is_refused(recipe: Recipe, changes: dict[str, Any], message: str) -> None:
    content = json.loads(as_text(made(recipe)))
    if changes.get("figures"):
        changes = {"figures": {name: f for name, f in content["figures"].items() if name != "forgetting/half"}}
    with pytest.raises(BadInput, match=f"(?s){message}.*--update-baseline"):
        parsed(json.dumps(content | changes), "b.json")


def test_a_place_for_a_baseline_is_looked_at_before_anything_is_trained(tmp_path: Path) -> None:
    check_place(tmp_path / "new" / "folder" / "mine.json")
    (tmp_path / "mine.json").write_text("broken")
    check_place(tmp_path / "mine.json")
    (tmp_path / "recipe.yaml").write_text("base: tiny")
    with pytest.raises(BadInput, match=r"recipe\.yaml is there and is no baseline; give a file that is new"):
        check_place(tmp_path / "recipe.yaml")
    with pytest.raises(BadInput, match="is not a folder that can be written to"):
        check_place(tmp_path / "recipe.yaml" / "base.json")


def test_a_margin_that_a_team_edited_outlives_a_new_baseline(recipe: Recipe) -> None:
    content = json.loads(as_text(made(recipe)))
    assert parsed(json.dumps(content), "b.json").edited_margins() == set()
    content["figures"]["target_gain"]["margin"] = 0.5
    content["figures"]["probe_kl"]["margin"] = 9
    known = parsed(json.dumps(content), "b.json")
    assert known.edited_margins() == {"target_gain", "probe_kl"}
    fresh = baseline_of(recipe, range(5, 10), runs(5, 7), [1.0] * 5, "")
    kept = with_margins(fresh, known, known.edited_margins())
    assert (kept.figures["target_gain"].margin, kept.figures["probe_kl"].margin) == (0.5, 9)
    assert kept.figures["forgetting/half"] == fresh.figures["forgetting/half"]
