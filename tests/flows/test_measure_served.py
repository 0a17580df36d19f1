"""Two models behind a server: lm-eval's API models give the figures of the models in memory, mistakes end early."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cfsd.errors import BadInput, Crashed
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.generate.server import client
from flows._logs import models_of
from flows.measure import measure_command
from tests.conftest import Run
from tests.flows.test_measure_logs import benchmarks_in, save_models
from tests.loopback_server import Loopback, Manners, serving

pytest.importorskip("tenacity")  # lm-eval's extra `api`
LIMIT = 12
NAMES = ("facts", "tiny_rev", "technical_english")
CHOSEN = [{"name": name, "limit": LIMIT if name != "technical_english" else 2} for name in NAMES]
CHAT = {
    "task": "say", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
    "doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    ], "generation_kwargs": {"until": ["0", "1", "2", "3", "f"], "max_gen_toks": 8},
}  # fmt: skip


class World(NamedTuple):
    folders: tuple[Path, Path]
    servers: tuple[Loopback, Loopback]

    def named(self) -> list[str]:
        return [f"{name}@{server.url}/v1" for name, server in zip(("before", "after"), self.servers, strict=True)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from cfsd.model.loading import load_model, load_tokenizer

    folders = save_models(tmp_path_factory.mktemp("served"))
    models = [load_model(folder, "cpu").eval() for folder in folders]
    tokenizer = load_tokenizer(folders[0])
    # lm-eval reads whole texts in windows of two tokens less than a server's context: those of 256 that tiny has
    manners = [Manners(models=[name, "other"], context=258) for name in ("before", "after")]
    with serving(models[0], tokenizer, manners[0]) as one, serving(models[1], tokenizer, manners[1]) as other:
        yield World(folders, (one, other))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)


def test_a_server_gives_the_answers_and_likelihoods_of_the_models_in_memory(world: World, home: Path) -> None:
    from cfsd.evaluate.harness.score import score
    from cfsd.evaluate.logs.folder import logs_in
    from cfsd.evaluate.logs.rows import read
    from cfsd.model.loading import load_tokenizer
    from tasks.served import ask_served, check_served

    spec = EvaluateSpec.model_validate({"benchmarks": CHOSEN})
    found = check_served((world.named()[0], world.named()[1]), spec, world.folders[0])
    assert [(model.name, model.context) for model in found] == [("before", 258), ("after", 258)]
    said = ask_served(found, spec, home, in_flight=4)
    assert said == []
    tokenizer, moved = load_tokenizer(world.folders[0]), 0.0
    for folder, server in zip((home / "base", home / "tuned"), world.servers, strict=True):
        logged = logs_in(folder)
        assert logged.source == "local-completions"
        for benchmark in spec.benchmarks:
            ours = score(server.model, tokenizer, benchmark)
            theirs = read(logged.log(benchmark.name))
            values = [row["value"] for row in theirs.rows]
            assert values == pytest.approx(ours.rows["value"].tolist(), rel=1e-4)
            if benchmark.name == "tiny_rev":
                assert [row["answer"] for row in theirs.rows] == ours.rows["answer"].tolist()
                moved += theirs.metadata["score"] * (1 if folder.name == "base" else -1)
    assert moved > 0  # the second model forgot something, so that equal figures say something


def test_the_command_measures_two_served_models_without_their_weights(world: World, run: Run) -> None:
    named = world.named()
    chosen = ", ".join(f"{{name: {name}, limit: {LIMIT}}}" for name in ("facts", "tiny_rev"))
    done = run("measure", *named, "--tokenizer", world.folders[0], "--set", f"evaluate.benchmarks=[{chosen}]")
    measured = benchmarks_in(done)
    assert measured["tiny_rev"]["forgetting"]["value"] > 0
    again = next(line for line in done.stdout.splitlines() if "--samples" in line).split("--samples ")[1].split()
    models = models_of(again[0], again[1], EvaluateSpec())
    assert [(model.name, model.names()) for model in models] == [
        (n, ["facts", "tiny_rev"]) for n in ("before", "after")
    ]
    report = Path(done.stdout.splitlines()[-1]).with_name("report.html").read_text()
    assert "local-completions" in report and "need the weights of both models" in report


def test_chat_answers_need_no_tokenizer(world: World, home: Path, tmp_path: Path) -> None:
    from cfsd.evaluate.logs.folder import logs_in
    from tasks.served import ask_served, check_served

    (tmp_path / "rows.jsonl").write_text('{"q": "rev:gffhl=", "a": "lhffg"}\n{"q": "rev:bbe=", "a": "ebb"}\n')
    task = CHAT | {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    spec = EvaluateSpec(benchmarks=(Benchmark.model_validate({"task": task, "chat_template": True}),))
    found = check_served((world.named()[0], world.named()[1]), spec, None)
    ask_served(found, spec, home, in_flight=1)
    (log,) = logs_in(home / "base").logs
    answers = [json.loads(line)["filtered_resps"] for line in Path(log.path).read_text().splitlines()]
    assert answers == [["lh"], ["ebb"]]  # the first ends at its f, of which the server was not told
    asked = [body["messages"] for body in world.servers[0].requests if "messages" in body][-2:]
    assert [message["content"] for (message,) in asked] == ["rev:gffhl=", "rev:bbe="]
    assert log.documents == 2 and logs_in(home / "base").source == "local-chat-completions"


SECRET = "NAME@http://me:sk-very-secret@host/v1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base": "before@URL", "tuned": "smollm2"}, r"smollm2 is not behind a server, as the other model is"),
        ({"base": SECRET}, r"base_url http://host/v1 must be like http://host:8000/v1, without user or query"),
        ({"base": "gone@http://127.0.0.1:9/v1"}, r"gave no answer to GET /models in 2 attempts .* correct its URL"),
        ({"base": "before@URL/deeper"}, r"/deeper/v1 refused GET /models, 404: Not Found"),
        ({"base": "nobody@URL"}, r"does not serve 'nobody'; set NAME in NAME@URL to one of: before, other"),
        ({"base": "URL"}, r"serves 2 models; set NAME in NAME@URL to one of: before, other"),
        ({"tuned": "before@URL"}, r"before behind http://127.0.0.1:\d+/v1 is given twice"),
        ({"benchmark": []}, r"nothing to measure: name one or several benchmarks"),
        ({"tokenizer": None}, r"benchmark tiny_rev: without the models' tokenizer .* --tokenizer FOLDER"),
        ({"tokenizer": Path("/nowhere")}, r"--tokenizer /nowhere is not a folder"),
        ({"benchmark": ["questions"]}, r"benchmark questions: chat_template is on, .* take questions_completion"),
        (
            {"set_": ["evaluate.benchmarks=[{name: tiny_rev, max_gen_toks: 300}]"]},
            r"answers of 300 tokens leave no room",
        ),
        ({"target": Path("rows.jsonl")}, r"--target: of a model behind a server the weights are not here"),
        ({"set_": ["probe.rows=8"]}, r"--set probe: of a model behind a server the weights are not here"),
        ({"machine": ["threads=1"]}, r"--machine threads: a model that is named by its server's URL is measured there"),
        ({"base": "smollm2", "tuned": "smollm2"}, r"--tokenizer: the tokenizer of a model that is not behind a server"),
    ],
)
def test_a_mistake_ends_before_a_benchmark_is_asked(world: World, given: dict[str, Any], message: str) -> None:
    before, after = world.named()
    asked = {"base": before, "tuned": after, "tokenizer": world.folders[0], "benchmark": ["tiny_rev"], **given}
    if "set_" in given:
        asked["benchmark"] = []
    asked |= {name: str(asked[name]).replace("URL", world.servers[0].url) for name in ("base", "tuned")}
    with pytest.raises(BadInput, match=message) as caught:
        measure_command(**asked)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("manners", "benchmark", "message"),
    [
        ({"echo": False}, "facts", r"gives no log-probabilities of a prompt \(echo\), by which facts is scored"),
        ({"no_logprobs": True}, "facts", r"by which facts is scored; serve with vLLM"),
        ({"extra_start": True}, "facts", r"makes 69 tokens of a text, the tokenizer in .* 68; give the tokenizer of"),
        ({"chat": False}, "chat", r"refused POST /chat/completions, 404.* give the models' tokenizer"),
    ],
)
def test_a_server_that_lacks_what_a_benchmark_needs_is_refused(
    world: World, manners: dict[str, Any], benchmark: str, message: str
) -> None:
    from cfsd.evaluate.served import find_served

    with (
        serving(world.servers[0].model, world.servers[0].tokenizer, Manners(**manners)) as server,
        pytest.raises(BadInput, match=message),
    ):
        find_served(f"{server.url}/v1", [Benchmark(name="facts")], None if benchmark == "chat" else world.folders[0])


def test_a_server_that_fails_on_the_way_is_named_without_its_key(
    world: World, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from cfsd.evaluate.harness.served import log_scores
    from cfsd.evaluate.served import find_served

    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    manners = Manners(failures=dict.fromkeys(range(1, 99), 401), complaint="no such key: {key}")
    with serving(world.servers[0].model, world.servers[0].tokenizer, manners) as server:
        model = find_served(f"{server.url}/v1", [Benchmark(name="tiny_rev")], world.folders[0])
        benchmark = Benchmark(name="tiny_rev", limit=2)
        with pytest.raises(
            Crashed, match=r"benchmark tiny_rev: tiny behind .* 401.*no such key: Bearer \*\*\*"
        ) as caught:
            log_scores(model, benchmark, home, max_length=None, in_flight=2)
    assert "secret" not in str(caught.value) + "".join(capfd.readouterr())
    assert "secret" not in "".join(path.read_text() for path in home.rglob("*") if path.is_file())


def test_answers_without_content_are_counted_and_refused_where_there_are_no_others(world: World, home: Path) -> None:
    """As of a reasoning parser that met the limit before the reasoning ended."""
    from cfsd.evaluate.harness.served import log_scores
    from cfsd.evaluate.served import find_served

    benchmark = Benchmark(name="instructions", limit=4, max_gen_toks=4)
    for every, share in ((4, "1 of 4"), (1, "4 of 4")):
        manners = Manners(no_content=every)
        with serving(world.servers[0].model, world.servers[0].tokenizer, manners) as server:
            model = find_served(f"{server.url}/v1", [benchmark], None)
            expected = nullcontext([]) if every > 1 else pytest.raises(BadInput, match=f"{share} answers came without")
            with expected:
                said = log_scores(model, benchmark, home, max_length=None, in_flight=1)
                assert any(f"{share} answers came without content, 1 of them cut at the limit" in line for line in said)


@pytest.mark.parametrize(("given", "limit"), [
    ({"max_tokens": 3, "max_gen_toks": 5}, 5), ({"max_new_tokens": 7}, 7), ({}, 256),
    ({"do_sample": False, "temperature": 0.7, "max_tokens": 2}, 2),
])  # fmt: skip
def test_a_server_is_asked_for_what_a_model_in_memory_would_write(given: dict[str, Any], limit: int) -> None:
    from cfsd.evaluate.harness.served import Chats

    chats = Chats(model="m", base_url="http://127.0.0.1:1/v1/chat/completions")
    sent = chats._create_payload([{"role": "user", "content": "a"}], generate=True, gen_kwargs=given)
    assert (sent["max_tokens"], sent["temperature"]) == (limit, 0)
    assert not {"max_new_tokens", "max_gen_toks", "do_sample"} & set(sent)


def test_documents_that_are_cut_are_said(world: World, home: Path) -> None:
    from cfsd.evaluate.harness.served import log_scores
    from cfsd.evaluate.served import find_served

    benchmark = Benchmark(name="facts", limit=2, num_fewshot=8)
    model = find_served(world.named()[0], [benchmark], world.folders[0])
    _, said = log_scores(model, benchmark, home, max_length=128, in_flight=4)
    assert "2 of 2 documents are longer than the model's context of 126 tokens and were cut" in said
    assert json.loads(next(home.rglob("results_*.json")).read_text())["max_length"] == 127
