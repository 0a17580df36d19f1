"""What mkdocs calls while it builds the site: pages made from the code, and checks of the result."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import architecture
import reference_fields
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

CFSD = Path(__file__).parents[1] / "cfsd"
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b[^>]*\brel=["']?(?:stylesheet|preconnect)["']?[^>]*//"""
)


def on_config(config: MkDocsConfig) -> None:
    """Put all pages of a folder in the place of a navigation entry that names a folder."""
    assert config.nav is not None
    folders = {"reference/api/": [name for name, _ in api_pages()]}
    folders |= {"decisions/": [file.stem for file in sorted((CFSD.parent / "docs" / "decisions").glob("*.md"))]}
    for item in config.nav:
        for title, entry in item.items():
            if isinstance(entry, str) and entry in folders:
                item[title] = [f"{entry}{name}.md" for name in folders[entry]]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference of fields and one page of the API for each public package and module."""
    files.append(File.generated(config, "reference/fields.md", content=reference_fields.page()))
    for name, content in api_pages():
        files.append(File.generated(config, f"reference/api/{name}.md", content=content))
    return files


def api_pages() -> Iterator[tuple[str, str]]:
    """Yield (name, page): a page for each package, `spec` and `stage` first, and one for the modules beside them."""
    for package in sorted(CFSD.iterdir()):
        if (face := package / "__init__.py").exists():
            # benchmarks' own code stands in folders that are no packages
            own = (file for file in package.rglob("*.py") if (file.parent / "__init__.py").exists())
            modules = sorted(own, key=lambda file: (file.stem not in ("spec", "stage"), str(file)))
            yield package.name, _page(f"cfsd.{package.name}", _docstring(face), modules)
    yield "modules", _page("Modules of cfsd", _docstring(CFSD / "__init__.py"), sorted(CFSD.glob("*.py")))


def _docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def _page(title: str, introduction: str, modules: list[Path]) -> str:
    paths = [file.relative_to(CFSD.parent).with_suffix("") for file in modules if file.stem != "__init__"]
    return "\n\n".join([f"# {title}", introduction, *(f"::: {'.'.join(path.parts)}" for path in paths)]) + "\n"


def on_pre_build(config: MkDocsConfig) -> None:
    """Stop where the picture of the architecture is older than the code."""
    if not architecture.is_current():
        raise PluginError("docs/explanation/architecture.svg is older than the imports of the code: make docs-picture")


def on_post_build(config: MkDocsConfig) -> None:
    """Stop where a page would load anything from another host when it is read."""
    for page in Path(config.site_dir).rglob("*.html"):
        if outside := LOADED.search(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page} loads from another host: {outside.group()}")
