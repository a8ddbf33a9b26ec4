"""Ray: tasks, training workers, and what happens when a process dies or is asked to stop.

Our own checkpoints in the run directory are the only state that outlives a failure. Ray restarts
workers; each time they start from the newest checkpoint that verifies. Nothing here imports torch
at the top: the driver stays small.
"""

# First, whichever module of the package is imported: it sets what Ray reads when it is imported.
from pipeline.cluster.connection import start_ray, stop_ray
from pipeline.cluster.live import LiveEvaluation
from pipeline.cluster.office import OnProgress
from pipeline.cluster.tasks import run_alone, run_on_workers, run_reporting, run_tasks
from pipeline.cluster.training import train_on_cluster

__all__ = [
    "LiveEvaluation",
    "OnProgress",
    "run_alone",
    "run_on_workers",
    "run_reporting",
    "run_tasks",
    "start_ray",
    "stop_ray",
    "train_on_cluster",
]
