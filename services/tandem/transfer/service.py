"""What a transfer process does with each command. No I/O of its own: exporters and importers bring their threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tandem.core.messages.transfer import (
    CancelPull,
    PullEnded,
    PullStatus,
    RankExport,
    RankPull,
    Revoke,
    TransferCommand,
)
from tandem.transfer.contract import Exporter, Importer, Post
from tandem.transfer.export_queue import ExportQueue
from tandem.transfer.pages import PageSpace


class Service:
    """`post` is called from any thread. `handle` never blocks and is called from one thread."""

    def __init__(
        self, space: PageSpace, exporters: Sequence[Exporter], importers: Mapping[str, Importer], post: Post
    ) -> None:
        self._exports = ExportQueue(space, exporters, post)
        self._exporters = exporters
        self._importers = importers
        self._post = post

    def handle(self, command: TransferCommand) -> None:
        match command:
            case RankExport():
                self._exports.export(command)
            case Revoke():
                self._exports.revoke(command)
            case RankPull():
                self._pull(command)
            case CancelPull():
                for importer in self._importers.values():
                    importer.cancel(command.ticket)

    def close(self) -> None:
        """Break everything off and end all threads; what is under way ends as FAILED."""
        for importer in self._importers.values():
            importer.close()
        for exporter in self._exporters:
            exporter.close()
        self._exports.close()

    def _pull(self, pull: RankPull) -> None:
        importer = self._importers.get(pull.endpoint.transport)
        if importer is None:
            message = f"transport {pull.endpoint.transport!r} is not there"
            self._post(PullEnded(ticket=pull.ticket, status=PullStatus.FAILED, message=message))
            return
        importer.pull(pull, self._post)
