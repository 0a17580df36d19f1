"""The report from small artifacts with the real tables: what it says, leaves out and never does."""

import io
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import JsonValue
from rich.console import Console

from cfsd.recipe import Recipe
from cfsd.report.comparisons import comparisons_of
from cfsd.report.figures.curves import curve_figures
from cfsd.report.figures.forest import forest_figures
from cfsd.report.figures.frontier import frontier_figure
from cfsd.report.figures.look import styles
from cfsd.report.figures.svg import svg_of
from cfsd.report.files import ReportSource, write_files
from cfsd.report.measures import MEASURES, Measure, ScoreTables
from cfsd.report.report_page import write_report
from cfsd.report.run_record import RunRecord, Scores, Step
from cfsd.report.scores import loss_fall
from cfsd.report.summarise import headline, summarise
from cfsd.report.summary import Summary
from cfsd.report.table import number, shown, summary_frame, told_apart
from cfsd.report.terminal import print_summary
from cfsd.report.training import Panel
from cfsd.report.verdict import two_sentences
from cfsd.statistics.figures import Figure as StatFigure
from cfsd.store.artifact import Artifact, Draft, Store, key_of
from cfsd.store.tables import CORPUS, DIVERGENCE, REJECTS, RESPONSES, batches, table_of, write_shard

HOSTILE = "<bos><script>alert('x')</script> & \x00 $a_b$"
BENCHMARKS = {"cap": 0.0, "choice": 0.25}  # name -> chance
DOCUMENTS = 100
SELECTED = {"train_rows": 5, "held_out_rows": 20, "selected": 5, "of": 500, "method": "random"}
Tables = dict[str, pa.Table]


def recipe_of(name: str, **changes: Any) -> Recipe:
    return Recipe.model_validate(
        {"name": name, "base": "tiny", "target": {"path": "rows.jsonl", "held_out": 20}, **changes}
    )


