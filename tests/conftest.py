"""Before torch is imported: threads that wait should sleep, for two ranks share two cores here.

A test that needs CUDA is skipped where there is none. A test that takes longer than LIMIT seconds
and is not marked `long` fails, so that the suite stays quick.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

LIMIT = 15.0                # seconds, of one test without its fixtures


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if (report.when == "call" and report.passed and report.duration > LIMIT
            and not {"long", "measured", "cuda"} & set(item.keywords)):
        report.outcome = "failed"
        report.longrepr = (f"{report.duration:.1f} s: a test that takes more than {LIMIT:g} s is "
                           "marked long, and a quick case of it is not")
