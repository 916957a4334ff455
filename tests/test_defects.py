"""The defects: each can be switched on and off again, and the tests that it names fail while it is on."""

import ast
import contextlib
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from defects_on import DEFECTS

from mclip import balancing, losses, text_encoder, train
from mclip.study.defects import NO_REFUSAL, PATCHES, left_and_right_swapped, switched_on

TESTS = Path(__file__).parent
each_defect = pytest.mark.parametrize("defect", DEFECTS.values(), ids=lambda row: f"{row.defect:02}")


def files_of_tests() -> dict[str, Path]:
    return {
        node.name: path
        for path in TESTS.glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_there_are_fourteen():
    assert list(DEFECTS) == list(PATCHES) == list(range(1, 15))


@each_defect
def test_the_checks_exist(defect):
    assert defect.checks
    assert set(defect.checks) <= set(files_of_tests())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, list[str]]:
    """Of each check: what every case of it says with the defect on; an empty text where it passes."""
    where, report = files_of_tests(), tmp_path_factory.mktemp("defects") / "report.xml"
    nodes = [f"{where[check]}::{check}" for defect in DEFECTS.values() for check in defect.checks]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "defects_on",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        f"--junitxml={report}",
        *nodes,
    ]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    subprocess.run(command, cwd=TESTS.parent, env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=False)
    found: dict[str, list[str]] = {}
    for case in ET.parse(report).iter("testcase"):
        assert case.find("error") is None, case.get("name")  # an error before or after the test is no answer
        failure = case.find("failure")
        found.setdefault(case.get("name").split("[")[0], []).append("" if failure is None else failure.get("message"))
    return found


@each_defect
def test_the_checks_fail_with_the_defect_on(defect, outcomes):
    for check in defect.checks:
        assert outcomes[check], f"{check} did not run"
        for said in outcomes[check]:
            assert said, f"{check} passes although the defect is on"
            assert said.split(":")[0] not in ("TypeError", "NameError", "KeyError", "RecursionError"), said


@each_defect
def test_a_defect_is_gone_when_it_is_switched_off(defect):
    patched = (*PATCHES[defect.defect], NO_REFUSAL)
    before = [getattr(owner, name) for owner, name, _ in patched]
    with contextlib.suppress(KeyboardInterrupt), switched_on(*patched):
        assert all(getattr(owner, name) is defective for owner, name, defective in patched)
        raise KeyboardInterrupt
    assert [getattr(owner, name) for owner, name, _ in patched] == before


def test_a_function_is_replaced_wherever_it_was_imported():

    globals()["learning_rate"] = train.learning_rate
    with switched_on(*PATCHES[8]):
        assert globals()["learning_rate"] is train.learning_rate
    del globals()["learning_rate"]


def test_letters_are_swapped_inside_words():
    assert left_and_right_swapped("bright, left or right") == "bleft, right or left"


def test_the_dead_balancer_looks_like_success():
    """Its loss falls to 0, because its weight does."""
    weigher, terms = balancing.Balancer(balancing.DistillConfig()), {"original": torch.tensor(4.0)}
    with switched_on(*PATCHES[6]):
        printed = [weigher.combine(terms, {"original": 1.0}, step, [])[0].item() for step in range(100)]
    assert printed[-1] < 1e-3 * printed[0]


def test_defective_forms_keep_their_shapes():
    x, padding = torch.randn(2, 6, 64), torch.zeros(2, 6, dtype=torch.bool)
    block = text_encoder.LSRABlock(128, 4, 3, 128, 0.0)
    with switched_on(*PATCHES[3], *PATCHES[4]):
        assert block(torch.cat([x, x], 2), padding).shape == (2, 6, 128)
    u, U = torch.randn(4, 8), torch.randn(4, 8)
    with switched_on(*PATCHES[7]):
        assert losses.feature(u, U).ndim == 0
