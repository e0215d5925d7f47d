"""What the cluster tests share: a real cluster, its images, the right answers, and the scorecard.

    TANDEM_TEST_KUBECONFIG        the cluster; without it these tests are skipped
    TANDEM_TEST_IMAGES            registry and tag of both images there, default localhost:dev (never pulled)
    TANDEM_TEST_SCORECARD         where the scorecard goes as JSON; empty: only to the terminal

Nodes have to be reachable from here (NodePort); everything else goes through the API server.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.load import Ask
from tests.cluster.pods import Pods
from tests.cluster.release import Release
from tests.cluster.scorecard import Scorecard

KUBECONFIG = os.environ.get("TANDEM_TEST_KUBECONFIG", "")
SCORECARD_PATH = os.environ.get("TANDEM_TEST_SCORECARD", "")
REGISTRY, _, TAG = os.environ.get("TANDEM_TEST_IMAGES", "localhost:dev").rpartition(":")
IMAGES: dict[str, Any] = {"image": {"registry": REGISTRY, "tag": TAG, "pullPolicy": "Never"}}
NAME = "tandem"

ASKS = (
    Ask("class Foo(object):\n    def __init__(self", 300),
    Ask("def fibonacci(n):\n", 400),
    Ask("import os\nimport sys\n\n\ndef main(", 200, seed=1),
    Ask("# " + "The quick brown fox jumps over the lazy dog. " * 20, 250),
    Ask("for index in range(10):\n    ", 400, seed=2),
    Ask("def test_" + "a_long_name_" * 40, 150, seed=3),
)

_scorecard = Scorecard()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests where no cluster is named; they run in order, and in one process."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(600))
            if not KUBECONFIG:
                item.add_marker(pytest.mark.skip(reason="no cluster: TANDEM_TEST_KUBECONFIG is not set"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _scorecard.lines:
        terminalreporter.section("scorecard")
        terminalreporter.write_line(str(_scorecard))
        if SCORECARD_PATH:
            _scorecard.write(Path(SCORECARD_PATH))


@pytest.fixture(scope="session")
def scorecard() -> Scorecard:
    return _scorecard


@pytest.fixture(scope="module")
def release() -> Iterator[Release]:
    """A release that is not installed yet, in a namespace of its own that goes with the module."""
    release = Release(KUBECONFIG, f"tandem-test-{uuid.uuid4().hex[:6]}", NAME, IMAGES)
    pods = Pods(KUBECONFIG, release.namespace, NAME)
    try:
        yield release
    finally:
        release.uninstall()
        pods.delete_namespace()


@pytest.fixture(scope="module")
def pods(release: Release) -> Pods:
    return Pods(KUBECONFIG, release.namespace, release.name)
