"""The corpus page from hand-made tables: every figure against one computed another way, and what it never does."""

import random
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cfsd.model.loading import load_tokenizer
from cfsd.report.corpus import view as corpus_view
from cfsd.report.corpus.page import write_corpus_page
from cfsd.report.corpus.view import CorpusView, describe_corpus
from cfsd.report.table import number
from cfsd.store.artifact import Artifact, Draft, Store, key_of
from cfsd.store.tables import CORPUS, REJECTS, table_of, write_shard
from tests.report.test_report import Page

HOSTILE = "<script>alert('x')</script> & \x00"
Row = dict[str, Any]
Shards = list[list[Row]]


def row(row_id: int, sampled: list[int], *, given: tuple[int, ...] = (0,), nats: float = -1.0, **other: Any) -> Row:
    """Return a row of prompt tokens, `given`, then `sampled` ones of equal log-probability."""
    return {
        "row_id": row_id, "source": "context-free", "token_ids": [*given, *sampled],
        "logprobs": [None] * len(given) + [nats] * len(sampled), "finish_reason": "length", "shard": 0, "seed": 0,
        "text": f"text {row_id}",
    } | other  # fmt: skip


def many(count: int = 120, seed: int = 0) -> list[Row]:
    """Return rows of few different tokens, so that n-grams come again, each of another length and likelihood."""
    rng = random.Random(seed)
    return [
        row(i, rng.choices(range(2, 6), k=rng.randint(1, 30)), nats=-rng.uniform(0.5, 4),
            finish_reason=rng.choice(["eos", "length"]))
        for i in range(count)
    ]  # fmt: skip


Make = Callable[..., Artifact]


@pytest.fixture
def make(store: Store) -> Make:
    """Write rows, a shard per list, as a corpus."""

    def call(shards: Shards, *, rejects: list[Row] | None = None, extra: Any = None, **metadata: Any) -> Artifact:
        def work(draft: Draft) -> None:
            draft.metadata |= {"rows": sum(map(len, shards))} | metadata
            for index, rows in enumerate(shards):
                table = table_of(CORPUS, rows)
                for name, column in (extra or {}).items():
                    table = table.append_column(name, column)
                write_shard(draft.folder, "corpus", index, table)
            if rejects:
                write_shard(draft.folder, "rejects", 0, table_of(REJECTS, rejects))

        return store.make("corpus", key_of("made", repr((shards, rejects, metadata))), work)[0]

    return call


def page_of(store: Store, path: Path, artifacts: dict[str, dict[str, Artifact]], title: str = "A title") -> Page:
    write_corpus_page(path, store, title, artifacts)
    return Page(path.read_text(encoding="utf-8"))


def grams(tokens: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def test_figures_equal_a_plain_count(store: Store, make: Make) -> None:
    rows = many()
    view = describe_corpus(store, make([rows]), None, None)
    texts = [r["token_ids"][1:] for r in rows]
    stage, tokens = view.last, sum(map(len, texts))
    assert (stage.rows, stage.tokens, stage.prompt_tokens, stage.ngram_tokens) == (120, tokens, 120, tokens)
    for n in (1, 2, 3, 4):
        found = [gram for text in texts for gram in grams(text, n)]
        assert stage.distinct[n] == pytest.approx(len(set(found)) / len(found))
    repeated = [1 - len(set(own)) / len(own) for text in texts if (own := grams(text, 4))]
    assert stage.repetitions == pytest.approx(repeated)
    assert stage.figures()["repetition, %"] == pytest.approx(100 * np.mean(repeated))
    assert stage.mean_logprob == pytest.approx(sum(sum(r["logprobs"][1:]) for r in rows) / tokens)
    assert stage.finish_reasons["eos"] == sum(r["finish_reason"] == "eos" for r in rows)
    firsts = [text[0] for text in texts]
    assert {t.text: t.rows for t in view.first_tokens} == {f"token {t}": firsts.count(t) for t in set(firsts)}
    assert sum(t.share for t in view.first_tokens) == pytest.approx(1)
    assert view.lengths and sum(view.lengths.counts["sampled"]) == 120


def test_nearest_pairs_are_those_of_a_full_comparison(store: Store, make: Make) -> None:
    rows = many(300, seed=1)
    view = describe_corpus(store, make([rows]), None, None)
    sets = [set(grams(r["token_ids"][1:], 4)) for r in rows]
    overlaps = {
        (a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b])
        for a, b in combinations(range(300), 2)
        if sets[a] and sets[b]
    }
    best = sorted(overlaps.values(), reverse=True)[: len(view.pairs)]
    assert [pair.overlap for pair in view.pairs] == pytest.approx(best) and best[0] > best[-1] > 0
    for pair in view.pairs:
        assert overlaps[pair.one.row_id, pair.other.row_id] == pytest.approx(pair.overlap)


