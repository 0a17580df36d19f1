"""lm-eval's YAML files and task dicts, read without importing lm-eval, whose import takes seconds.

They say what defines the name of a benchmark, and which files its scores depend on.
"""

import copy
import glob
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark_code import Code

BUNDLED = Path(__file__).with_name("benchmarks")
INLINE = Path("<recipe>")  # in place of a YAML file
IGNORED_FOLDERS = {"__pycache__", ".ipynb_checkpoints"}


class Definition(NamedTuple):
    """One benchmark: its YAML file or `INLINE`, settings (`include` merged, data paths absolute) and files."""

    path: Path
    config: dict[str, Any]
    sources: list[Path]  # the YAML, what it includes, its `!function` modules
    data: list[Path]  # local data files, whether they exist or not
    code: tuple[Code, ...] = ()  # where its Python is: no `!function` tag, no Python

    def is_inline(self) -> bool:
        """Return whether it is in the recipe itself."""
        return self.path == INLINE

    def place(self, *, full: bool = False) -> str:
        """Return where the user finds it: the name of the file, or its `full` path."""
        return "its `task` in the recipe" if self.is_inline() else str(self.path if full else self.path.name)


class Function(str):
    """A `!function module.name` tag, left unresolved."""

    def module(self) -> str:
        """Return the dotted name of the module."""
        return self.rpartition(".")[0]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # 10 times as fast
    """Plain YAML and the one tag that lm-eval adds."""


_Loader.add_constructor("!function", lambda loader, node: Function(loader.construct_scalar(node)))


def hub_folder() -> Path:
    """Return the folder of lm-eval's own YAML files."""
    package = find_spec("lm_eval")
    assert package and package.origin, "cfsd is installed with lm-eval"
    return Path(package.origin).with_name("tasks")


@cache
def find_hub(name: str) -> Definition | None:
    """Return lm-eval's own definition of `name`; about a second the first time."""
    return find(name, hub_folder())


def is_hub(definition: Definition) -> bool:
    """Return whether the benchmark comes with lm-eval, so that its data is on the hub."""
    return definition.path.is_relative_to(hub_folder())


def inline(settings: dict[str, Any]) -> Definition:
    """Return what a task dict defines; relative paths of data start from the working directory."""
    config = copy.deepcopy(settings)
    return Definition(INLINE, config, [], _localise(config, Path.cwd()))


