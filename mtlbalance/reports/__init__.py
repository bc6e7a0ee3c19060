"""Reports: what finished runs come to, with the statistics that the number of runs can bear."""

from mtlbalance.reports.comparison import Report, make_report
from mtlbalance.reports.runs import FinishedRun, find_runs, read_run
from mtlbalance.reports.study import ReportError, Study, study_of_runs, study_of_sweep

__all__ = [
    "FinishedRun",
    "Report",
    "ReportError",
    "Study",
    "find_runs",
    "make_report",
    "read_run",
    "study_of_runs",
    "study_of_sweep",
]