def test_a_run_across_prompt_tokens_or_rows_is_no_ngram(store: Store, make: Make) -> None:
    parted = row(0, [7, 8]) | {"token_ids": [0, 7, 8, 1, 7, 9], "logprobs": [None, -1.0, -1.0, None, -1.0, -1.0]}
    stage = describe_corpus(store, make([[parted, row(1, [7])]]), None, None).last
    assert (stage.tokens, stage.prompt_tokens) == (5, 3)
    assert stage.distinct == {1: 3 / 5, 2: 1.0}  # 7 8 9 of 7 8 7 9 7; (7, 8) and (7, 9)


def rounded(value: Any) -> str:
    """Return what `value` is written as, its fractions to 9 digits: sums depend on the order in their last one."""
    return re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.9g}", repr(value))


def test_how_rows_are_divided_into_shards_does_not_count(store: Store, make: Make) -> None:
    rows = many()
    whole, parts = (describe_corpus(store, make(s), None, None) for s in ([rows], [rows[:50], rows[50:53], rows[53:]]))
    for name in ("stages", "samples", "pairs", "first_tokens", "lengths", "mean_logprobs", "sources"):
        one, other = (rounded(getattr(view, name)) for view in (whole, parts))
        assert one.replace(whole.key, parts.key) == other, name


def test_the_cap_bounds_what_is_looked_at_and_spreads_it(
    store: Store, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_view, "NGRAM_TOKENS", 400)
    rows = [row(i, [i % 7 + 2] * 10) for i in range(400)]
    stage = describe_corpus(store, make([rows[:200], rows[200:]]), None, None).last
    assert stage.tokens == 4000
    assert 300 <= stage.ngram_tokens <= 400
    assert stage.distinct[1] == 7 / stage.ngram_tokens  # all sevenths of the table are seen


@pytest.fixture
def filtered(make: Make) -> tuple[Artifact, Artifact, Artifact]:
    """A corpus, what a filter kept of it, and what was selected of that."""
    rows = many()
    short = [r for r in rows if len(r["token_ids"]) <= 6]
    kept = [r for r in rows if r not in short]
    rejects = [{"row_id": r["row_id"], "reason": "too short", "text": r["text"]} for r in short]
    return (
        make([rows], biased=""),
        make(
            [kept], rejects=rejects, rejected={"too short": len(short)}, accepted_by_rule={"min_tokens": 0.8, "x": 1.0}
        ),
        make([kept[::2]], method="geometric-median"),
    )


