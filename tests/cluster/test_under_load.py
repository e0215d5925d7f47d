"""A service that is scaled, robbed of pods and upgraded while clients ask: each gets its whole and right answer.

One release for all; the loops of its workers change on the way, and the answers must not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.conftest import ASKS
from tests.cluster.load import Ask, Load, answers_of
from tests.cluster.pods import Pods
from tests.cluster.release import Release, merge
from tests.cluster.scorecard import Line, Scorecard, fill

NUM_CLIENTS = 6
ROLES = ("gateway", "prefill", "decode")
VALUES: dict[str, Any] = {"gateway": {"service": {"type": "NodePort"}}}
HASTY = {"decode": {"drain": {"seconds": 0.2}}}  # streams are longer than that: they go on elsewhere
LOOPS = (("normal", "overlap"), ("overlap", "normal"))


@pytest.fixture(scope="module")
def expected(release: Release, pods: Pods) -> dict[Ask, str]:
    """Install, and return the answers of a service that nothing happens to."""
    release.install(merge(VALUES, HASTY))
    answers = answers_of(pods.node_address(), ASKS)
    assert len(set(answers.values())) == len(ASKS)
    return answers


@pytest.fixture
def load(pods: Pods, expected: dict[Ask, str]) -> Iterator[Load]:
    with Load(pods.node_address(), ASKS, num_clients=NUM_CLIENTS).expect(expected) as load:
        yield load


def resumptions(pods: Pods) -> float:
    return pods.metric("gateway", "tandem_gateway_resumptions_total")


def ended(line: Line, load: Load) -> None:
    """End the load and judge it."""
    load.__exit__(None, None, None)
    fill(line, load.report)


def test_scaling_decode(load: Load, pods: Pods, scorecard: Scorecard) -> None:
    with scorecard.line("scale decode 1 -> 3 -> 1") as line:
        before = resumptions(pods)
        pods.scale("decode", 3)
        pods.wait_ready("decode", 3)
        load.wait_more(NUM_CLIENTS * 3)
        shares = pods.metric_of_each("decode", "tandem_worker_generated_tokens_total")
        assert all(share > 0 for share in shares), "one has no work"
        pods.scale("decode", 1)
        pods.wait_ready("decode", 1)
        load.wait_more(NUM_CLIENTS)
        line.resumed = int(resumptions(pods) - before)
        ended(line, load)


def test_scaling_prefill(load: Load, pods: Pods, scorecard: Scorecard) -> None:
    with scorecard.line("scale prefill 1 -> 2 -> 1") as line:
        pods.scale("prefill", 2)
        pods.wait_ready("prefill", 2)
        load.wait_more(NUM_CLIENTS * 3)
        computed = pods.metric_of_each("prefill", "tandem_worker_computed_tokens_total")
        assert all(share > 0 for share in computed), "one has no work"
        pods.scale("prefill", 1)
        pods.wait_ready("prefill", 1)
        load.wait_more(NUM_CLIENTS)
        ended(line, load)


@pytest.mark.parametrize("role", ROLES)
def test_deleting_a_pod(role: str, load: Load, pods: Pods, scorecard: Scorecard) -> None:
    """Deleted with its grace period: a drain. What it had begun is ended by itself or by another."""
    with scorecard.line(f"delete a {role} pod") as line:
        count = len(pods.ready(role))
        gone = pods.ready(role)[0]
        pods.delete(gone)
        load.wait_more(NUM_CLIENTS)
        pods.wait_gone(gone)
        pods.wait_ready(role, count)
        load.wait_more(NUM_CLIENTS)
        ended(line, load)


def test_killing_a_decode_pod(load: Load, pods: Pods, scorecard: Scorecard) -> None:
    """Killed, not drained: its streams go on at the other one, each token once."""
    with scorecard.line("kill one of two decode pods") as line:
        pods.scale("decode", 2)
        pods.wait_ready("decode", 2)
        load.wait_more(NUM_CLIENTS * 2)
        before = resumptions(pods)
        gone = pods.ready("decode")[0]
        pods.delete(gone, kill=True)
        load.wait_more(NUM_CLIENTS * 2)
        pods.wait_ready("decode", 2)
        line.resumed = int(resumptions(pods) - before)
        ended(line, load)
        assert line.resumed > 0, "no stream ran on the pod that was killed"
    pods.scale("decode", 1)
    pods.wait_ready("decode", 1)


@pytest.mark.parametrize(("prefill", "decode"), LOOPS)
def test_a_rolling_upgrade_of_everything(
    prefill: str, decode: str, load: Load, release: Release, pods: Pods, scorecard: Scorecard
) -> None:
    """The loops change on the way: the same answers before, meanwhile and afterwards."""
    with scorecard.line(f"upgrade all to {prefill} prefill, {decode} decode") as line:
        before = {pod.metadata.uid for role in ROLES for pod in pods.of(role)}
        changed = {role: {"podAnnotations": {"loops": f"{prefill}-{decode}"}} for role in ROLES}
        loops = {"prefill": {"loop": prefill}, "decode": {"loop": decode}}
        release.upgrade(merge(merge(merge(VALUES, HASTY), changed), loops))
        for role in ROLES:
            pods.wait_ready(role, 2 if role == "gateway" else 1)
        assert before.isdisjoint(pod.metadata.uid for role in ROLES for pod in pods.of(role))
        for role, loop in (("prefill", prefill), ("decode", decode)):
            assert f'loop="{loop}_{role}"' in pods.metrics(pods.ready(role)[0])
        load.wait_more(NUM_CLIENTS * 2)
        ended(line, load)


def test_nothing_crashed(pods: Pods) -> None:
    assert pods.restarts() == {}
