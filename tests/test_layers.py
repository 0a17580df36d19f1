"""Imports go flows -> tasks -> cfsd, stages stay apart, and heavy libraries have one door each."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = {"generate", "filter", "selection", "embed", "mix", "train", "evaluate", "merge", "weigh", "fisher"}
SCORE = {"cfsd/score.py", "cfsd/score_rows.py"}
HEAVY = ("torch", "transformers", "datasets", "lm_eval", "mlflow", "prefect", "pandas", "pyarrow")
LAYERS = ("cfsd", "tasks", "flows")
FILES = {str(path.relative_to(ROOT)): path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}


@cache
def imports(path: Path) -> set[str]:
    """Return every dotted name that `path` imports anywhere, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers(package: str, files: dict[str, Path] | None = None) -> set[str]:
    """Return the files that import `package` or something in it."""
    names = (FILES if files is None else files).items()
    return {file for file, path in names if any(f"{name}.".startswith(f"{package}.") for name in imports(path))}


def under(folder: str) -> set[str]:
    return {file for file in FILES if file.startswith(f"{folder}/")}


def test_the_scan_sees_imports_of_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    from x.y import z\n\nif 1:\n    import p.q as r\n")
    files = {"a.py": tmp_path / "a.py"}
    assert importers("x.y", files) == importers("p", files) == {"a.py"}
    assert importers("x.yy", files) == set()
    assert importers("cfsd.store.artifact") > {"tasks/train.py", "cfsd/train.py"}


def test_cfsd_imports_neither_tasks_nor_flows_and_tasks_no_flows() -> None:
    assert not (importers("tasks") | importers("flows")) & under("cfsd")
    assert not importers("flows") & under("tasks")


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_never_import_each_other(stage: str) -> None:
    own = f"cfsd/{stage}.py"
    assert importers(f"cfsd.{stage}") & {f"cfsd/{other}.py" for other in STAGES} <= {own}


def test_mlflow_and_prefect_stay_out_of_the_library() -> None:
    assert importers("mlflow") == {"tasks/record/server.py"}
    assert not importers("prefect") & under("cfsd")


def test_only_score_imports_lm_eval() -> None:
    assert importers("lm_eval") <= SCORE
    assert importers("lm_eval")


@pytest.mark.parametrize("flow", ["mitigate", "compare", "continual", "regress", "report"])
def test_a_command_answers_before_it_imports_what_computes(flow: str) -> None:
    """`--help` of a command took 6 s while one import of torch was not put off; 2 s without."""
    code = f"import sys, flows.{flow}; print({{'torch', 'transformers', 'lm_eval', 'mlflow'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("module", ["cfsd.recipe", "cfsd.estimate"])
def test_reading_a_recipe_is_quick_because_nothing_heavy_is_imported(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
