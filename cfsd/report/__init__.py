"""Run records in; summary, verdict, figures and pages out."""

from cfsd.report.run_record import RunRecord, Scores, Step
from cfsd.report.summary import Summary

__all__ = ["RunRecord", "Scores", "Step", "Summary"]