class World:
    """A store filled by hand: one base model, its probe and target, and variants of any damage."""

    def __init__(self, home: Path, *, text: str = "<bos>rev:abc=cba<eos>") -> None:
        self.store = Store(home)
        self.base = self.artifact("model", "base", {"parameters": 12345, "architecture": "Llama", "context": 256})
        target_facts = {"train_rows": 500, "held_out_rows": 20, "dropped": {"seen before": 17}}
        self.target = self.artifact("target", "rot", target_facts)
        self.probe = self.artifact("corpus", "probe", {"rows": 20})
        rows = [
            {
                "row_id": i, "source": "context-free", "token_ids": [0, 5, 6], "logprobs": [None, -1.0, -2.0],
                "finish_reason": "length" if i % 2 else "eos", "shard": 0, "seed": 0, "text": f"{text} {i}",
            }
            for i in range(30)
        ]  # fmt: skip
        corpus = table_of(CORPUS, rows)
        self.corpus = self.artifact(
            "corpus",
            "sampled",
            {"rows": 30, "tokens": 60, "ended_fraction": 0.5, "biased": ""},
            {"corpus": corpus},
        )
        rejected = table_of(REJECTS, [{"row_id": 29, "reason": "duplicate", "text": f"{text} twice"}])
        metadata = {
            "rows": 29, "tokens": 58, "rejected": {"duplicate": 1}, "accepted_fraction": 29 / 30,
            "mean_logprob": -1.5, "mean_logprob_shift": 0.0123,
        }  # fmt: skip
        tables = {"corpus": corpus.slice(0, 29), "rejects": rejected}
        self.kept = self.artifact("corpus", "filtered", metadata, tables)

    def artifact(
        self, kind: str, name: str, metadata: dict[str, Any], tables: Tables | None = None,
        metrics: list[dict[str, float]] | None = None,
    ) -> Artifact:  # fmt: skip
        def work(draft: Draft) -> None:
            draft.metadata |= metadata
            (draft.folder / "name.txt").write_text(name)
            for table_name, table in (tables or {}).items():
                write_shard(draft.folder, table_name, 0, table)
            for step, values in enumerate(metrics or [], 1):
                draft.journal.metrics(step, values)

        environment: dict[str, JsonValue] = {"torch": "2.9.1", "device": "cpu"}
        return self.store.make(kind, key_of(kind, name), work, environment=environment)[0]

    def scores(self, model: str, benchmark: str, right: int, kind: str = "binary") -> Artifact:
        """Score the first `right` documents right, or give each that loss in nats."""
        values = [float(i < right) for i in range(DOCUMENTS)] if kind == "binary" else [float(right)] * DOCUMENTS
        rows = [
            {
                "benchmark": benchmark, "filter": name, "doc_id": i, "doc_hash": f"h{i}", "metric": "acc",
                "value": value, "count": 1 if kind == "binary" else 4, "prompt": f"{benchmark}: item {i} {HOSTILE}",
                "answer": f"{model} says {value} ({name}) [right: 1]",
            }
            for name in ("first", "second")
            for i, value in enumerate(values if name == "first" else values[::-1])
        ]  # fmt: skip
        metadata = {
            "benchmark": benchmark, "metric": "acc" if kind == "binary" else "nll", "kind": kind,
            "higher_is_better": kind == "binary", "chance": BENCHMARKS.get(benchmark), "filters": ["first", "second"],
            "num_documents": DOCUMENTS, "num_fewshot": 0, "score": sum(values) / DOCUMENTS, "warnings": [],
        }  # fmt: skip
        table = pa.Table.from_pandas(pd.DataFrame(rows), preserve_index=False)
        return self.artifact("scores", f"{model} {benchmark} {right}", metadata, {"scores": table})

    def responses(self, model: str, loss: float, right: int) -> Artifact:
        noise = random.Random(1)
        rows = [
            {
                "row_id": i, "nll": 4 * (loss + noise.uniform(0, 0.1)), "correct": 4 if i < right else 1, "count": 4,
                "prompt": "p", "response": "r",
            }
            for i in range(20)
        ]  # fmt: skip
        metadata = {"rows": 20, "tokens": 80, "loss": loss, "accuracy": right / 20}
        return self.artifact("responses", f"{model} {loss}", metadata, {"responses": table_of(RESPONSES, rows)})

    def divergence(self, model: str, kl: float) -> Artifact:
        noise = random.Random(2)
        rows = []
        for i in range(20):
            nats = 10 * kl * noise.uniform(0.9, 1.1)
            rows.append({"row_id": i, "kl": nats, "sampled": nats, "base_nll": 9.0, "tuned_nll": 9.0, "count": 10})
        metadata = {"probe_kl": kl}
        return self.artifact("divergence", f"{model} {kl}", metadata, {"divergence": table_of(DIVERGENCE, rows)})

    def trained(self, name: str, *, right: int, loss: float, kl: float, rehearsed: bool = True) -> RunRecord:
        """Return a variant that has `right` of 100 documents right, where the base has 90."""
        mixture = self.artifact("mixture", name, {"target_rows": 500})
        curve = [{"train/target_loss": 2.0 / step, "train/loss": 9.0} for step in range(1, 13)]
        for step, values in enumerate(curve):
            values |= {"train/rehearsal_loss": 1.0 + step / 100} if rehearsed else {}
        tuned = self.artifact("model", f"tuned {name}", {"steps": 12, "tokens": 4321}, metrics=curve)
        artifacts = {
            "base": self.base, "target": self.target, "probe": self.probe, "mixture": mixture, "tuned": tuned,
            "final": tuned, **({"corpus": self.corpus, "filtered": self.kept} if rehearsed else {}),
        }  # fmt: skip
        before = Scores(benchmarks={b: self.scores("base", b, 90) for b in BENCHMARKS},
                        target=self.responses("base", 2.0, 1))  # fmt: skip
        after = Scores(benchmarks={b: self.scores(name, b, right) for b in BENCHMARKS},
                       target=self.responses(name, loss, 15), probe=self.divergence(name, kl))  # fmt: skip
        steps = (
            Step(stage="probe", artifact=self.probe, executed=name == "finetune", seconds=1.5),
            Step(stage="train", artifact=tuned, executed=True, seconds=12.25),
        )
        recipe = recipe_of(name, generate={"rows": 30 if rehearsed else 0})
        return RunRecord(name=name, recipe=recipe, digest=f"digest-{name}"[:16], artifacts=artifacts,
                     before=before, after=after, steps=steps)  # fmt: skip

    def variants(self) -> list[RunRecord]:
        return [
            self.trained("finetune", right=50, loss=0.5, kl=1.2, rehearsed=False),
            self.trained("rehearse", right=88, loss=0.6, kl=0.05),
            self.trained("rehearse more", right=89, loss=0.62, kl=0.049),
        ]


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text outside of style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.inside:
            self.words = f"{self.words} {' '.join(data.split())}".rstrip()

    def headings(self) -> list[str]:
        return [attrs["id"] or "" for tag, attrs in self.elements if tag == "h2"]

    def part(self, start: str, end: str) -> str:
        """Return the words from the last `start` to the first `end` after it."""
        begin = self.words.rindex(start)
        return self.words[begin : self.words.index(end, begin)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def three(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str]:
    """Return the page of three variants and its source."""
    path = tmp_path_factory.mktemp("three") / "report.html"
    return report_of(world, world.variants(), path), path.read_text()


def report_of(world: World, run_records: list[RunRecord], path: Path, **options: Any) -> Page:
    summaries = [summarise(world.store, run_record, run_records) for run_record in run_records]
    comparisons = comparisons_of(world.store, run_records)
    write_report(path, world.store, options.pop("title", "A title"), run_records, summaries, comparisons, **options)
    return Page(path.read_text(encoding="utf-8"))


def test_one_variant_shows_every_part_with_its_numbers(world: World, tmp_path: Path) -> None:
    run_record = world.variants()[1]
    page = report_of(world, [run_record], tmp_path / "out" / "report.html", notes=["A note to read"])
    assert page.headings() == [
        "table", "frontier", "benchmarks", "training", "items", "corpus", "dropped", "lineage", "recipe", "cost",
    ]  # fmt: skip
    summary = summarise(world.store, run_record)
    assert summary.target_gain and summary.probe_kl and summary.mean_forgetting
    wanted = [
        shown(summary.target_gain), shown(summary.probe_kl), shown(summary.mean_forgetting, 100), "A note to read",
        "90.0 → 88.0", "17 seen before", "duplicate: 1 row", "96.7 % of the rows", "-1.50 nats per token", "4,321",
        "12.2", "learning_rate: 1.0e-05", "torch 2.9.1", *(a.key for a in run_record.artifacts.values()),
    ]  # fmt: skip
    assert [text for text in wanted if text not in page.words] == []


def test_the_page_loads_nothing_and_runs_nothing(three: tuple[Page, str]) -> None:
    page, source = three
    assert not re.search(r"https?:", source) and "@import" not in source
    assert {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object", "embed"} == set()
    references = [v for _, attrs in page.elements for k, v in attrs.items() if k in ("href", "xlink:href", "src")]
    assert references and all(str(reference).startswith("#") for reference in references)
    assert not [k for _, attrs in page.elements for k in attrs if k.startswith("on")]


def test_every_reference_leads_to_one_place(three: tuple[Page, str]) -> None:
    page, source = three
    places = [attrs["id"] for _, attrs in page.elements if attrs.get("id")]
    used = {str(v)[1:] for _, attrs in page.elements for k, v in attrs.items() if k in ("href", "xlink:href")}
    used |= set(re.findall(r"url\(#([^)]*)\)", source))
    assert [name for name in used if places.count(name) != 1] == []


def test_what_models_and_people_wrote_is_text(tmp_path: Path) -> None:
    world = World(tmp_path / "data", text=HOSTILE)
    run_record = world.trained(HOSTILE.replace("\x00", ""), right=60, loss=0.5, kl=0.1)
    page = report_of(world, [run_record, *world.variants()], tmp_path / "report.html", title=HOSTILE, notes=[HOSTILE])
    assert "script" not in {tag for tag, _ in page.elements}
    visible = HOSTILE.replace("\x00", "␀")
    assert f"{visible} 28" in page.words  # a sample of the corpus
    assert f"{visible} twice" in page.words  # a rejected row
    assert f"item 60 {visible}" in page.words  # the prompt of a changed answer
    assert "\x00" not in page.words.replace(HOSTILE, "")


def test_variants_with_one_corpus_show_it_once(three: tuple[Page, str]) -> None:
    corpus = three[0].part("The rehearsal corpus", "Target rows left out")
    assert corpus.count(": corpus") == corpus.count("rehearse, rehearse more: corpus") == 1
    assert corpus.count("Price of filtering") == corpus.count("20 samples to read") == 1
    assert corpus.count("ended by the model, row") + corpus.count("cut off, row") == 20


def test_a_corpus_of_another_law_is_warned_of(world: World, tmp_path: Path) -> None:
    metadata = {"rows": 30, "biased": "top_p=0.9", "approximate": "ids reconstructed"}
    rows = pa.Table.from_batches(batches(world.store.path(world.corpus), "corpus"))
    biased = world.artifact("corpus", "biased", metadata, {"corpus": rows.slice(1)})
    plain, exact, bent = world.variants()
    bent = bent.model_copy(update={"artifacts": {**bent.artifacts, "corpus": biased}})
    run_records = [plain, exact, bent]
    warned = [f"Warning: the corpus of “rehearse more” is {what}." for what in
              ("biased: top_p=0.9", "approximate: ids reconstructed")]  # fmt: skip
    page, summaries = (
        report_of(world, run_records, tmp_path / "report.html"),
        [summarise(world.store, t) for t in run_records],
    )
    comparisons = comparisons_of(world.store, run_records)
    said = page.part(two_sentences(summaries, comparisons)[0][:40], "Training a language model further")
    assert [line for line in warned if line not in said] == []
    console = Console(width=200, file=io.StringIO())
    print_summary(summaries, console)
    assert console.file.getvalue().splitlines()[-2:] == warned  # type: ignore[attr-defined]
    assert "Warning" not in report_of(world, [plain, exact], tmp_path / "exact.html").words


def test_measuring_two_models_leaves_out_what_there_is_not(world: World, tmp_path: Path) -> None:
    full = world.variants()[0]
    artifacts = {"base": world.base, "tuned": full.artifacts["probe"]}
    before, after = (s.model_copy(update={"target": None, "probe": None}) for s in (full.before, full.after))
    run_record = RunRecord(name="measure", artifacts=artifacts, before=before, after=after)
    page = report_of(world, [run_record], tmp_path / "report.html")
    assert page.headings() == ["table", "benchmarks", "items", "lineage", "cost"]
    assert "“measure” lost 46.7 [" in page.words
    for absent in ("target gain", "probe_kl", "None", "nan"):
        assert absent not in page.words
    bare = RunRecord(name="nothing", artifacts=artifacts, before=Scores(), after=Scores())
    assert "Nothing was measured" in report_of(world, [bare], tmp_path / "bare.html").words


def test_lineage_names_sources_and_invents_none(world: World, tmp_path: Path) -> None:
    run_record = world.variants()[1]
    page = report_of(world, [run_record], tmp_path / "report.html")
    tree = page.part("Where everything comes from", "Recipe")
    roles = ["final, tuned", "mixture", "target", "filtered", "corpus", "base"]
    places = [re.search(rf"\b{role} (model |corpus )?[0-9a-f]{{16}}", tree) for role in roles]
    starts = [place.start() for place in places if place]
    assert len(starts) == len(roles) and starts[:2] == sorted(starts[:2]) and starts[1] < min(starts[2:])
    came = RunRecord(
        name="m",
        artifacts={r: run_record.artifacts[r] for r in ("tuned", "base")},
        before=Scores(),
        after=Scores(),
    )
    html = tmp_path / "came.html"
    report_of(world, [came], html)
    tree_of_came = html.read_text().split('<ul class="tree">')[1].split("</details>")[0]
    assert "<ul>" not in tree_of_came


def test_lineage_shows_a_selection_only_where_there_was_one(world: World, tmp_path: Path) -> None:
    run_record = world.variants()[1]
    whole = run_record.artifacts | {
        "selected_target": run_record.artifacts["target"],
        "selected_corpus": run_record.artifacts["filtered"],
    }
    part = whole | {"selected_target": world.artifact("target", "part", SELECTED)}
    trees = []
    for artifacts in (run_record.artifacts, whole, part):
        changed = run_record.model_copy(update={"artifacts": artifacts})
        page = report_of(world, [changed], tmp_path / "report.html")
        trees.append(page.part("Where everything comes from", "Recipe"))
    assert trees[0] == trees[1] and "selected_target" not in trees[0]
    mixture, chosen, target = (
        trees[2].index(a.key) for a in (part["mixture"], part["selected_target"], part["target"])
    )
    assert "5 rows to train on (selected from 500 by random), 20 held out" in page.words
    assert mixture < chosen < target and trees[2].count(part["selected_target"].key) == 1


def test_variants_after_the_first_show_only_how_their_recipe_differs(three: tuple[Page, str]) -> None:
    recipes = three[0].part("Recipe", "Cost and versions")
    assert recipes.count("learning_rate") == 1
    assert "generate.rows: 30" in recipes


def test_equal_artifacts_give_an_equal_page(world: World, three: tuple[Page, str], tmp_path: Path) -> None:
    report_of(world, world.variants(), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == three[1]


def test_a_run_that_changed_nothing_is_drawn_and_said(world: World, tmp_path: Path) -> None:
    run_record = world.trained("lr0", right=90, loss=2.0, kl=0.0)
    page = report_of(world, [run_record], tmp_path / "report.html")
    assert "“lr0” is not shown to have learned the target (gain 0 [0, 0] nats per token)" in page.words
    assert "and did not move from the base." in page.words
    assert "No benchmark shows a loss; with 100 documents each, losses under 9.1 points may stay" in page.words
    assert page.words.count("no forgetting found (a drop of") == len(BENCHMARKS)
    assert "nan" not in (tmp_path / "report.html").read_text()


def test_twenty_variants(world: World, tmp_path: Path) -> None:
    run_records = [
        world.trained(f"variant {i}", right=50 + 2 * i, loss=0.5 + i / 50, kl=1 / (i + 1)) for i in range(20)
    ]
    page = report_of(world, run_records, tmp_path / "report.html")
    assert all(page.words.count(f"variant {i} ") >= 4 for i in range(20))


# --- figures without artifacts -------------------------------------------------------------------------------


def figure(value: float, half: float, unit: str = "fraction") -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "unit": unit}


def benchmark(lost: float, half: float, detectable: float | None = 0.1, q_value: float | None = None) -> dict[str, Any]:
    """Return a benchmark whose p is small where its interval leaves out 0; `q_value` is the same unless given."""
    p_value = 0.5 if abs(lost) <= half else 0.001
    return {
        "benchmark": "b", "metric": "acc", "num_documents": 100, "base": 0.9, "tuned": 0.9 - lost,
        "forgetting": figure(lost, half), "chance_corrected": figure(lost * 2, half * 2), "retention": None,
        "retention_note": "base at chance", "right_to_wrong": max(lost, 0.0), "wrong_to_right": max(-lost, 0.0),
        "p_value": p_value, "q_value": p_value if q_value is None else q_value, "detectable": detectable,
    }  # fmt: skip


def summary(name: str, forgot: float, kl: float | None = 0.1, gain: float | None = 1.0, half: float = 0.02) -> Summary:
    return Summary(
        name=name, digest="", target={"base_loss": 2, "tuned_loss": 1, "base_accuracy": 0, "tuned_accuracy": 0.5},
        target_gain=None if gain is None else figure(gain, 0.1), target_accuracy_gain=None,
        probe_kl=None if kl is None else figure(kl, 0.01), probe_kl_sampled=None,
        mean_forgetting=figure(forgot, half), benchmarks={"b": benchmark(forgot / 2, half / 2)},
        seconds={}, executed=[], cached=[],
    )  # fmt: skip


def test_a_measure_in_the_table_of_measures_reaches_every_place(world: World, tmp_path: Path) -> None:
    """An entry and its function are all that a new measure over the score tables takes."""

    def worst_gain(tables: ScoreTables) -> StatFigure:
        nats, counts = loss_fall(*tables.responses)
        return StatFigure(value=float((nats / counts).min()), low=None, high=None, unit="nats/token")

    measure = Measure("worst_gain", worst_gain, mlflow="target/worst_gain", label="least gain of a row, nats/token")
    MEASURES.append(measure)
    try:
        kept = ReportSource(title="t", run_records=(world.variants()[1],))
        ((made,), _), (page, numbers, _, card) = write_files(tmp_path, world.store, kept)
        console = Console(width=200, file=io.StringIO())
        print_summary([made], console)
        assert headline(made)["target/worst_gain"] == pytest.approx(1.4)
    finally:
        MEASURES.remove(measure)
    assert json.loads(numbers.read_text())["variants"]["rehearse"]["worst_gain"]["value"] == pytest.approx(1.4)
    shown_in = [page.read_text(), card.read_text(), console.file.getvalue()]  # type: ignore[attr-defined]
    assert ["least gain of a row" in text and "1.40" in text for text in shown_in] == [True] * 3


def test_a_perplexity_benchmark_has_one_unit_under_one_name() -> None:
    """The step logs lm-eval's perplexity as word_perplexity, and the variant's run nats per token."""
    nats = benchmark(0.1, 0.05) | {"forgetting": figure(0.1, 0.05, "nats/token"), "metric": "word_perplexity"}
    flat = headline(summary("a", 0.1).model_copy(update={"benchmarks": {"prose": nats, "b": benchmark(0.1, 0.05)}}))
    own = {name for name in flat if name.startswith(("base/", "eval/"))}
    assert {name for name in own if "prose" in name} == {"base/prose/nats_per_token", "eval/prose/nats_per_token"}
    assert {name for name in own if "/b/" in name} == {"base/b/acc", "eval/b/acc"}


# --- table, terminal, numbers, figures -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [(0.1234, "0.123"), (12.34, "12.3"), (9.999, "10.0"), (1234.5, "1230"), (0, "0"), (-0.05, "-0.0500"),
     (1e-9, "1.00e-09"), (0.9996, "1.00"), (float("-0.0"), "0")],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(-1e4, 1e4), st.floats(1e-4, 1))