def placeless(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a task dict without the paths of its local data, which count by content."""
    config = copy.deepcopy(settings)
    _change_paths(config, Path.cwd(), lambda name: "")
    return config


def files_in(folder: Path) -> list[Path]:
    """Return the YAML files below `folder` in lm-eval's order: of two with one name the first counts."""
    paths = (path for path in folder.rglob("*.yaml") if not IGNORED_FOLDERS.intersection(path.parts))
    return sorted(paths, key=Path.as_posix)


def names_in(folder: Path) -> list[str]:
    """Return the benchmarks that the readable YAML files below `folder` define."""
    names = set()
    for path in files_in(folder):
        with suppress(BadInput):
            names.add(str(name) if isinstance(name := read(path).config.get("task"), str) else "")
    return sorted(names - {""})


def find(name: str, folder: Path) -> Definition | None:
    """Return what the first file below `folder` that defines `name` says, as lm-eval would find it.

    Only files that contain the name are parsed: of lm-eval's 14,000 files this takes 1 s instead of 6-23 s.

    Raises: BadInput if `name` is a group or a tag, or if no file defines it and one that contains it is broken.
    """
    broken: list[BadInput] = []
    tagged: list[str] = []
    mentioned = re.compile(rb"(?<![\w./-])" + re.escape(name.encode()) + rb"(?![\w./-])")
    for path in files_in(folder):
        if not mentioned.search(path.read_bytes()):
            continue
        try:
            definition = read(path)
        except BadInput as error:
            broken.append(error)
            continue
        config = definition.config
        if config.get("group") == name:
            raise _several(name, "group", list(_members(config.get("task"))))
        if config.get("task") == name:
            return definition
        if name in _as_list(config.get("tag")) and isinstance(config.get("task"), str):
            tagged.append(config["task"])
    if tagged or broken:
        raise _several(name, "tag", tagged) if tagged else broken[0]
    return None


def read(path: Path, _above: tuple[Path, ...] = ()) -> Definition:
    """Return what `path` defines.

    Relative paths of data start from the folder of the YAML file that names them.
    Differs: lm-eval starts from the working directory.

    Raises: BadInput naming file and line if it is not readable YAML.
    """
    config = _parse(path)
    functions = list(_functions(config))
    sources = [path, *_modules(functions, path.parent)]
    code: tuple[Code, ...] = (
        (Code(path.parent, frozenset(function.module() for function in functions)),) if functions else ()
    )
    data = _localise(config, path.parent)
    merged: dict[str, Any] = {}
    above = {part.resolve() for part in (*_above, path)}
    for name in _as_list(config.pop("include", None)):
        included = path.parent / str(name)
        if not included.is_file() or included.resolve() in above:
            reason = "includes itself" if included.is_file() else f"includes {name}, and there is no file {included}"
            raise BadInput(f"{path} {reason}; correct its `include` line")
        part = read(included, (*_above, path))
        merged |= part.config
        sources += part.sources
        code += part.code
        # An included `dataset_kwargs` is replaced, not extended, by one in the including file.
        data += [] if "dataset_kwargs" in config else part.data
    return Definition(path, merged | config, sources, data, code)


def _parse(path: Path) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_bytes(), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise BadInput(f"{path}{line}: not valid YAML ({error.problem}); correct that line") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not valid YAML ({error}); correct it") from error
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise BadInput(f"{path} holds a {kind}, not settings; it needs lines such as `task: my_name`")
    return config


def _functions(value: Any) -> Iterator[Function]:
    if isinstance(value, Function):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _functions(item)


def _modules(functions: list[Function], folder: Path) -> list[Path]:
    """Return the files beside the YAML that its `!function` tags name."""
    paths = [folder / f"{function.module().replace('.', '/')}.py" for function in functions]
    return [path for path in paths if path.is_file()]


def _localise(config: dict[str, Any], folder: Path) -> list[Path]:
    """Make the data paths in `config` absolute, in place, and return the files they name."""
    files: list[Path] = []

    def absolute(name: str) -> str:
        path = str(folder / _local(name))
        for match in sorted(glob.glob(path, recursive=True)) or [path]:  # noqa: PTH207  Path.glob takes no absolute one
            files.extend(_files_of(Path(match)))
        return path

    _change_paths(config, folder, absolute)
    return files


def _local(name: str) -> Path:
    return Path(name.removeprefix("file://")).expanduser()


def _is_remote(name: str) -> bool:
    return "://" in name.removeprefix("file://")


def _files_of(path: Path) -> list[Path]:
    return sorted(below for below in path.rglob("*") if below.is_file()) if path.is_dir() else [path]


def _change_paths(config: dict[str, Any], folder: Path, change: Callable[[str], str]) -> None:
    """Apply `change` to every path of local data in `config`, in place; paths start from `folder`."""
    if isinstance(settings := config.get("dataset_kwargs"), dict):
        settings |= {key: _mapped(settings[key], change) for key in ("data_files", "data_dir") if key in settings}
    path = config.get("dataset_path")
    if isinstance(path, str) and (path.startswith((".", "/", "~", "file://")) or (folder / path).is_dir()):
        config["dataset_path"] = change(path)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) and not _is_remote(value) else value


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _members(listed: Any) -> Iterator[str]:
    for item in _as_list(listed):
        if isinstance(item, dict):
            yield from _members(item.get("task", item.get("group")))
        else:
            yield str(item)


def _several(name: str, kind: str, members: list[str]) -> BadInput:
    shown = ", ".join(members[:12]) + (f" and {len(members) - 12} more" if len(members) > 12 else "")
    return BadInput(f"benchmark {name} is a {kind} of several: name those you want one by one, among {shown}")
