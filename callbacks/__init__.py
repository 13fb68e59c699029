"""Callbacks: they join data to policy and move in time; the arithmetic is elsewhere."""

if __name__ == "callbacks":
    # Imported as a top-level package, every class would exist twice.
    raise ImportError("import this package as sdsearch_lightning.callbacks")

from sdsearch_lightning.callbacks.credit_diagnostics import CreditDiagnostics
from sdsearch_lightning.callbacks.credit_weight_scheduler import CreditWeightScheduler
from sdsearch_lightning.callbacks.graceful_stop import GracefulStop
from sdsearch_lightning.callbacks.hindsight_construction import HindsightConstruction
from sdsearch_lightning.callbacks.jsd_weight_scheduler import JSDWeightScheduler
from sdsearch_lightning.callbacks.rollout_grouping import RolloutGrouping
from sdsearch_lightning.callbacks.run_progress import RunProgress
from sdsearch_lightning.callbacks.teacher_diagnostics import TeacherDiagnostics
from sdsearch_lightning.callbacks.training_health import TrainingHealth
from sdsearch_lightning.callbacks.trajectory_log import TrajectoryLog

__all__ = [
    "CreditDiagnostics",
    "CreditWeightScheduler",
    "GracefulStop",
    "HindsightConstruction",
    "JSDWeightScheduler",
    "RolloutGrouping",
    "RunProgress",
    "TeacherDiagnostics",
    "TrainingHealth",
    "TrajectoryLog",
]
