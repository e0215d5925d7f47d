"""Puts a transfer process together: exporters and importers of the chosen transports that pass their self-test."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from tandem.certificates import between_pods
from tandem.core.messages.handoff import RankEndpoint
from tandem.core.messages.transfer import TransferOutcome, TransferReady, TransportFallback
from tandem.errors import TransportError
from tandem.transfer.channel import Launch
from tandem.transfer.choice import TCP, Choice, choose, shared_key
from tandem.transfer.contract import Exporter, Importer, Post
from tandem.transfer.engine_pool import EnginePool
from tandem.transfer.fallback import FallbackImporter
from tandem.transfer.landing_importer import LandingImporter
from tandem.transfer.mooncake import Mooncake, MooncakeExporter
from tandem.transfer.pages import PageSpace
from tandem.transfer.self_test import check_one_sided, check_tcp
from tandem.transfer.service import Service
from tandem.transfer.tcp_exporter import TcpExporter, listen
from tandem.transfer.tcp_importer import TcpImporter
from tandem.transfer.tcp_stream import TcpSettings
from tandem.transfer.tls import PeerTls

_INSTANCE_BYTES = 16


@dataclass(slots=True)
class _Parts:
    """What has come up so far. `endpoints` and the keys of `importers` are in order of preference."""

    exporters: list[Exporter] = field(default_factory=list)
    importers: dict[str, Importer] = field(default_factory=dict)
    endpoints: list[RankEndpoint] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fallbacks: list[TransportFallback] = field(default_factory=list)


class Assembly:
    """Built once, at the start of the process; may block for the self-tests' seconds."""

    def __init__(self, launch: Launch, space: PageSpace, post: Post) -> None:
        self._launch = launch
        self._space = space
        self._post = post
        self._host = launch.transfer.host or launch.worker_host
        self._instance_id = os.urandom(_INSTANCE_BYTES)
        certificates = between_pods(launch.tls)
        if certificates is not None:
            certificates.start()
        self._settings = TcpSettings(
            connect_seconds=launch.handoff.connect_seconds,
            progress_seconds=launch.handoff.progress_seconds,
            idle_seconds=launch.transfer.idle_seconds,
            connections=launch.transfer.connections,
            key=shared_key(launch.transfer),
            tls=PeerTls(certificates) if certificates is not None else None,
        )

    def build(self) -> tuple[Service, list[TransferOutcome]]:
        """Return the service and what to tell the rank first: TransferReady, then fallbacks that happened already.

        A transport that does not come up is missing from TransferReady, with a note; all of them may be.
        """
        choice = choose(self._launch.transfer)
        parts = _Parts(notes=list(choice.notes))
        control = self._listen(parts)
        if control is not None:
            self._add_tcp(control, choice, parts)
            if choice.one_sided:
                self._add_mooncake(control.endpoint.address, choice, parts)
        service = Service(self._space, parts.exporters, parts.importers, self._post)
        order = [choice.one_sided, TCP]
        ready = TransferReady(
            self._instance_id,
            tuple(sorted(parts.endpoints, key=lambda endpoint: order.index(endpoint.transport))),
            tuple(name for name in order if name in parts.importers),
            tuple(parts.notes),
        )
        return service, [ready, *parts.fallbacks]

    def _listen(self, parts: _Parts) -> TcpExporter | None:
        """The port of plain TCP, also the place where a one-sided exporter proves that it is alive."""
        try:
            listener = listen(self._host, self._launch.transfer.port)
        except OSError as error:
            parts.notes.append(f"cannot listen on {self._host} port {self._launch.transfer.port}: {error}")
            return None
        exporter = TcpExporter(listener, self._host, self._instance_id, self._settings)
        parts.exporters.append(exporter)
        return exporter

    def _add_tcp(self, exporter: TcpExporter, choice: Choice, parts: _Parts) -> None:
        if not choice.with_tcp:
            return
        try:
            check_tcp(exporter, self._space.page_bytes, self._settings)
        except TransportError as error:
            parts.notes.append(f"{TCP} is not offered: {error.message}")
            return
        told = self._launch.transfer.advertise_address or exporter.endpoint.address
        parts.endpoints.append(replace(exporter.endpoint, address=told))
        parts.importers[TCP] = TcpImporter(self._space, self._settings)

    def _add_mooncake(self, control: str, choice: Choice, parts: _Parts) -> None:
        name = choice.one_sided
        exporter: MooncakeExporter | None = None
        try:
            mooncake = Mooncake(name, self._launch.transfer, self._host)
            exporter = MooncakeExporter(mooncake, self._space, self._instance_id, control)
            engines = EnginePool(mooncake.new_engine)

            def new_importer(space: PageSpace) -> LandingImporter:
                return LandingImporter(space, name, engines, self._settings)

            check_one_sided(new_importer, exporter.endpoint, self._settings)
        except TransportError as error:
            if exporter is not None:
                exporter.close()
            parts.notes.append(f"{name} is not offered: {error.message}")
            if choice.with_tcp:
                parts.fallbacks.append(TransportFallback(self._instance_id, name, TCP, error.message))
            return
        if self._settings.tls is not None:
            parts.notes.append(f"{name} carries KV pages in plaintext, beside TLS: transfer.trusted_network allows it")
        parts.exporters.append(exporter)
        parts.endpoints.append(exporter.endpoint)
        importer: Importer = new_importer(self._space)
        if TCP in parts.importers:
            importer = FallbackImporter(name, importer, parts.importers[TCP], self._post)
        parts.importers[name] = importer
