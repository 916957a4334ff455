"""A pytest plugin: each test that is named by a defect runs with that defect switched on."""

import pytest

from mclip.study.defects import DEFECTS


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    defect = next(each for each in DEFECTS.values() if item.originalname in each.checks)
    with defect.switched_on():
        return (yield)
