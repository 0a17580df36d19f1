"""`--until filter`: the corpus alone, and a page that shows it. On a real server, as a user would."""

import re
from pathlib import Path
from typing import Any

from cfsd.store.artifact import Store
from tests.conftest import Run

EXTRA = ["--set", "generate.temperature=0.8", "--set", "filter.min_tokens=3", "--set", "select.corpus_rows=10",
         "--set", "generate.top_logprobs=4"]  # fmt: skip


def stages(store: Store) -> set[str]:
    return {folder.name for folder in store.root.iterdir() if not folder.name.startswith(".")}


def test_a_corpus_is_made_and_shown_and_then_used_without_sampling_again(
    run: Run, home: Path, recipe_file: Path
) -> None:
    planned = run("mitigate", recipe_file, "--until", "filter", "--plan", *EXTRA)
    assert "train" not in planned.stdout
    made = run("mitigate", recipe_file, "--until", "filter", *EXTRA)
    assert made.returncode == 0, made.stderr
    page = Path(made.stdout.splitlines()[-1])
    assert page.name == "corpus.html"
    text = page.read_text()
    assert "temperature=0.8" in text
    assert not re.search(r"""(src|href)=["']https?:""", text)
    assert stages(Store(home)) == {"model", "target", "corpus", "embedding"}
    whole: Any = run("mitigate", recipe_file, *EXTRA)
    assert whole.returncode == 0, whole.stderr
    for stage in ("generate", "filter", "embed", "select"):
        assert re.search(rf"^{stage} \w{{16}} cached", whole.stdout, re.MULTILINE), whole.stdout
    assert "temperature=0.8" in whole.stdout  # the law was biased, and the terminal says so
    report = (Path(whole.stdout.splitlines()[-1]).parent / "report.html").read_text()
    assert "temperature=0.8" in report
