"""What a training asks of the corpus is told before anything is sampled, with what to change."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cfsd.data.replay import Replay
from cfsd.data.target import Target
from cfsd.errors import BadInput
from cfsd.filter.spec import FilterSpec
from cfsd.generate.spec import GenerateSpec
from cfsd.mix.spec import MixSpec
from cfsd.recipe import Recipe, check_drawn_tokens, check_rehearsal, check_supply
from cfsd.select.spec import SelectSpec
from cfsd.spec import Spec
from cfsd.train.spec import TrainSpec, WatchSpec

REPLAY = Replay(path="documents.jsonl")


def train(methods: dict[str, Any] | None = None, **rehearsal: Any) -> TrainSpec:
    return TrainSpec.model_validate({"rehearsal": rehearsal, "methods": methods or {}})


def generate(**given: Any) -> GenerateSpec:
    return GenerateSpec.model_validate(given)


def replayed(**given: Any) -> GenerateSpec:
    return generate(source="replay", replay=REPLAY, **given)


def drawn(**given: Any) -> GenerateSpec:
    """Return a corpus that stores distributions without samples of their tails."""
    return generate(top_logprobs=16, tail_samples=0, **given)


MIXED = generate(
    source="mixed", fractions={"context-free": 0.5, "replay": 0.5}, replay=REPLAY, top_logprobs=16
)  # fmt: skip


@pytest.mark.parametrize(
    ("corpus", "training"),
    [
        (generate(), train()),
        (generate(rows=0), train(loss="kl")),
        (generate(), train(loss="kl", weight=0)),
        (generate(), train(loss="kl", reference="base")),
        (generate(top_logprobs=16), train(loss="kl")),
        (generate(top_logprobs=16), train(loss="kl", budget=0.1)),
        (generate(), train(budget=0.1)),
        (replayed(), train()),
        (replayed(top_logprobs=16), train(loss="kl", tail="bucket")),
        (replayed(), train(loss="kl", reference="base")),
        (drawn(temperature=0.7), train(loss="kl", tail="bucket")),
        (generate(top_logprobs=16, temperature=0.7), train(loss="kl")),  # 16 samples of the tail are stored
        (replayed(top_logprobs=16), train(loss="kl")),
        (MIXED, train(loss="kl")),
        (generate(source="contextual"), train()),
        (generate(top_logprobs=16), train(loss="kl", budget=0.1)),
        (generate(), train({"ewc": {"weight": 1}})),
        (generate(source="contextual"), train({"ewc": {"weight": 0, "rows": 9999}})),
    ],
)
def test_what_fits_together_is_let_through(corpus: GenerateSpec, training: TrainSpec) -> None:
    check_rehearsal(corpus, training)
    check_drawn_tokens(corpus, FilterSpec(), SelectSpec(), training.rehearsal)


@pytest.mark.parametrize(
    ("corpus", "training", "remedy"),
    [
        (generate(), train(loss="kl"), r"set generate\.top_logprobs.*or train\.rehearsal\.reference to base"),
        (generate(rows=0), train(budget=0.1), r"generate\.rows is 0; set rows, or budget to null"),
        (drawn(source="replay", replay=REPLAY), train(loss="kl"), "source=replay: set generate.tail_samples"),
        (MIXED.model_copy(update={"tail_samples": 0}), train(loss="kl"), "source=mixed: set generate.tail_samples"),
        (drawn(source="contextual"), train(loss="kl"), r"tail to bucket, or train\.rehearsal\.reference to base"),
        (drawn(source="template"), train(loss="kl"), r"generate\.source=template: set"),
        *(
            (
                generate(source=source, top_logprobs=16),
                train(loss="kl", budget=0.1),
                rf"on source {source} it is another",
            )
            for source in ("template", "contextual")
        ),
        (generate(top_p=0.5, min_length=3), train(budget=0.1), r"generate\.top_p=0\.5, generate\.min_length=3: set"),
        (replayed(), train(budget=0.1), r"on source replay it is another one; set generate\.source to context-free"),
        (generate(rows=100), train({"ewc": {"weight": 1}}), r"ewc\.rows=256.*has 100 of source context-free: raise"),
        (drawn(temperature=0.7), train(loss="kl"), r"generate\.temperature=0\.7: set generate\.tail_samples"),
        (generate(temperature=0.7), train({"ewc": {"weight": 1}}), "temperature=0.7: leave that out"),
        (generate(source="contextual"), train({"ewc": {"weight": 1}}), r"set generate\.source to context-free"),
    ],
)
def test_what_the_corpus_lacks_is_named_with_the_remedy(corpus: GenerateSpec, training: TrainSpec, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        check_rehearsal(corpus, training)
        check_drawn_tokens(corpus, FilterSpec(), SelectSpec(), training.rehearsal)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"filter": {"duplicates": True}}, r"filter\.duplicates=True: set"),
        ({"filter": {"max_mean_logprob": -1.0, "min_tokens": 4}}, r"filter\.min_tokens=4, filter\.max_mean_logprob=-1"),
        ({"select": {"corpus_rows": 5}}, r"select\.corpus_rows=5 by geometric-median: set"),
    ],
)
def test_filtered_and_selected_rows_are_no_sample_to_read_a_divergence_off(stage: dict[str, Any], words: str) -> None:
    for generates, rehearsal in ({"top_logprobs": 8, "tail_samples": 0}, {"loss": "kl"}), ({}, {"budget": 0.1}):
        given = {"name": "any", "base": "tiny", "target": {"path": "rows.jsonl"}, "train": {"rehearsal": rehearsal}}
        with pytest.raises(ValidationError, match=words):
            Recipe.model_validate({**given, **stage, "generate": generates})
        Recipe.model_validate(
            {**given, **stage, "generate": {"top_logprobs": 8}, "train": {"rehearsal": {"loss": "kl"}}}
        )
        Recipe.model_validate({**given, "generate": generates, "select": {"corpus_rows": 5, "method": "random"}})


def test_stopping_before_the_budget_is_used_up_is_refused() -> None:
    for above in (0.01, 0.1):
        with pytest.raises(ValidationError, match=rf"stop_above {above} is below what .* 0\.11 for .*budget of 0\.1"):
            TrainSpec.model_validate({"rehearsal": {"budget": 0.1}, "watch": {"every": 1, "stop_above": above}})
    TrainSpec.model_validate({"rehearsal": {"budget": 0.1}, "watch": {"every": 1, "stop_above": 0.2}})


QLORA = {"lora": {"rank": 4, "quantise": "nf4"}}
LIVE = {"loss": "kl", "reference": "base"}


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"methods": QLORA, "rehearsal": {"loss": "kl"}}, "reference stored is of the base before nf4: set base"),
        (
            {"methods": QLORA | {"target_divergence": {"weight": 1}}},
            "target_divergence.reference stored is of the base before nf4: set base",
        ),
        ({"methods": QLORA, "rehearsal": {"budget": 0.1}}, "set loss to kl and reference to base"),
        ({"methods": QLORA, "rehearsal": LIVE, "watch": {"every": 1, "stop_above": 1}}, "leave it out"),
        (
            {"methods": {"lora": {"rank": 4, "dropout": 0.1}, "target_divergence": {"weight": 1}}},
            "would not be 0 at the base; set lora.dropout to 0",
        ),
    ],
)
def test_a_model_that_is_not_the_base_at_the_start_is_not_compared_with_it(given: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValidationError, match=remedy):
        TrainSpec.model_validate(given)


def test_a_quantised_model_is_compared_with_a_quantised_base() -> None:
    held = {"target_divergence": {"weight": 1, "reference": "base"}}
    TrainSpec.model_validate({"methods": QLORA | held, "rehearsal": LIVE | {"budget": 0.1}})
    TrainSpec.model_validate({"methods": QLORA})


@pytest.mark.parametrize("given", [{"stop_above": 0.1}, {"benchmarks": ["tiny_rev"]}])
def test_watching_something_needs_to_know_how_often(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"need watch\.every"):
        TrainSpec.model_validate({"watch": given})


@pytest.mark.parametrize(("rows", "enough"), [(189, False), (191, True)])
def test_a_corpus_that_cannot_last_a_budget_is_told_by_the_settings(rows: int, enough: bool) -> None:
    """20 steps of at least 110 - 10 tokens, of which the last needs one new row: 19 x 100 tokens are 190 rows of 10."""
    mix, training = MixSpec(target_rows=8, rehearsal_tokens=110), train(budget=0.1).model_copy(update={"epochs": 2})
    corpus = generate(rows=rows, length=10)
    if enough:
        check_supply(corpus, mix, training, 80)
        return
    with pytest.raises(BadInput, match=r"20 steps of 110 tokens, but generate\.rows=189 of at most 10.*to 190 or more"):
        check_supply(corpus, mix, training, 80)
    with pytest.raises(BadInput, match=r"rehearsal\.refresh fresh takes rows that were not seen before"):
        check_supply(corpus, mix, train(refresh="fresh").model_copy(update={"epochs": 2}), 80)
    check_supply(corpus, mix, train(), 80)  # no budget, no demand


def test_a_corpus_of_which_nothing_would_be_rehearsed_is_refused() -> None:
    content = {"name": "n", "base": "tiny", "target": {"path": "rows.jsonl"}, "mix": {"rehearsal_tokens": 0}}
    with pytest.raises(ValidationError, match="none of the corpus' 1024 rows is rehearsed: raise it, or set"):
        Recipe.model_validate(content)
    Recipe.model_validate(content | {"generate": {"rows": 0}})
    Recipe.model_validate(content | {"train": {"rehearsal": {"weight": 0}}})


@pytest.mark.parametrize(
    ("spec", "unread", "read"),
    [
        (MixSpec, {"flow_average": "row"}, {"flow": "off"}),
        (WatchSpec, {"rows": 64}, {"every": 0}),
        (SelectSpec, {"method": "random"}, {"target_rows": None}),
        (Target, {"path": "rows.jsonl", "rewrite_lengths": 2.0}, {"rewrite": "off"}),
        (GenerateSpec, {"tail_samples": 8}, {"top_logprobs": 0}),
        (GenerateSpec, {"source": "replay", "replay": REPLAY, "temperature": 0.7}, None),
    ],
)
def test_what_nothing_reads_is_refused_alone_and_counts_for_nothing_where_it_is_inherited(
    spec: type[Spec],
    unread: dict[str, Any],
    read: dict[str, Any] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "documents.jsonl").write_text("{}")
    needed = {name: value for name, value in unread.items() if name in ("path", "source", "replay")}
    if read is not None:
        with pytest.raises(ValidationError, match=r"has no effect without .*: give that too, or leave it out"):
            spec.model_validate(unread)
    assert spec.model_validate(unread | (read or {})).digest() == spec.model_validate(needed).digest()


def test_documents_are_not_called_biased_by_settings_of_a_sampling_that_is_none() -> None:
    assert replayed(temperature=0.7).biases() == [] and generate(temperature=0.7).biases() == ["temperature=0.7"]
