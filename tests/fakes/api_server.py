"""A Kubernetes API server as far as pods are concerned: list and watch over real HTTP, and every way they break.

Resource versions, pages, bookmarks and 410 behave as the real one's; tests/gateway/test_discovery.py runs the same
cases against a real one where there is one.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

NAMESPACE = "test"


class ApiServer:
    """Holds pods by name. `outage` refuses everything, `compact` forgets history, `cut` ends running watches."""

    def __init__(self) -> None:
        self.pods: dict[str, dict[str, Any]] = {}
        self.history: list[tuple[int, dict[str, Any]]] = []
        self.version = 100
        self.compacted = 0
        self.outage = False
        self.generation = 0  # watches of an older one end
        self.num_lists = 0
        self.num_watches = 0
        self.changed = threading.Condition()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.api = self
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def kubeconfig(self, folder: Path) -> str:
        """Write a kubeconfig for this server and return its path."""
        path = folder / "kubeconfig.json"
        cluster = {"server": f"http://127.0.0.1:{self._server.server_port}"}
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "c",
                    "clusters": [{"name": "c", "cluster": cluster}],
                    "users": [{"name": "u", "user": {}}],
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                }
            )
        )
        return str(path)

    def put(self, pod: dict[str, Any]) -> None:
        """Add or change a pod."""
        with self.changed:
            name = pod["metadata"]["name"]
            self._record("MODIFIED" if name in self.pods else "ADDED", pod)
            self.pods[name] = pod

    def remove(self, name: str) -> None:
        with self.changed:
            self._record("DELETED", self.pods.pop(name))

    def bookmark(self) -> None:
        """Tell watchers the version without any change of theirs."""
        with self.changed:
            self._record("BOOKMARK", {"metadata": {}})

    def compact(self) -> None:
        """Forget all history, and end the watches: who comes back with an old version gets 410."""
        with self.changed:
            self.version += 1
            self.compacted = self.version
            self.history.clear()
            self._cut()

    def fail_watches(self, code: int) -> None:
        """Send an ERROR event."""
        with self.changed:
            self.version += 1
            status = {"kind": "Status", "code": code, "message": "made to fail", "metadata": {}}
            self.history.append((self.version, {"type": "ERROR", "object": status}))
            self.changed.notify_all()

    def cut(self) -> None:
        """End every watch in the middle."""
        with self.changed:
            self._cut()

    def _cut(self) -> None:
        self.generation += 1
        self.changed.notify_all()

    def _record(self, kind: str, pod: dict[str, Any]) -> None:
        self.version += 1
        pod = {**pod, "metadata": {**pod["metadata"], "resourceVersion": str(self.version)}}
        self.history.append((self.version, {"type": kind, "object": pod}))
        self.changed.notify_all()

    def close(self) -> None:
        self.outage = True
        self.cut()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    api: ApiServer
    daemon_threads = True
    request_queue_size = 64


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        api, parts = self.server.api, urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        if api.outage:
            self._answer(503, {"kind": "Status", "code": 503})
        elif parts.path != f"/api/v1/namespaces/{NAMESPACE}/pods":
            self._answer(404, {"kind": "Status", "code": 404})
        elif query.get("watch") in ("true", "True"):
            self._watch(query)
        else:
            self._list(query)

    def _list(self, query: dict[str, str]) -> None:
        api = self.server.api
        with api.changed:
            api.num_lists += 1
            pods, version = list(api.pods.values()), api.version
        start, limit = int(query.get("continue", 0)), int(query.get("limit", 0)) or len(pods)
        more = str(start + limit) if start + limit < len(pods) else ""
        metadata = {"resourceVersion": str(version), "continue": more}
        self._answer(200, {"kind": "PodList", "metadata": metadata, "items": pods[start : start + limit]})

    def _watch(self, query: dict[str, str]) -> None:
        api, sent = self.server.api, int(query["resourceVersion"])

        def news() -> bool:
            return api.version > sent or api.generation != generation

        with api.changed:
            api.num_watches += 1
            generation = api.generation
            expired = sent < api.compacted
        if expired:
            self._answer(410, {"kind": "Status", "code": 410, "reason": "Expired"})
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            with api.changed:
                api.changed.wait_for(news, timeout=10)
                if api.generation != generation:
                    break
                events = [event for version, event in api.history if version > sent]
                sent = api.version
            data = b"".join(json.dumps(event).encode() + b"\n" for event in events)
            if data:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
                self.wfile.flush()
        self.close_connection = True  # without the last chunk: cut off

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


def pod_of(name: str, host: str, *, ready: bool = True, uid: str = "", port: int = 50051) -> dict[str, Any]:
    """Return a pod as the API writes it."""
    return {
        "metadata": {"name": name, "uid": uid or f"uid-{name}", "labels": {"llm-d.ai/role": "decode"}},
        "spec": {"containers": [{"name": "worker", "ports": [{"name": "grpc", "containerPort": port}]}]},
        "status": {
            "phase": "Running",
            "podIP": host,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


def leaving(pod: dict[str, Any]) -> dict[str, Any]:
    """Return the pod with a deletion under way."""
    return {**pod, "metadata": {**pod["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}}
