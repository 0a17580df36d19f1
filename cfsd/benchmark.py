"""Benchmark: one lm-eval task to score, checked and digested without importing lm-eval."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from cfsd import benchmark_files
from cfsd.benchmark_files import BUNDLED, Definition, is_hub
from cfsd.errors import BadInput
from cfsd.spec import Spec, digest_of


class Benchmark(Spec):
    """What to score. In YAML a plain string is the name."""

    name: str = Field(description="an lm-eval task: a bundled one, one of lm-eval's own, or one of `folder`")
    folder: str | None = Field(None, description="with lm-eval YAML files; empty: bundled, then lm-eval's own")
    limit: PositiveInt | None = Field(None, description="score the first N documents only")
    num_fewshot: NonNegativeInt | None = Field(None, description="examples in the prompt; empty: as in its YAML")
    metric: str | None = Field(None, description="empty: acc, else exact_match, else the first listed")
    chance: float | None = Field(None, ge=0, lt=1, description="score of guessing; empty: from the choices")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def digest(self) -> str:
        """Return 16 hex digits over settings and content (YAML, includes, modules, local data), never paths.

        lm-eval's own benchmarks count by name and installed version; their data is on the hub.

        Raises: BadInput as `check` does.
        """
        settings = self.model_dump(exclude={"folder"})
        definition = self.find()
        if is_hub(definition):
            content: Any = version("lm_eval")
        else:
            _check_data(self.name, definition)
            content = [_sha256(path) for path in (*definition.sources, *definition.data)]
        return digest_of([type(self).__name__, self.version, settings, content])

    def check(self) -> None:
        """Return quietly if the benchmark can be loaded, as far as can be told in a second.

        Raises: BadInput for an unknown name, a missing folder, broken YAML, missing or empty data, a group,
            or a benchmark that runs code written by the model.
        """
        definition = self.find()
        if definition.config.get("unsafe_code"):
            raise BadInput(f"benchmark {self.name} runs code that the model writes; cfsd never does: leave it out")
        _check_data(self.name, definition)

    def find(self) -> Definition:
        """Return the definition of this benchmark.

        Raises: BadInput if there is none.
        """
        if self.folder is not None:
            return self._find_in(Path(self.folder).expanduser())
        if found := benchmark_files.find(self.name, BUNDLED) or benchmark_files.find_hub(self.name):
            return found
        bundled = ", ".join(benchmark_files.names_in(BUNDLED)) or "none"
        raise BadInput(
            f"no benchmark {self.name!r}: bundled are {bundled}; `lm-eval ls tasks` lists lm-eval's own; "
            "for one of yours set `folder` to the folder of its YAML file"
        )

    def _find_in(self, folder: Path) -> Definition:
        if not folder.is_dir():
            raise BadInput(f"benchmark {self.name}: no folder {folder}; correct `folder` or leave it out")
        found = benchmark_files.find(self.name, folder)
        if found is None:
            names = ", ".join(benchmark_files.names_in(folder)) or "none"
            raise BadInput(f"no benchmark {self.name!r} in {folder}, only {names}; correct `name` or `folder`")
        return found


def _check_data(name: str, definition: Definition) -> None:
    for path in definition.data:
        if not path.is_file():
            yaml = definition.path.name
            raise BadInput(f"benchmark {name}: no data file {path}; paths in {yaml} start from the folder it is in")
        with path.open("rb") as file:
            if not file.read(4096).strip():
                raise BadInput(f"benchmark {name}: data file {path} is empty; it needs one document per line")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
