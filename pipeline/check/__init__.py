"""`longtail check`: refuse what cannot work before anything is spent, and say what will be done."""

from pipeline.check.needs import needs_teacher, sources_of
from pipeline.check.prepared import check_prepared, detector_vocabulary
from pipeline.check.stages import check_stages, check_validation

__all__ = [
    "check_prepared",
    "check_stages",
    "check_validation",
    "detector_vocabulary",
    "needs_teacher",
    "sources_of",
]
