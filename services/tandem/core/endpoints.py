"""Which of an exporter's endpoints an importer uses."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.core.messages.handoff import RankEndpoint, Sharding


def choose_endpoints(
    endpoints: Sequence[RankEndpoint], imports: Sequence[str], exporter: Sharding
) -> tuple[RankEndpoint, ...]:
    """Return those of the transport that the importer likes best among those that all exporting ranks have, by rank.

    Empty if there is no such transport. A rank that is named twice, or that the sharding does not have, rules it out.
    """
    ranks = [
        (pipeline_rank, tensor_rank)
        for pipeline_rank in range(exporter.pipeline_size)
        for tensor_rank in range(exporter.tensor_size)
    ]
    for transport in imports:
        found = [endpoint for endpoint in endpoints if endpoint.transport == transport]
        by_rank = {(endpoint.pipeline_rank, endpoint.tensor_rank): endpoint for endpoint in found}
        if len(found) == len(ranks) and all(rank in by_rank for rank in ranks):
            return tuple(by_rank[rank] for rank in ranks)
    return ()
