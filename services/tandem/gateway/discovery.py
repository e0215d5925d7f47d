"""Workers found as pods: list, then watch, through the Kubernetes API. The only place that knows its client.

A thread of its own, so that neither the client's import nor a slow API server is felt by requests. The set that was
last published stays through every failure; a list that succeeds makes it true again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from tandem.config import DiscoveryConfig
from tandem.errors import ConfigError
from tandem.gateway.membership import Discovery as Discovery
from tandem.gateway.membership import DnsDiscovery, Endpoint, Publish, StaticDiscovery
from tandem.gateway.pod_set import PodSet

CONNECT_SECONDS = 5.0
LIST_SECONDS = 30.0
WATCH_SECONDS = 300  # the server ends a watch after this; a new one goes on where it stood
WATCH_MARGIN_SECONDS = 30.0
BACKOFF_SECONDS_MIN = 1.0
BACKOFF_SECONDS_MAX = 30.0
PUBLISH_SECONDS = 0.05  # at most one update in this long: a rollout of a thousand pods is a few dozen updates
PAGE_PODS = 500
MAX_LIST_BYTES = 64 << 20
MAX_EVENT_BYTES = 4 << 20
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
Reason = Literal["expired", "error", "dns"]
_logger = logging.getLogger(__name__)


class _Expired(Exception):
    """The watch's place in history is gone: only a new list helps."""


def choose_discovery(
    config: DiscoveryConfig, addresses: tuple[str, ...], restarted: Callable[[str], None]
) -> Discovery:
    """Return the discovery of the configured mode; `restarted(reason)` counts what broke it, from any thread.

    Raises ConfigError where the mode needs what is not there.
    """
    if config.mode == "static":
        return StaticDiscovery(addresses)
    if config.mode == "dns":
        return DnsDiscovery(config.dns_names, config.dns_seconds, restarted)
    return PodDiscovery(config, restarted)


