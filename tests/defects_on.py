"""A pytest plugin: each test that is named by a defect runs with that defect switched on."""

import pytest

from mclip.study.defects import PATCHES, switched_on
from mclip.study.table import BY_NAME

DEFECTS = {row.defect: row for row in BY_NAME.values() if row.defect}
"""The rows of the table that switch a defect on, by its number."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    defect = next(each for each in DEFECTS.values() if item.originalname in each.checks)
    with switched_on(*PATCHES[defect.defect]):
        return (yield)
