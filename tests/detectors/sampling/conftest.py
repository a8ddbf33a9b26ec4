"""An environment for processes of their own."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def clean_environment() -> dict[str, str]:
    """This one, with the checkout on the path and nothing that chooses a kernel or a compiler."""
    root = Path(__file__).resolve().parents[3]
    chosen = ("CXX", "LONGTAIL_KERNEL_CACHE", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    return environment | {"PYTHONPATH": str(root)}
