"""Recipes, data and models come from anywhere: nothing in them runs, escapes its folder or acts on who reads a page."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import tasks.report
from cfsd.comparison import Comparison
from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.benchmark_size import size_of_benchmark
from cfsd.overrides import override, read_yaml, validated
from cfsd.recipe import Recipe
from cfsd.report.comparisons import comparisons_of
from cfsd.report.files import ReportSource, write_corpus_files, write_files, write_numbers
from cfsd.report.markdown import inert, plain
from cfsd.report.model_card import model_card
from cfsd.report.place import report_folder
from cfsd.report.rendering import rendered
from cfsd.report.run_record import RunRecord
from cfsd.report.summarise import summarise
from tests.conftest import ROOT, save_model
from tests.report.test_report import World

CHROMIUM = Path("/usr/bin/chromium")
JINJA = "{{ cycler.__init__.__globals__.os.system('touch %s') }}"
ATTACKS = (
    "<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    "<svg/onload=window.ran=1>",
    "</pre></style></title><script>window.ran = 1</script>",
    "<a href='javascript:window.ran = 1'>click</a>",
    "[click](javascript:window.ran=1) ![seen](http://127.0.0.1:9/seen.png)",
    '" onmouseover="window.ran = 1" x="',
    "--><script>window.ran = 1</script><!--",
    "]]><script>window.ran = 1</script>",
)
HOSTILE = " ".join(ATTACKS)


# nothing runs


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that is there as soon as anything ran."""
    return tmp_path / "ran"


def benchmark_of(folder: Path, **fields: Any) -> Benchmark:
    (folder / "sums.jsonl").write_text(json.dumps({"question": "2", "choices": ["4", "5"], "answer": 0}) + "\n")
    task = {
        "task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_target": "answer", "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    return Benchmark.model_validate({"task": task | fields})


def test_a_template_of_a_benchmark_reaches_nothing_but_its_document(marker: Path, tmp_path: Path, home: Path) -> None:
    import torch

    from cfsd.evaluate.harness.load import loaded

    with loaded(
        benchmark_of(tmp_path, doc_to_text="{{question | regex_replace('2', '3')}} ="), torch.device("cpu")
    ) as (task, _):
        assert task.doc_to_text({"question": "2"}) == "3 ="
    for field in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        hostile = benchmark_of(tmp_path, **{field: JINJA % marker})
        size_of_benchmark(hostile, len)
        with pytest.raises(BadInput, match="benchmark sums"), loaded(hostile, torch.device("cpu")) as (task, _):
            task.doc_to_text(task.dataset["test"][0])
    assert not marker.exists()


def test_a_chat_template_reaches_nothing_but_its_messages(marker: Path, tmp_path: Path) -> None:
    from jinja2.exceptions import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path / "model"))
    tokenizer.chat_template = JINJA % marker
    with pytest.raises(TemplateError):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert not marker.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!function os.system"])
def test_a_tag_in_yaml_makes_no_object(tag: str, marker: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"name: {tag} ['touch {marker}']\nbase: tiny\n")
    with pytest.raises(BadInput, match="is not valid YAML"):
        Recipe.load(tmp_path / "recipe.yaml")
    with pytest.raises(BadInput):
        Recipe.load(ROOT / "deployments" / "recipes" / "tiny.yaml", [f"name={tag} ['touch {marker}']"])
    (tmp_path / "mine.yaml").write_text(f"task: mine\ndoc_to_text: {tag} ['touch {marker}']\n")
    with pytest.raises(BadInput):
        Benchmark(name="mine", folder=str(tmp_path)).check()
    assert not marker.exists()


ALLOWED = {"yaml.load": {"_Loader"}, "np.load": {"allow_pickle=False"}}
NEVER = {"eval", "exec", "os.system", "pickle.load", "pickle.loads", "torch.load", "joblib.load", "yaml.unsafe_load",
         "yaml.full_load", "marshal.loads", "dill.loads", "cloudpickle.loads", "shutil.unpack_archive",
         "tarfile.open", "zipfile.ZipFile"}  # fmt: skip