def test_the_price_of_filter_and_selection(store: Store, filtered: tuple[Artifact, ...], tmp_path: Path) -> None:
    corpus, kept, selected = filtered
    view = describe_corpus(store, corpus, kept, selected)
    assert [stage.name for stage in view.stages] == ["sampled", "filtered", "selected"]
    sizes = [stage.rows for stage in view.stages]
    assert view.accepted_fraction == sizes[2] / sizes[0]
    means = [stage.mean_logprob or 0.0 for stage in view.stages]
    tokens = [stage.ngram_tokens for stage in view.stages]
    assert tokens[2] == view.last.tokens and max(tokens) < 1.15 * min(tokens)  # distinct-n on about as much
    assert tokens[0] < view.stages[0].tokens / 2
    assert view.mean_logprob_shift == pytest.approx(means[2] - means[0]) != 0
    for histogram in (view.lengths, view.mean_logprobs):
        assert histogram
        total = {name: sum(counts) for name, counts in histogram.counts.items()}
        assert total == {"selected": sizes[2], "not selected": sizes[1] - sizes[2], "rejected": sizes[0] - sizes[1]}
    assert view.lengths and not any(view.lengths.counts["rejected"][5:])
    assert [(r.reason, r.number, len(r.examples)) for r in view.rejected] == [("too short", sizes[0] - sizes[1], 3)]
    artifacts = dict(zip(("corpus", "filtered", "selected_corpus"), filtered, strict=True))
    words = page_of(store, tmp_path / "corpus.html", {"a": artifacts}).words
    wanted = [f"{number(100 * sizes[2] / sizes[0])} % of the rows are left", "Selected by geometric-median",
              "in this order: min_tokens 80.0 %, x 100 %", f"too short: {sizes[0] - sizes[1]} rows"]  # fmt: skip
    assert [text for text in wanted if text not in words] == []


def test_a_filter_that_changed_nothing_is_no_stage(store: Store, make: Make, tmp_path: Path) -> None:
    corpus, kept = make([many()]), make([many()], rejected={})
    assert len(describe_corpus(store, corpus, kept, None).stages) == 1
    page = page_of(store, tmp_path / "corpus.html", {"a": {"corpus": corpus, "filtered": kept}})
    assert "No filter or selection changed it" in page.words and "Price of filtering" not in page.words


def test_samples_are_spread_over_the_mean_log_probability(store: Store, make: Make) -> None:
    rows = [row(i, [3, 4], nats=-((i * 37) % 200) / 50 - 0.1) for i in range(200)]
    means = [r.mean_logprob or 0.0 for r in describe_corpus(store, make([rows]), None, None).samples]
    assert len(means) == 20
    assert means == pytest.approx([-(195 - 10 * i - 1) / 50 - 0.1 for i in range(20)], abs=0.03)


def test_the_prompt_is_set_apart_and_first_tokens_are_read(
    store: Store, make: Make, base: Artifact, tmp_path: Path
) -> None:
    tokenizer: Any = load_tokenizer(store.path(base))
    prompt, answer = tokenizer.encode("abc="), tokenizer.encode("cba.")
    rows = [
        row(0, answer, given=(0, *prompt), source="contextual", text="<bos>abc=cba."),
        row(1, answer, nats=-2.0, text="<bos>cba."),
    ]
    corpus = make([rows])
    view = describe_corpus(store, corpus, None, None, base)
    shown = [[(piece.text, piece.is_prompt) for piece in sample.pieces] for sample in view.samples]
    assert shown == [[("<bos>", True), ("cba.", False)], [("<bos>abc=", True), ("cba.", False)]]
    assert [t.text for t in view.first_tokens] == ['"c"']
    assert view.first_tokens[0].probability is None  # the rows begin after different prompts
    assert view.sources == {"contextual": 0.5, "context-free": 0.5}
    source = tmp_path / "corpus.html"
    page = page_of(store, source, {"a": {"base": base, "corpus": corpus}})
    assert '<span class="given">&lt;bos&gt;abc=</span>cba.' in source.read_text()
    assert "contextual 50.0 %, context-free 50.0 %" in page.words


def test_long_text_loses_its_middle_and_keeps_its_shades(store: Store, make: Make, base: Artifact) -> None:
    tokenizer: Any = load_tokenizer(store.path(base))
    prompt, answer = "a" * 1500, "b" * 1500
    ids = tokenizer.encode(prompt), tokenizer.encode(answer)
    corpus = make([[row(0, ids[1], given=(0, *ids[0]), text=f"<bos>{prompt}{answer}")]])
    pieces = describe_corpus(store, corpus, None, None, base).samples[0].pieces
    assert [(p.text[-1:], p.is_prompt) for p in pieces] == [("a", True), (" ", False), ("b", False)]
    assert sum(len(p.text) for p in pieces) < 1500


