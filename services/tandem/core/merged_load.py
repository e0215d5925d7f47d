"""The load of a worker out of the loads of its replicas: counts are sums, histograms are added bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import reduce
from typing import Any

from tandem.core.stats import HistogramCounts, LoadSnapshot, PageCounts, PeerFigures, TransportFigures


def merge_loads(loads: Sequence[LoadSnapshot]) -> LoadSnapshot:
    """Return the sum of `loads`; a peer is fenced, and the worker drains, as soon as one replica says so."""
    if len(loads) == 1:
        return loads[0]
    values = {field.name: [getattr(load, field.name) for load in loads] for field in fields(LoadSnapshot)}
    return LoadSnapshot(**{name: _merge(name, figures) for name, figures in values.items()})


def _merge(name: str, figures: Sequence[Any]) -> Any:
    special = _SPECIAL.get(name)
    if special is not None:
        return special(figures)
    if isinstance(figures[0], HistogramCounts):
        return reduce(_add_histograms, figures)
    return sum(figures)


def _add_histograms(one: HistogramCounts, other: HistogramCounts) -> HistogramCounts:
    if not one.counts or not other.counts:
        return HistogramCounts(one.counts or other.counts, one.total + other.total)
    return HistogramCounts(tuple(map(sum, zip(one.counts, other.counts, strict=True))), one.total + other.total)


def _add_counts(figures: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in figures:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return total


def _add_pages(figures: Sequence[PageCounts]) -> PageCounts:
    return PageCounts(**{f.name: sum(getattr(each, f.name) for each in figures) for f in fields(PageCounts)})


def _add_transports(figures: Sequence[tuple[TransportFigures, ...]]) -> tuple[TransportFigures, ...]:
    by_name: dict[str, list[TransportFigures]] = {}
    for each in (each for replica in figures for each in replica):
        by_name.setdefault(each.transport, []).append(each)
    return tuple(
        TransportFigures(
            transport=name,
            pulls=_add_counts(each.pulls for each in same),
            num_bytes=sum(each.num_bytes for each in same),
            seconds=sum(each.seconds for each in same),
            mismatched_pages=sum(each.mismatched_pages for each in same),
            failures=_add_counts(each.failures for each in same),
        )
        for name, same in by_name.items()
    )


def _add_peers(figures: Sequence[tuple[PeerFigures, ...]]) -> tuple[PeerFigures, ...]:
    by_address: dict[str, list[PeerFigures]] = {}
    for each in (each for replica in figures for each in replica):
        by_address.setdefault(each.address, []).append(each)
    return tuple(
        PeerFigures(
            address=address,
            landed=sum(each.landed for each in same),
            failed=sum(each.failed for each in same),
            num_bytes=sum(each.num_bytes for each in same),
            numerics=next((each.numerics for each in same if each.numerics), ""),
            differing=max(each.differing for each in same),  # replicas know the same peers, and have one numerics id
        )
        for address, same in by_address.items()
    )


_SPECIAL: dict[str, Callable[[Sequence[Any]], Any]] = {
    "pages": _add_pages,
    "draining": any,
    "fenced_instance_ids": lambda figures: tuple(dict.fromkeys(each for ids in figures for each in ids)),
    "ended_requests": _add_counts,
    "transports": _add_transports,
    "peers": _add_peers,
}
