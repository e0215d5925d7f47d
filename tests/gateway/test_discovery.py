"""Discovery by pods, with the real client over real HTTP; by DNS; and what a set of pods amounts to."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.config import DiscoveryConfig
from tandem.errors import ConfigError
from tandem.gateway import discovery as discovery_module
from tandem.gateway.discovery import PodDiscovery, choose_discovery
from tandem.gateway.membership import DnsDiscovery, Endpoint, StaticDiscovery
from tandem.gateway.pod_set import PodSet
from tests.fakes.api_server import NAMESPACE, ApiServer, leaving, pod_of
from tests.gateway.harness import until


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    monkeypatch.setattr(discovery_module, "BACKOFF_SECONDS_MIN", 0.05)
    server = ApiServer()
    yield server
    server.close()


class Seen:
    """What was published, last and how often."""

    def __init__(self) -> None:
        self.endpoints: tuple[Endpoint, ...] | None = None
        self.times = 0
        self.restarts: list[str] = []

    def publish(self, endpoints: tuple[Endpoint, ...]) -> None:
        self.endpoints, self.times = endpoints, self.times + 1

    async def wait(self, *addresses: str, draining: str = "") -> None:
        expected = sorted(Endpoint(address, address == draining) for address in addresses)
        await until(lambda: self.endpoints is not None and list(self.endpoints) == expected)


def watch(api: ApiServer, tmp_path: Path, scenario: Callable[[Seen], Awaitable[None]], **settings: Any) -> Seen:
    seen = Seen()

    async def run() -> None:
        config = DiscoveryConfig(
            mode="kubernetes", namespace=NAMESPACE, kubeconfig=api.kubeconfig(tmp_path), **settings
        )
        discovery = choose_discovery(config, (), seen.restarts.append)
        assert isinstance(discovery, PodDiscovery)
        discovery.start(seen.publish)
        await scenario(seen)
        await discovery.close()

    asyncio.run(run())
    return seen


def test_pods_come_change_and_go(api: ApiServer, tmp_path: Path) -> None:
    first, second = pod_of("a", "10.0.0.1"), pod_of("b", "fd00::2", port=7)
    api.put(first)

    async def scenario(seen: Seen) -> None:
        await seen.wait("10.0.0.1:50051")
        api.put(pod_of("b", "fd00::2", ready=False, port=7))
        api.put(second)
        await seen.wait("10.0.0.1:50051", "[fd00::2]:7")
        api.put(leaving(first))
        await seen.wait("10.0.0.1:50051", "[fd00::2]:7", draining="10.0.0.1:50051")
        api.remove("a")
        await seen.wait("[fd00::2]:7")

    assert watch(api, tmp_path, scenario).restarts == []
    assert api.num_lists == 1


def test_history_that_expired_is_listed_anew(api: ApiServer, tmp_path: Path) -> None:
    api.put(pod_of("a", "10.0.0.1"))

    async def scenario(seen: Seen) -> None:
        await seen.wait("10.0.0.1:50051")
        api.pods["b"] = pod_of("b", "10.0.0.2")  # an event that nobody will see
        api.compact()
        await seen.wait("10.0.0.1:50051", "10.0.0.2:50051")
        api.pods["c"] = pod_of("c", "10.0.0.3")
        api.fail_watches(410)
        await seen.wait("10.0.0.1:50051", "10.0.0.2:50051", "10.0.0.3:50051")

    assert "expired" in watch(api, tmp_path, scenario).restarts


def test_an_outage_keeps_the_set(api: ApiServer, tmp_path: Path) -> None:
    api.put(pod_of("a", "10.0.0.1"))

    async def scenario(seen: Seen) -> None:
        await seen.wait("10.0.0.1:50051")
        api.outage = True
        api.cut()
        await until(lambda: seen.restarts.count("error") > 2)
        assert seen.endpoints == (Endpoint("10.0.0.1:50051"),)
        api.put(pod_of("b", "10.0.0.2"))
        api.outage = False
        await seen.wait("10.0.0.1:50051", "10.0.0.2:50051")

    watch(api, tmp_path, scenario)


def test_an_error_event_and_a_bookmark(api: ApiServer, tmp_path: Path) -> None:
    api.put(pod_of("a", "10.0.0.1"))

    async def scenario(seen: Seen) -> None:
        await seen.wait("10.0.0.1:50051")
        api.bookmark()
        api.fail_watches(500)
        await until(lambda: "error" in seen.restarts)
        api.put(pod_of("b", "10.0.0.2"))
        await seen.wait("10.0.0.1:50051", "10.0.0.2:50051")

    watch(api, tmp_path, scenario)


def test_thousands_of_events_become_few_updates(api: ApiServer, tmp_path: Path) -> None:
    async def scenario(seen: Seen) -> None:
        await until(lambda: api.num_watches == 1)
        with api.changed:
            for number in range(1200):
                pod = pod_of(f"p{number}", f"10.1.{number // 250}.{number % 250 + 1}")
                api.put(pod)
                api.put(pod)
        await until(lambda: seen.endpoints is not None and len(seen.endpoints) == 1200)
        before, began = seen.times, time.monotonic()
        with api.changed:
            for number in range(1200):
                api.remove(f"p{number}")
        await seen.wait()
        assert seen.times - before <= (time.monotonic() - began) / discovery_module.PUBLISH_SECONDS + 1

    watch(api, tmp_path, scenario)


def test_a_long_list_comes_in_pages(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery_module, "PAGE_PODS", 10)
    for number in range(35):
        api.put(pod_of(f"p{number}", f"10.1.0.{number + 1}"))

    async def scenario(seen: Seen) -> None:
        await seen.wait(*(f"10.1.0.{number + 1}:50051" for number in range(35)))

    watch(api, tmp_path, scenario)
    assert api.num_lists == 4


def test_the_whole_list_is_read_again_now_and_then(api: ApiServer, tmp_path: Path) -> None:
    async def scenario(seen: Seen) -> None:
        await seen.wait()
        api.pods["a"] = pod_of("a", "10.0.0.1")  # lost by the watch
        async with asyncio.timeout(30):
            while not seen.endpoints:  # an event makes the watch look at its clock
                api.bookmark()
                await asyncio.sleep(0.1)
        await seen.wait("10.0.0.1:50051")

    watch(api, tmp_path, scenario, resync_seconds=1.0)


def test_no_way_to_an_api_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"discovery\.namespace"):
        choose_discovery(DiscoveryConfig(mode="kubernetes"), (), lambda reason: None)
    config = DiscoveryConfig(mode="kubernetes", namespace="n", kubeconfig=str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"discovery\.kubeconfig"):
        choose_discovery(config, (), lambda reason: None)


def test_only_what_serves_or_has_served_is_a_worker() -> None:
    pods = PodSet("grpc")
    starting = pod_of("a", "10.0.0.1", ready=False)
    pods.replace([starting, pod_of("b", ""), leaving(pod_of("c", "10.0.0.3")), {}, {"metadata": 3}])
    assert pods.endpoints() == ()
    pods.changed(pod_of("a", "10.0.0.1"))
    pods.changed(starting)
    assert pods.endpoints() == (Endpoint("10.0.0.1:50051"),), "a probe that fails ends no session"
    pods.replace([starting])
    assert pods.endpoints() == (Endpoint("10.0.0.1:50051"),)
    ended = pod_of("a", "10.0.0.1")
    ended["status"]["phase"] = "Failed"
    pods.changed(ended)
    assert pods.endpoints() == ()


def test_an_address_that_passes_to_a_new_pod() -> None:
    pods = PodSet("grpc")
    old, new = pod_of("a", "10.0.0.1", uid="1"), pod_of("b", "10.0.0.1", uid="2")
    pods.changed(old)
    pods.changed(leaving(old))
    pods.changed(new)
    assert pods.endpoints() == (Endpoint("10.0.0.1:50051"),)
    pods.deleted(old)
    assert pods.endpoints() == (Endpoint("10.0.0.1:50051"),)


def test_names_are_resolved_again_and_a_failure_keeps_the_set() -> None:
    answers: dict[str, list[str] | int] = {"p": ["10.0.0.1"], "d": ["10.0.0.2", "fd00::3"]}
    seen = Seen()

    async def resolve(host: str, port: int, **unused: Any) -> list[Any]:
        answer = answers[host]
        if isinstance(answer, int):
            raise socket.gaierror(answer, "made to fail")
        return [(None, None, None, "", (address, port)) for address in answer]

    async def run() -> None:
        asyncio.get_running_loop().getaddrinfo = resolve  # type: ignore[method-assign,assignment]
        discovery = choose_discovery(
            DiscoveryConfig(mode="dns", dns_names=("p:1", "d:2"), dns_seconds=0.02), (), seen.restarts.append
        )
        assert isinstance(discovery, DnsDiscovery)
        discovery.start(seen.publish)
        await seen.wait("10.0.0.1:1", "10.0.0.2:2", "[fd00::3]:2")
        answers["p"] = socket.EAI_AGAIN
        answers["d"] = ["10.0.0.2"]
        await seen.wait("10.0.0.1:1", "10.0.0.2:2")
        answers["d"] = socket.EAI_NONAME
        await seen.wait("10.0.0.1:1")
        times = seen.times
        await until(lambda: seen.restarts.count("dns") > 5)
        assert seen.times == times, "nothing new is not told"
        await discovery.close()

    asyncio.run(run())


def test_a_static_list_is_published_once_without_doubles() -> None:
    seen = Seen()
    discovery = choose_discovery(DiscoveryConfig(), ("a:1", "b:2", "a:1"), seen.restarts.append)
    assert isinstance(discovery, StaticDiscovery)
    discovery.start(seen.publish)
    assert seen.endpoints == (Endpoint("a:1"), Endpoint("b:2"))