def test_an_empty_table_and_plain_fine_tuning(store: Store, make: Make, tmp_path: Path) -> None:
    rows = many()
    nothing = make([[]], rejected={"too short": 120})
    page = page_of(store, tmp_path / "all.html", {"a": {"corpus": make([rows]), "filtered": nothing}})
    assert "0 % of the rows are left" in page.words
    page = page_of(store, tmp_path / "none.html", {"a": {"corpus": make([[]])}, "b": {}})
    assert "No corpus was sampled" in page.words


def test_stored_top_logprobs_engine_and_halved_shards_are_told(store: Store, make: Make, tmp_path: Path) -> None:
    rows = [row(i, [3, 4, 5]) for i in range(6)]
    extra = {"topk_ids": pa.array([[1] * 32] * 6, pa.list_(pa.uint16()))}
    corpus = make([rows], extra=extra, engine="torch", halved_shards={"00002": 2, "00005": 4}, biased="",
                  dropped_rows={"no log-probabilities": 3}, reasoning=4, unfinished=1)  # fmt: skip
    view = describe_corpus(store, corpus, None, None)
    assert (view.top_k, view.engine, view.halved_shards, view.exact) == (8, "torch", 2, True)
    assert view.bytes_per_token.keys() >= {"topk_ids", "token_ids", "logprobs"}
    words = page_of(store, tmp_path / "corpus.html", {"a": {"corpus": corpus}}).words
    wanted = [
        "The 8 largest log-probabilities", "from the torch engine", "2 shards were sampled in smaller batches",
        "an exact sample of the base model's distribution", "could not be used: no log-probabilities (3)",
        "In 4 rows as sampled the base model thinks before it answers; in 1 of them that did not end",
    ]  # fmt: skip
    assert [text for text in wanted if text not in words] == []


def test_each_different_corpus_is_shown_once_with_its_warnings(
    store: Store, make: Make, filtered: tuple[Artifact, ...], tmp_path: Path
) -> None:
    corpus, kept, _ = filtered
    cold = make([many(seed=3)], biased="temperature=0.7", approximate=True)
    variants = {
        "a": {"corpus": corpus, "filtered": kept},
        "b": {"corpus": cold},
        "c": {"corpus": corpus, "filtered": kept},
    }
    path = tmp_path / "corpus.html"
    page = page_of(store, path, variants)
    assert re.findall(r"(\w, \w|\w): corpus", page.words) == ["a, c", "b"]
    assert page.words.count("biased: temperature=0.7") == page.words.count("approximate: ") == 1
    assert page.words.index("b: corpus") < page.words.index("biased: temperature=0.7")
    places = [attrs["id"] for _, attrs in page.elements if attrs.get("id")]
    used = re.findall(r'(?:url\(|href=")#([^")]*)', path.read_text())
    assert used and [name for name in used if places.count(name) != 1] == []


def test_the_page_is_text_and_loads_nothing(store: Store, make: Make, tmp_path: Path) -> None:
    rows = [row(i, [3, 4, 5, 6, 7], text=HOSTILE, source=HOSTILE, finish_reason=HOSTILE) for i in range(4)]
    rejects = [{"row_id": 9, "reason": HOSTILE, "text": HOSTILE}]
    artifacts = {
        HOSTILE: {"corpus": make([rows]), "filtered": make([rows[:3]], rejects=rejects, rejected={HOSTILE: 1})}
    }
    path = tmp_path / "corpus.html"
    page = page_of(store, path, artifacts, title=HOSTILE)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert not re.search(r"https?:", path.read_text()) and "@import" not in path.read_text()
    assert page.words.count("<script>alert('x')</script> & ␀") >= 6


def test_equal_tables_give_an_equal_page(store: Store, filtered: tuple[Artifact, ...], tmp_path: Path) -> None:
    artifacts = {"a": dict(zip(("corpus", "filtered", "selected_corpus"), filtered, strict=True))}
    for name in ("one", "two"):
        page_of(store, tmp_path / f"{name}.html", artifacts)
    assert (tmp_path / "one.html").read_text() == (tmp_path / "two.html").read_text()


def test_a_view_is_plain(store: Store, filtered: tuple[Artifact, ...]) -> None:
    view: CorpusView = describe_corpus(store, *filtered)
    assert "np." not in repr(view) and "array" not in repr(view)
