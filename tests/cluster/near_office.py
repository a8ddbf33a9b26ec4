"""An office in this process, for what only asks it and decides."""

from types import SimpleNamespace
from typing import Any

from pipeline.cluster.group import TrainingOffice


class Near:
    """The office's methods, called as an actor's are; `ray.get` has to give back what it gets."""

    def __init__(self, office: TrainingOffice) -> None:
        self.office = office

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.office, name))