def test_two_scores_that_differ_are_written_apart(one: float, difference: float) -> None:
    """ "Became worse (6.53 → 6.53)" reads as a mistake."""
    texts = told_apart(one, one + difference)
    assert texts[0] != texts[1] and float(texts[0]) < float(texts[1])
    assert told_apart(one, one) == (number(one), number(one))
    assert told_apart(90.0, 60.04) == ("90.0", "60.0")


def test_shown_with_and_without_interval() -> None:
    assert shown({"value": 0.123, "low": 0.101, "high": 0.148}) == "0.123 [0.101, 0.148]"
    assert shown({"value": 0.123, "low": None, "high": None}, 100) == "12.3"


def test_frame_has_base_and_variants_and_leaves_out_what_nobody_has(world: World) -> None:
    summaries = [summarise(world.store, run_record) for run_record in world.variants()]
    frame = summary_frame(summaries).set_index("figure")
    assert list(frame.columns) == ["base", "finetune", "rehearse", "rehearse more"]
    assert frame.index.is_unique
    assert frame.loc["cap: acc, %", "base"] == "90.0"
    assert frame.loc["cap: acc, %", "finetune"] == "50.0"
    assert str(frame.loc["cap: lost, points", "rehearse"]).startswith("2.00 [")
    assert "target loss: gain, nats/token" in frame.index
    named = [s.model_copy(update={"name": "base"}) for s in summaries[:2]]
    assert list(summary_frame(named).columns) == ["figure", "base", "base (2)", "base (3)"]
    without = [s.model_copy(update={"target_gain": None}) for s in summaries]
    assert "target loss: gain, nats/token" not in list(summary_frame(without)["figure"])


