"""Checks in the manner of IFEval: a list of truth values per document, and whether all of them hold."""


def process_results(doc, results):
    """Return both metrics of one answer."""
    parts = [len(results[0]) > 3, doc["answer"] in results[0]]
    return {"parts": parts, "all_parts": all(parts)}


def share(items):
    """Return the share of parts that hold."""
    flat = [part for parts in items for part in parts]
    return sum(flat) / len(flat)
