"""Imports go one way, settings stand apart from work, and heavy libraries have one door each."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("cfsd", "tasks", "flows", "benchmarks")
FILES = {str(path.relative_to(ROOT)): path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "lm_eval",
    "mlflow",
    "prefect",
    "pandas",
    "pyarrow",
    "matplotlib",
    "scipy.stats",
)

# Each line may import what stands above it, and nothing below or beside it.
ORDER = (
    {"errors", "spec", "budget", "stages", "statistics"},
    {"machine"},
    {"store"},
    {"process"},
    {"model"},
    {"data"},
    {"generate", "filter", "select", "mix"},
    {"evaluate"},
    {"train"},
    {"integrations", "merge"},
    {"overrides"},
    {"recipe"},
    {"comparison", "estimate", "target_sequence"},
    {"report"},
    {"baseline"},
    {"__main__"},
)
RANK = {package: rank for rank, packages in enumerate(ORDER) for package in packages}
FOUNDATION = {("statistics", "errors"), ("spec", "errors")}  # the first line's own
OPTIONAL = {  # imported where they are needed: not installed everywhere, or slow and rarely needed
    "ray", "prefect_ray", "torch", "reasoning_gym", "pyarrow", "datasets", "mlflow", "prefect", "peft",
    "huggingface_hub", "lm_eval", "sqlalchemy",
}  # fmt: skip


class Import(NamedTuple):
    """One import statement: what it names, and whether it stands inside something."""

    name: str
    late: bool


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Return every dotted name that `path` imports anywhere, `from a import b` as a.b."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        late = not any(node is statement for statement in tree.body)
        if isinstance(node, ast.Import):
            found += [Import(alias.name, late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            found += [Import(f"{node.module}.{alias.name}", late) for alias in node.names]
    return tuple(found)


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(file): path for file, path in FILES.items()}


def owner(name: str, modules: dict[str, Path] = MODULES) -> str | None:
    """Return the module that holds the dotted `name`: itself, or what it is taken from."""
    return next((m for m in (name, name.rpartition(".")[0]) if m in modules), None)


def graph(modules: dict[str, Path] = MODULES) -> dict[str, set[str]]:
    """Return the modules that each module imports, late and TYPE_CHECKING imports included."""
    return {
        module: {target for found in imports(path) if (target := owner(found.name, modules)) and target != module}
        for module, path in modules.items()
    }


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Return the names on one circle, none if there is no circle."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def importers(package: str, files: dict[str, Path] | None = None) -> set[str]:
    """Return the files that import `package` or something in it."""
    names = (FILES if files is None else files).items()
    return {f for f, path in names if any(f"{found.name}.".startswith(f"{package}.") for found in imports(path))}


def under(folder: str) -> set[str]:
    return {file for file in FILES if file.startswith(f"{folder}/")}


def package_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else module


def test_the_scan_sees_imports_of_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    from x.y import z\n\nif 1:\n    import p.q as r\n")
    files = {"a.py": tmp_path / "a.py"}
    assert importers("x.y", files) == importers("p", files) == {"a.py"}
    assert importers("x.yy", files) == set()
    assert importers("cfsd.store.artifact") > {"tasks/train.py", "cfsd/train/trainer.py"}


def test_a_circle_through_a_late_or_a_typing_import_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    import b\n")
    (tmp_path / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from c import C\n")
    (tmp_path / "c.py").write_text("import a\nclass C: ...\n")
    modules = {name: tmp_path / f"{name}.py" for name in "abc"}
    assert set(circle(graph(modules))) == {"a", "b", "c"}


def test_no_circle_between_modules() -> None:
    assert circle(graph()) == []


def test_no_circle_between_packages() -> None:
    edges: dict[str, set[str]] = {}
    for module, targets in graph().items():
        parts = [".".join(name.split(".")[:2]) for name in (module, *targets)]
        edges.setdefault(parts[0], set()).update(set(parts[1:]) - {parts[0]})
    assert circle(edges) == []


def test_packages_of_the_library_import_only_what_stands_above_them() -> None:
    assert {package_of(module) for module in MODULES if module.startswith("cfsd.")} == set(RANK)
    wrong = []
    for module, targets in graph().items():
        for target in targets:
            if not (module.startswith("cfsd.") and target.startswith("cfsd.")):
                continue
            here, there = package_of(module), package_of(target)
            if here != there and RANK[there] >= RANK[here] and (here, there) not in FOUNDATION:
                wrong.append(f"{module} -> {target}")
    assert wrong == []


def test_cfsd_imports_neither_tasks_nor_flows_and_tasks_no_flows() -> None:
    assert not (importers("tasks") | importers("flows") | importers("benchmarks")) & under("cfsd")
    assert not (importers("flows") | importers("benchmarks")) & under("tasks")
    assert not importers("benchmarks") & under("flows")


def test_heavy_libraries_have_one_door_each() -> None:
    assert {str(Path(file).parent) for file in importers("mlflow")} == {"tasks/record"}
    assert not importers("prefect") & under("cfsd")
    assert importers("lm_eval")
    by_hand = {"benchmarks/_evaluate_run.py"}  # what people do without us, to be compared with
    assert importers("lm_eval") - by_hand <= under("cfsd/evaluate")


def test_late_imports_are_for_task_bodies_and_optional_libraries() -> None:
    """A late import of ours hides a circle or a slow module; in a task's body it keeps commands quick."""
    wrong = [
        f"{file}: {found.name}"
        for file, path in FILES.items()
        for found in imports(path)
        if found.late and not file.startswith(("tasks/", "benchmarks/")) and found.name.split(".")[0] not in OPTIONAL
    ]
    assert wrong == []


@pytest.mark.parametrize("face", sorted(file for file in FILES if file.startswith("cfsd/") and "__init__" in file))
def test_the_face_of_a_package_is_short(face: str) -> None:
    if face != "cfsd/train/methods/__init__.py":  # the list of methods
        assert len(FILES[face].read_text().splitlines()) < 15


def loaded_by(statement: str) -> set[str]:
    """Return which of HEAVY a fresh process has imported after `statement`."""
    code = f"import sys; {statement}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("flow", ["mitigate", "compare", "continual", "regress", "measure", "report"])
def test_a_command_answers_before_it_imports_what_computes(flow: str) -> None:
    """`--help` of a command took 6 s while one import of torch was not put off; 2 s without."""
    assert loaded_by(f"import flows.{flow}") <= {"prefect", "pyarrow"}


def test_settings_load_nothing_that_computes() -> None:
    """Recipes are read, checked and estimated without torch: settings stand apart from work."""
    specs = [module for module in MODULES if module.startswith("cfsd.") and module.endswith(".spec")]
    assert len(specs) >= 7
    assert loaded_by(f"import cfsd.recipe, cfsd.comparison, cfsd.estimate, {', '.join(specs)}") == set()
