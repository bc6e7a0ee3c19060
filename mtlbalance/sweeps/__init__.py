"""Sweeps: many runs from one file, carried out anywhere; the runs' folders are all the state there is."""

from mtlbalance.sweeps.engines import Engine
from mtlbalance.sweeps.folder_state import FolderState, folder_state, folder_states
from mtlbalance.sweeps.jobs import Attempt, Job, JobEnd, run_job
from mtlbalance.sweeps.plan import Plan, PlannedAxis, PlannedRun, make_plan, read_plan

__all__ = [
    "Attempt",
    "Engine",
    "FolderState",
    "Job",
    "JobEnd",
    "Plan",
    "PlannedAxis",
    "PlannedRun",
    "folder_state",
    "folder_states",
    "make_plan",
    "read_plan",
    "run_job",
]