class PodDiscovery:
    """Follows the pods of a label selector in one namespace."""

    def __init__(self, config: DiscoveryConfig, restarted: Callable[[str], None]) -> None:
        self._config = config
        self._restarted = restarted
        self._namespace = config.namespace or _own_namespace()
        self._api = _new_api(config.kubeconfig)
        self._pods = PodSet(config.port_name)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="discovery", daemon=True)
        self._lock = threading.Lock()
        self._unpublished: tuple[Endpoint, ...] | None = None
        self._published: tuple[Endpoint, ...] | None = None
        self._publish_after = 0.0
        self._loop: asyncio.AbstractEventLoop
        self._publish: Publish

    def start(self, publish: Publish) -> None:
        self._loop, self._publish = asyncio.get_running_loop(), publish
        self._thread.start()

    async def close(self) -> None:
        self._stopping.set()  # the thread is a daemon: a watch that waits for the server is not waited for

    # ---- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        backoff = BACKOFF_SECONDS_MIN
        while not self._stopping.is_set():
            try:
                version = self._list()
                backoff = BACKOFF_SECONDS_MIN
                self._follow(version)
            except _Expired:
                self._restarted("expired")
            except Exception as error:  # whatever the network, the server or the client's parser came up with
                self._restarted("error")
                _logger.warning("pods of %s cannot be watched, the known workers stay: %s", self._namespace, error)
                self._stopping.wait(backoff * random.uniform(0.5, 1.0))
                backoff = min(2 * backoff, BACKOFF_SECONDS_MAX)

    def _list(self) -> str:
        """Read the whole list, page by page, and return the version that a watch goes on from."""
        pods: list[Mapping[str, object]] = []
        page, size = "", 0
        while True:
            more = {"_continue": page} if page else {}
            with self._call(limit=PAGE_PODS, _request_timeout=(CONNECT_SECONDS, LIST_SECONDS), **more) as response:
                data = response.read(MAX_LIST_BYTES + 1)
            size += len(data)
            if size > MAX_LIST_BYTES:
                raise ValueError(f"a list of pods of more than {MAX_LIST_BYTES} bytes")
            answer = json.loads(data)
            pods += answer.get("items") or []
            page = answer["metadata"].get("continue") or ""
            if not page:
                break
        self._pods.replace(pods)
        self._offer()
        return str(answer["metadata"]["resourceVersion"])

    def _follow(self, version: str) -> None:
        """Watch until the list has to be read again."""
        deadline = threading.Event()
        timer = threading.Timer(self._config.resync_seconds, deadline.set)
        timer.daemon = True
        timer.start()
        try:
            while not (self._stopping.is_set() or deadline.is_set()):
                version = self._watch(version, deadline)
        finally:
            timer.cancel()

    def _watch(self, version: str, deadline: threading.Event) -> str:
        seconds = max(1, min(WATCH_SECONDS, int(self._config.resync_seconds)))
        timeout = (CONNECT_SECONDS, seconds + WATCH_MARGIN_SECONDS)
        with self._call(
            watch=True,
            allow_watch_bookmarks=True,
            resource_version=version,
            timeout_seconds=seconds,
            _request_timeout=timeout,
        ) as response:
            for line in _lines(response):
                version = self._event(json.loads(line)) or version
                if self._stopping.is_set() or deadline.is_set():
                    break
        return version

    def _event(self, event: Mapping[str, Any]) -> str:
        """Apply one event; return its version."""
        kind, pod = event.get("type"), event.get("object") or {}
        if kind == "ERROR":
            if pod.get("code") == 410:
                raise _Expired
            raise ValueError(f"the watch ended: {pod.get('message')}")
        if kind in ("ADDED", "MODIFIED"):
            self._pods.changed(pod)
        elif kind == "DELETED":
            self._pods.deleted(pod)
        if kind != "BOOKMARK":
            self._offer()
        return str((pod.get("metadata") or {}).get("resourceVersion") or "")

    def _call(self, **options: Any) -> Any:
        """Return the raw response, a context that gives its connection back. Raises _Expired for a 410."""
        try:
            response = self._api.list_namespaced_pod(
                self._namespace, label_selector=self._config.selector, _preload_content=False, **options
            )
        except Exception as error:
            if getattr(error, "status", None) == 410:
                raise _Expired from error
            raise
        return response

    # ---- across to the event loop ---------------------------------------------------------------------------------

    def _offer(self) -> None:
        """Have the set published, once however many events have changed it before the loop comes round."""
        endpoints = self._pods.endpoints()
        with self._lock:
            waiting, self._unpublished = self._unpublished is not None, endpoints
        if not waiting and not self._stopping.is_set():
            self._loop.call_soon_threadsafe(self._schedule)

    def _schedule(self) -> None:
        """Take what is offered now, or as soon as the last update is long enough ago."""
        self._loop.call_at(max(self._publish_after, self._loop.time()), self._take)

    def _take(self) -> None:
        with self._lock:
            endpoints, self._unpublished = self._unpublished, None
        if endpoints is not None and endpoints != self._published and not self._stopping.is_set():
            self._published, self._publish_after = endpoints, self._loop.time() + PUBLISH_SECONDS
            self._publish(endpoints)


def _lines(response: Any) -> Iterator[bytes]:
    """Yield the lines of a watch as they come; one without end is refused."""
    rest = b""
    for chunk in response.stream(amt=None, decode_content=False):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line for line in lines if line.strip())
        if len(rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")


def _own_namespace() -> str:
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError as error:
        raise ConfigError(f"discovery.namespace: name it; this is no pod with a service account: {error}") from error


def _new_api(kubeconfig: str) -> Any:
    from kubernetes import client, config  # here: a quarter of a second and 40 MB that other modes save

    try:
        if kubeconfig:
            return client.CoreV1Api(config.new_client_from_config(kubeconfig))
        settings = client.Configuration()
        config.load_incluster_config(client_configuration=settings)
        return client.CoreV1Api(client.ApiClient(settings))
    except Exception as error:  # the client raises whatever its parsers do
        raise ConfigError(f"discovery.kubeconfig: no way to the Kubernetes API: {error}") from error