def test_frame_shows_another_base_where_variants_differ_in_it() -> None:
    other = summary("b", 0.1)
    other = other.model_copy(update={"target": {**other.target, "base_loss": 3.0}})
    rows = summary_frame([summary("a", 0.1), other]).to_numpy().tolist()
    assert ["target loss, nats/token", "2.00", "1.00", "3.00 → 1.00"] in rows


def test_texts_and_the_divergence_on_the_target_have_lines_of_their_own() -> None:
    rise = figure(0.01, 0.02, "nats/token")
    text = {"per_token": {"base": 3.0, "tuned": 3.01, "forgetting": rise}}
    measured = {"texts": {"letters": text}, "target_divergence": figure(0.5, 0.1, "nats/token")}
    rows = summary_frame([summary("a", 0.1).model_copy(update=measured), summary("b", 0.1)]).to_numpy().tolist()
    assert ["letters: loss, nats/token", "3.00", "3.01", ""] in rows
    assert ["letters: lost, nats/token", "", "0.0100 [-0.0100, 0.0300]", ""] in rows
    assert ["letters: detectable, nats/token", "", "from 0.0286", ""] in rows
    assert ["target divergence, nats/token", "", "0.500 [0.400, 0.600]", ""] in rows


def test_power_stands_where_nothing_was_found_and_nowhere_else() -> None:
    frame = summary_frame([summary("a", 0.0), summary("b", 0.2)]).set_index("figure")
    assert list(frame.loc["b: detectable, points"]) == ["", "from 10.0", ""]
    assert list(frame.loc["mean forgetting: detectable, points"]) == ["", "from 15.8", ""]
    assert "b: detectable, points" not in summary_frame([summary("b", 0.2)])["figure"].tolist()


