"""What all tests share."""

import os
from pathlib import Path

import matplotlib
import pytest
import torch

# Not the variable MPLBACKEND: the kernels that nbval starts from here would inherit it and show no figure.
matplotlib.use("Agg")
# Tiny tensors gain nothing from threads, and on a busy machine two threads that wait for each other cost minutes.
torch.set_num_threads(1)

SLOW = ("test_browser.py", "test_course.py", "test_kills.py", "test_packaging.py", "test_site.py", "test_workers.py")
"""Files whose tests take ten seconds and more; ``-m "not slow"`` leaves them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow."""
    for item in items:
        if item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photographs that MCLIP_REAL_DATA names; without it the test is skipped."""
    if "MCLIP_REAL_DATA" not in os.environ:
        pytest.skip("MCLIP_REAL_DATA is not set")
    return Path(os.environ["MCLIP_REAL_DATA"])
