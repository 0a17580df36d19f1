"""Child processes: a stage in a process of its own, or in several that work together."""

from cfsd.process.child import run_in_process, serve_request

__all__ = ["run_in_process", "serve_request"]
