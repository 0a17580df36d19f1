"""Rehearsal of targets that the base was trained on before: their prompts answered by the base, or their own rows."""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from cfsd.data.stage import prepare
from cfsd.data.target import Target
from cfsd.errors import BadInput
from cfsd.generate.spec import GenerateSpec
from cfsd.generate.stage import generate
from cfsd.machine import Machine
from cfsd.mix.spec import MixSpec
from cfsd.mix.stage import mix
from cfsd.model.likelihood import token_logprobs
from cfsd.model.loading import load_for_measuring, load_tokenization
from cfsd.store.artifact import Artifact, Store, key_of
from cfsd.store.tables import read_rows, shards
from tasks._planned import Planned, planning
from tasks.generate import generate_corpus
from tests.conftest import fetched, write_rows

LENGTH, ROWS = 12, 60
TOKENS = LENGTH * ROWS


class Known(NamedTuple):
    """A base and two targets that it is said to know."""

    store: Store
    base: Artifact
    targets: tuple[Artifact, Artifact]

    def rows(self, number: int, part: str) -> list[dict[str, Any]]:
        return list(read_rows(self.store.path(self.targets[number - 1]), part))

    def corpus(self, spec: GenerateSpec, **machine: Any) -> Artifact:
        on = Machine(device="cpu", threads=1, **machine)
        key = key_of("generate", spec, repr(machine))
        make = lambda draft: generate(self.base, None, spec, draft, on, earlier=self.targets)  # noqa: E731
        return self.store.make("corpus", key, make)[0]

    def by_source(self, corpus: Artifact) -> dict[str, list[dict[str, Any]]]:
        found = defaultdict(list)
        for row in read_rows(self.store.path(corpus), "corpus"):
            found[row["source"]].append(row)
        return found


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Known:
    folder = tmp_path_factory.mktemp("earlier")
    store = Store(folder / "data")
    base = fetched(store, model_folder)
    targets = []
    for seed in (1, 2):
        target = Target(path=str(write_rows(folder / f"{seed}.jsonl", count=24, seed=seed)), held_out=8, seed=0)
        key = key_of("prepare", base, target)
        targets.append(store.make("target", key, lambda draft, t=target: prepare(base, t, draft))[0])
    return Known(store, base, (targets[0], targets[1]))


def spec_of(source: str, share: float = 0.5, **changes: Any) -> GenerateSpec:
    fractions = {"context-free": 1 - share, source: share}
    return GenerateSpec.model_validate(
        {"rows": ROWS, "length": LENGTH, "source": "mixed", "fractions": fractions, "seed": 0, **changes}
    )


def prompt_of(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row["token_ids"][: row["supervised"].index(True)])