def calls() -> Iterator[tuple[str, ast.Call]]:
    for folder in ("cfsd", "tasks", "flows"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call):
                    yield str(file.relative_to(ROOT)), node


def test_no_pickle_no_code_of_others_and_no_archive_is_read() -> None:
    for file, call in calls():
        name = ast.unparse(call.func)
        words = {ast.unparse(word) for word in (*call.args, *call.keywords)}
        assert name not in NEVER, f"{file}: {name}"
        assert name not in ALLOWED or words & ALLOWED[name] or any("_Loader" in w for w in words), f"{file}: {name}"
        assert not {"trust_remote_code=True", "shell=True"} & words, f"{file}: {name}"
        if name.endswith("Environment") and "jinja" in (ROOT / file).read_text():
            assert "Sandboxed" in name or any(word.startswith("autoescape=") for word in words), f"{file}: {name}"


@pytest.mark.parametrize("letter", ["\x1b", "\n", "\0", "\x9b", "\ud800"])
def test_a_name_that_a_terminal_would_obey_is_refused(letter: str) -> None:
    tiny = ROOT / "deployments" / "recipes" / "tiny.yaml"
    with pytest.raises(BadInput, match="instead of showing: take it out"):
        validated(Recipe, override(read_yaml(tiny), {"name": f"a{letter}[2Jb"}), "test")
    with pytest.raises(BadInput, match="instead of showing: take it out"):
        Comparison(recipe=Recipe.load(tiny), variants={f"a{letter}b": {}}).recipes()


# nothing escapes its folder

NAMES = ("../../../outside", "/tmp/outside", "..", "a\0b", "ü" * 300, "")


def test_no_name_leads_out_of_the_data_folder(tmp_path: Path) -> None:
    home = tmp_path / "in" / "data"
    world = World(home)
    run_record = world.trained("fine", right=60, loss=0.5, kl=0.1)
    for name in NAMES:
        named = run_record.model_copy(update={"name": name})
        folder = report_folder(home, name, [named])
        assert folder.parent == home / "reports"
        _, files = write_numbers(folder, world.store, ReportSource(title=name, run_records=(named,)))
        assert len(files) == 2
        assert all(file.resolve().parent == folder.resolve() for file in files)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["data"]


@pytest.mark.parametrize("name", ["../../../outside", "/etc/passwd"])
def test_a_benchmark_is_looked_for_by_name_and_never_by_path(name: str) -> None:
    with pytest.raises(BadInput, match="no benchmark"):
        Benchmark(name=name).check()


# nothing acts on who reads a page

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
PIECES = [*ATTACKS, *" `\\\n[<a|#", "```", "\n\n", "](", "]:", "http://x.y", "<!-- ", "&lt;b&gt;", "~~~", "    ",
          "<http://x.y>", "[a]: http://x.y", "[a][a]", "!["]  # fmt: skip


def acting(text: str) -> list[str]:
    """Return what Markdown makes of `text` that is more than text, links within the page excepted."""
    tokens = MARKDOWN.parse(text)
    inner = [child for token in tokens for child in token.children or []]
    more = [t for t in (*tokens, *inner) if t.type in ("link_open", "image", "html_inline", "html_block")]
    return [f"{t.type} {t.attrs or t.content}" for t in more if not str(t.attrGet("href") or "").startswith("#")]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_markdown_shows_what_people_and_models_wrote_and_does_not_obey_it(text: str) -> None:
    assert acting(f"# {plain(text)}\n\n* {plain(text)}\n") == []
    assert acting(inert(f"# {text}\n\n* {text}\n")) == []


