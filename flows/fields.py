"""Every field of a recipe and of the machine, with its default, unit and effect.

python -m flows.fields
"""

from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.table import Table

from cfsd.evaluate.benchmark import Benchmark
from cfsd.machine import Machine
from cfsd.recipe import Recipe


def rows(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """Return (dotted name, default, description) of every field, nested ones in place of their parent."""
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += rows(inner, f"{prefix}{name}.")
        else:
            found.append((prefix + name, _default(field), field.description or ""))
            if Benchmark in get_args(inner):
                found += rows(Benchmark, f"{prefix}{name}[].")
    return found


def _default(field: FieldInfo) -> str:
    default: Any = field.default
    return "" if default is PydanticUndefined else "empty" if default in (None, (), {}) else str(default)


def main() -> None:
    """Print both tables."""
    console = Console()
    for title, model in (("recipe: YAML, or --set FIELD=VALUE", Recipe), ("--machine FIELD=VALUE", Machine)):
        table = Table("field", "default", "what it does", title=title, show_lines=False)
        for row in rows(model):
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
