"""What MLflow's pages show above all else of a run: Markdown, of at most so many characters."""

NOTE = "mlflow.note.content"  # the tag that holds it
TEXT_LENGTH = 8000  # MLflow cuts longer values of tags


def described(*parts: str) -> str:
    """Return Markdown that MLflow takes whole: too long, it goes without tables, which the report has as well."""
    text = "\n\n".join(part for part in parts if part)
    if len(text) <= TEXT_LENGTH:
        return text
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    return "\n".join(["The table is in the report.", "", *lines]) if len(lines) < len(text.splitlines()) else text