def test_a_model_card_shows_names_and_does_not_obey_them(hostile: tuple[World, list[RunRecord]]) -> None:
    world, run_records = hostile
    for run_record in run_records:
        summary = summarise(world.store, run_record, run_records)
        card = model_card(world.store, run_record, summary, comparisons_of(world.store, run_records))
        assert acting(card.split("\n---\n", 1)[1]) == []


def test_the_text_for_prefect_and_mlflow_shows_names_and_does_not_obey_them(
    hostile: tuple[World, list[RunRecord]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world, run_records = hostile
    monkeypatch.setenv("CFSD_HOME", str(world.store.home))
    report = tasks.report.write_report(tmp_path / "report", HOSTILE, run_records, [HOSTILE])
    assert "script" in report.text and acting(report.text) == []


def test_a_figure_that_is_no_markup_stays_as_it_is() -> None:
    text = "“mine” fell by 0.229 [0.0672, 0.593] nats (p < 0.001, 3 > 2): a_b, *c*"
    assert plain(text) == text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, list[RunRecord]]:
    """Variants whose names, rows, answers, benchmarks and texts attack whoever reads them."""
    world = World(tmp_path_factory.mktemp("hostile"), text=HOSTILE)
    tricks = (HOSTILE, f"second\n```\n{HOSTILE}\n\n[a]: http://x.y\n")
    return world, [
        attacking(world.trained(f"variant {i}", right=60 - i, loss=0.5, kl=0.1), name) for i, name in enumerate(tricks)
    ]


def attacking(run_record: RunRecord, name: str) -> RunRecord:
    """Return the run record with hostile names in place of its own."""
    assert run_record.recipe
    named = run_record.recipe.model_copy(update={"name": name})
    sides = {
        role: side.model_copy(update={"benchmarks": {f"{HOSTILE} {b}": a for b, a in side.benchmarks.items()}})
        for role, side in (("before", run_record.before), ("after", run_record.after))
    }
    return run_record.model_copy(update={"name": name, "recipe": named, **sides})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[browser]")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.processes
def test_a_browser_shows_what_people_and_models_wrote_and_runs_none_of_it(
    hostile: tuple[World, list[RunRecord]], browser: Any, tmp_path: Path
) -> None:
    world, run_records = hostile
    kept = ReportSource(title=HOSTILE, notes=(HOSTILE,), run_records=tuple(run_records))
    _, files = write_files(tmp_path / "report", world.store, kept)
    corpus = write_corpus_files(tmp_path / "corpus", world.store, kept)
    for file, literal in ((files[0], 20), (corpus, 3)):
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("dialog", lambda dialog, asked=asked: (asked.append(dialog.message), dialog.dismiss()))
        page.goto(file.as_uri(), wait_until="load")
        page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        for element in page.query_selector_all("summary, th, pre")[:20]:
            element.dispatch_event("mouseover")
        assert page.evaluate("window.ran") is None
        assert asked == [file.as_uri()]
        assert (
            page.evaluate("document.querySelectorAll('script, img, iframe, object, embed, [onload], [onerror]').length")
            == 0
        )
        assert not [
            link for link in page.evaluate("[...document.links].map(a => a.getAttribute('href'))") if link[0] != "#"
        ]
        words = page.evaluate("document.body.innerText")
        assert words.count("<script>window.ran = 1</script>") >= literal
        page.close()


@pytest.mark.processes
def test_a_page_that_held_a_script_all_the_same_would_not_run_it(browser: Any, tmp_path: Path) -> None:
    """The second line of defence: the page's own policy."""
    page_text = rendered("corpus_page.html.j2", title="t", corpora=[])
    for attack in ("<script>window.ran = 1</script>", "<img src='data:,x' onerror='window.ran = 1'>"):
        (tmp_path / "page.html").write_text(page_text.replace("</body>", f"{attack}</body>"))
        page = browser.new_page()
        page.goto((tmp_path / "page.html").as_uri(), wait_until="load")
        page.wait_for_timeout(200)
        assert attack[:8] in page.content() and page.evaluate("window.ran") is None
        page.close()