@pytest.mark.parametrize("count", [1, 3, 20])
def test_terminal_table_fits_in_100_columns(count: int) -> None:
    summaries = [summary(f"variant number {i} [red]", 0.12345, kl=0.4567, gain=1.2345) for i in range(count)]
    console = Console(width=100, file=io.StringIO())
    print_summary(summaries, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, printed.splitlines())) <= 100
    assert len(re.findall(r"\[10\.3, 14\.3\]", printed)) >= count
    assert "…" not in printed
    assert printed.count("[red]") >= count


def test_frontier_has_a_named_point_per_variant_and_a_panel_per_cost() -> None:
    summaries = [summary("a", 0.1), summary("b$x$", 0.2, kl=0.3), summary("no gain", 0.2, gain=None)]
    drawn = frontier_figure(summaries)
    assert len(drawn.axes) == 2
    written = [{text.get_text() for text in axes.texts} - {""} for axes in drawn.axes]
    assert written == [{"base", "a", "b$x$"}] * 2
    assert len(frontier_figure([summary("a", 0.1, kl=None)]).axes) == 1
    assert frontier_figure([summary("a", 0.1, gain=None)]).axes == []


def test_names_of_equal_points_do_not_cover_each_other() -> None:
    drawn = frontier_figure([summary(f"v{i}", 0.0, kl=0.0, gain=0.0) for i in range(6)], ["probe_kl"])
    drawn.canvas.draw()
    boxes = [text.get_window_extent() for text in drawn.axes[0].texts if text.get_text()]
    covered = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.padded(-1).overlaps(b.padded(-1))]
    assert len(boxes) == 7 and covered == []


