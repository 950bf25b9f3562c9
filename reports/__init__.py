"""Tables and pictures over operating points and run folders."""

from reports.aggregate import Experiment, Measured, PointSummary, experiments_of, pareto_front
from reports.find import find_runs
from reports.history import History
from reports.profile_figure import profile_figure
from reports.report import check_out, run_figures, write_report
from reports.run_record import PointResult, RunRecord, read_run
from reports.state import BROKEN, is_locked
from reports.tables import age, in_units, progress, states

__all__ = [
    "BROKEN",
    "Experiment",
    "History",
    "Measured",
    "PointResult",
    "PointSummary",
    "RunRecord",
    "age",
    "check_out",
    "experiments_of",
    "find_runs",
    "in_units",
    "is_locked",
    "pareto_front",
    "profile_figure",
    "progress",
    "read_run",
    "run_figures",
    "states",
    "write_report",
]
