"""Which of an exporter's endpoints an importer uses."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.core.messages.handoff import RankEndpoint


def choose_endpoint(endpoints: Sequence[RankEndpoint], imports: Sequence[str]) -> RankEndpoint | None:
    """Pick the endpoint of the transport that the importer likes best, or None if they share none."""
    for transport in imports:
        for endpoint in endpoints:
            if endpoint.transport == transport:
                return endpoint
    return None