def figure_of(lines: dict[str, tuple[list[float], list[float]]]) -> Figure:
    panel = Panel("target", "target loss, nats per token", lines)
    return curve_figures([panel], list(lines), {name: name for name in lines})["target"]


def test_a_sweep_is_joined_in_its_order_in_one_colour_and_named_in_part() -> None:
    order = [0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.4, 0.6, 0.8, 1.0]
    swept = [summary(f"wise alpha={a}", a / 10, kl=a**2, gain=a) for a in order]
    (axes,) = frontier_figure([summary("finetune", 0.1), *swept], ["probe_kl"]).axes
    joined = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == len(order)]  # type: ignore[arg-type]
    assert [list(xs) for xs in joined] == [sorted(order)]  # type: ignore[arg-type]
    look = styles(["finetune", *(s.name for s in swept), "other"])
    assert len({look[s.name] for s in swept}) == 1 and len(set(look.values())) == 3
    look = styles(["wise", *(s.name for s in swept)])
    assert look["wise"] != look["wise alpha=0.1"]
    written = {text.get_text() for text in axes.texts} - {""}
    assert {"base", "finetune", "wise alpha=0.1", "1.0"} < written and len(written) < len(order)


def test_many_variants_are_told_apart_by_a_legend() -> None:
    """42 points with their names written beside them were a heap of text."""
    rates, seeds = ("1e-05", "0.0001", "0.0003"), (0, 1)
    names = [f"{method} rate={rate} seed={seed}" for method in "abcdefg" for rate in rates for seed in seeds]
    drawn = frontier_figure([summary(n, 0.1, kl=0.1, gain=20 + i) for i, n in enumerate([*names, "plain"])])
    (legend,) = drawn.legends
    written = [text.get_text() for text in legend.get_texts()]
    assert written == [*(f"{method}, 1e-05 to 0.0003" for method in "abcdefg"), "plain"]
    assert all(axes.get_xlim()[0] > 0 and not axes.texts for axes in drawn.axes)
    sizes = {line.get_markersize() for axes in drawn.axes for line in axes.lines if line.get_marker() == "o"}
    assert len(sizes) == len(rates)
    FigureCanvasAgg(drawn).draw()
    below, lowest = legend.get_window_extent(), min(axes.get_tightbbox().y0 for axes in drawn.axes)
    assert below.y0 >= 0 and below.y1 <= lowest + 1 and below.x1 <= drawn.bbox.width