def given_of(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(t for t, p in zip(row["token_ids"], row["logprobs"], strict=True) if p is None)


def test_prompts_are_those_of_training_rows_of_all_earlier_targets_and_never_held_out(known: Known) -> None:
    found = known.by_source(known.corpus(spec_of("earlier-prompts")))
    assert set(found) == {"context-free", "earlier-prompts 1", "earlier-prompts 2"}
    for number in (1, 2):
        train, held_out = ([prompt_of(row) for row in known.rows(number, part)] for part in ("train", "held_out"))
        begun = [given_of(row) for row in found[f"earlier-prompts {number}"]]
        assert set(begun) == set(train) and not set(begun) & (set(held_out) - set(train))
    answers = [[tuple(row["token_ids"]) for row in found[f"earlier-prompts {n}"]] for n in (1, 2)]
    assert len(set(answers[0])) > len(answers[0]) // 2  # sampled, each anew


@pytest.mark.parametrize("source", ["earlier-prompts", "earlier-rows"])
def test_every_earlier_target_has_the_same_share_of_the_tokens(known: Known, source: str) -> None:
    corpus = known.corpus(spec_of(source, 0.4))
    found = {
        name: sum(p is not None for row in rows for p in row["logprobs"])
        for name, rows in known.by_source(corpus).items()
    }
    shares = {"context-free": 0.6, f"{source} 1": 0.2, f"{source} 2": 0.2}
    for name, share in shares.items():  # whole rows: the last one goes over
        assert share * TOKENS <= found[name] < share * TOKENS + LENGTH
    assert corpus.metadata["token_fractions"] == {n: count / sum(found.values()) for n, count in found.items()}


def test_rows_are_the_training_rows_and_count_where_they_counted_as_a_target(known: Known) -> None:
    corpus = known.corpus(spec_of("earlier-rows", top_logprobs=4))
    found, model = known.by_source(corpus), load_for_measuring(known.store, known.base, "cpu")
    eos = load_tokenization(known.store.path(known.base)).eos_ids
    for number in (1, 2):
        train = {tuple(row["token_ids"]): row["supervised"] for row in known.rows(number, "train")}
        rows = found[f"earlier-rows {number}"]
        assert {tuple(row["token_ids"]) for row in rows} == set(train)
        scored = token_logprobs(model, [row["token_ids"] for row in rows], eos, top_logprobs=4)
        for row, sample in zip(rows, scored, strict=True):
            learned = train[tuple(row["token_ids"])]
            assert [p is not None for p in row["logprobs"]] == learned
            wanted = [p for p, kept in zip(sample.logprobs, learned, strict=True) if kept]
            assert [p for p in row["logprobs"] if p is not None] == pytest.approx(wanted, rel=1e-5)
            tops = np.array(row["topk_logprobs"], float).reshape(len(learned), 4)  # null is NaN
            assert np.array_equal(np.isfinite(tops[:, 0]), learned)


def test_the_mixture_supervises_the_responses_alone(known: Known, tmp_path: Path) -> None:
    corpus, spec = known.corpus(spec_of("earlier-rows", top_logprobs=4)), MixSpec(seed=0)
    at = known.store.path
    mixed = known.store.make("mixture", "m", lambda d: mix(at(known.targets[0]), at(corpus), spec, d))[0]
    known_rows = {tuple(row["token_ids"]): row["supervised"] for row in known.rows(2, "train")}
    rows = [row for row in read_rows(at(mixed), "mixture") if row["source"] == "earlier-rows 2"]
    assert rows and all(row["supervised"] == known_rows[tuple(row["token_ids"])] for row in rows)


@pytest.mark.parametrize("source", ["earlier-prompts", "earlier-rows"])
def test_rows_do_not_depend_on_shards_and_a_lost_shard_comes_again_the_same(
    known: Known, tmp_path: Path, source: str
) -> None:
    whole = known.corpus(spec_of(source))
    small = known.corpus(spec_of(source), sampling_rows=16)
    texts = []
    for corpus in (whole, small):
        rows = read_rows(known.store.path(corpus), "corpus")
        texts.append(sorted((row["source"], row["row_id"], tuple(row["token_ids"])) for row in rows))
    assert texts[0] == texts[1] and len(shards(known.store.path(small), "corpus")) > 3

    def killed(draft: Any) -> None:
        generate(known.base, None, spec_of(source), draft, Machine(device="cpu", threads=1), earlier=known.targets)
        raise KeyboardInterrupt

    def resumed(draft: Any) -> None:
        assert draft.continued
        shards(draft.folder, "corpus")[-1].unlink()
        generate(known.base, None, spec_of(source), draft, Machine(device="cpu", threads=1), earlier=known.targets)

    with pytest.raises(KeyboardInterrupt):
        known.store.make("corpus", f"killed {source}", killed)
    again = known.store.make("corpus", f"killed {source}", resumed)[0]
    assert again.content == whole.content


def test_without_earlier_targets_the_sources_are_refused(known: Known, tmp_path: Path) -> None:
    spec = spec_of("earlier-rows")
    with pytest.raises(BadInput, match="earlier-rows needs `earlier`, the targets that the base was trained on"):
        known.store.make("corpus", "none", lambda d: generate(known.base, None, spec, d, Machine(device="cpu")))


def test_earlier_targets_are_in_the_key_and_none_of_them_in_none(known: Known) -> None:
    plain, rows = GenerateSpec(seed=0), spec_of("earlier-rows")
    first, second = known.targets

    def key(spec: GenerateSpec, *earlier: Artifact) -> str | None:
        steps: list[Planned] = []
        token = planning.set(steps)
        try:
            generate_corpus(known.base, first, spec, Machine(device="cpu"), earlier)
        finally:
            planning.reset(token)
        return steps[0].key

    assert key(plain) == key_of("generate", known.base, None, plain)
    assert len({key(rows, first), key(rows, second), key(rows, first, second), key(rows, second, first)}) == 4
    unknown = Artifact(kind="target", key="", content="", metadata={})
    assert key(rows, first, unknown) is None  # a plan: not made yet