def test_sweeps_of_several_seeds_and_single_points_are_not_mixed() -> None:
    names = ["a x=1 seed=0", "a x=2 seed=0", "a x=1 seed=1", "a x=2 seed=1", "lone x=3", "version 1.2.3"]
    (axes,) = frontier_figure([summary(n, 0.1, gain=i) for i, n in enumerate(names, 10)], ["probe_kl"]).axes
    lines = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]  # type: ignore[arg-type]
    joined = [xs for xs in lines if min(xs) >= 10 and xs[0] != xs[1]]
    assert joined == [[10, 11], [12, 13]]
    written = {text.get_text() for text in axes.texts} - {""}
    assert {"a x=1 seed=0", "lone x=3", "version 1.2.3"} < written


def test_forest_has_one_figure_per_unit() -> None:
    both = summary("a", 0.1)
    loss = benchmark(0.1, 0.05) | {"forgetting": figure(0.1, 0.05, "nats/token"), "chance_corrected": None}
    both = both.model_copy(update={"benchmarks": {"b": benchmark(0.1, 0.1), "wiki": loss}})
    assert list(forest_figures([both, both.model_copy(update={"name": "c"})])) == ["points", "nats/token"]


def test_names_are_written_as_they_are() -> None:
    named = [summary("v$x_1$", 0.1), summary("w$x_1$", 0.2)]
    curves = figure_of({s.name: ([1.0], [2.0]) for s in named})
    for drawn in (frontier_figure(named), forest_figures(named)["points"], curves):
        assert "v$x_1$" in Page(svg_of(drawn, "x", "")).words


def test_svg_follows_the_page_and_stands_alone() -> None:
    text = svg_of(figure_of({"<a>": ([1.0], [2.0]), "b": ([1.0], [2.0])}), "x", "a & b")
    assert text.startswith("<svg viewBox=") and "http" not in text
    assert "currentColor" in text and "<title>a &amp; b</title>" in text
    assert "<a>" not in text and "&lt;a&gt;" in text
