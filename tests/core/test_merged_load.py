"""A worker's load is what its replicas' loads add up to, figure by figure."""

from __future__ import annotations

from dataclasses import fields, replace

from tandem.core.merged_load import merge_loads
from tandem.core.stats import HistogramCounts, LoadSnapshot, PageCounts, PeerFigures, TransportFigures


def transport(name: str, factor: int) -> TransportFigures:
    return TransportFigures(
        transport=name,
        pulls={"done": factor},
        num_bytes=10 * factor,
        seconds=0.5 * factor,
        mismatched_pages=2 * factor,
        failures={"lost": 3 * factor},
    )


def test_every_figure_is_added_up() -> None:
    """Fills every field by its type, so that one added later is seen here."""
    values: dict[str, object] = {}
    for number, field in enumerate(fields(LoadSnapshot), start=1):
        default = getattr(LoadSnapshot(), field.name)
        if isinstance(default, int | float) and not isinstance(default, bool):
            values[field.name] = type(default)(number)
        elif isinstance(default, HistogramCounts):
            values[field.name] = HistogramCounts((number, 0, 1), 2.0)
    load = LoadSnapshot(**values)  # type: ignore[arg-type]
    merged = merge_loads([load, load, load])
    for name, value in values.items():
        if isinstance(value, HistogramCounts):
            assert getattr(merged, name) == HistogramCounts((3 * value.counts[0], 0, 3), 6.0), name
        else:
            assert getattr(merged, name) == 3 * value, name  # type: ignore[operator]
    assert len(values) >= len(fields(LoadSnapshot)) - 6, "the rest is tested below"


def test_the_others() -> None:
    one = LoadSnapshot(
        pages=PageCounts(free=1, held=2, cached=3, quarantined=4, total=10),
        fenced_instance_ids=(b"a", b"b"),
        ended_requests={"stop": 1, "length": 2},
        transports=(transport("tcp", 1),),
        peers=(PeerFigures(address="p", landed=1, failed=2, num_bytes=3, numerics="n", differing=1),),
    )
    other = LoadSnapshot(
        pages=PageCounts(free=10, total=10),
        fenced_instance_ids=(b"b", b"c"),
        draining=True,
        ended_requests={"stop": 5},
        transports=(transport("none", 2), transport("tcp", 2)),
        peers=(PeerFigures(address="p", landed=1, failed=1, num_bytes=1),),
    )
    merged = merge_loads([one, other])
    assert merged.pages == PageCounts(free=11, held=2, cached=3, quarantined=4, total=20)
    assert merged.fenced_instance_ids == (b"a", b"b", b"c")
    assert merged.draining
    assert merged.ended_requests == {"stop": 6, "length": 2}
    assert merged.transports == (transport("tcp", 3), transport("none", 2))
    assert merged.peers == (PeerFigures(address="p", landed=2, failed=3, num_bytes=4, numerics="n", differing=1),)


def test_one_is_itself_and_empty_histograms_are_nothing() -> None:
    load = LoadSnapshot(steps=3)
    assert merge_loads([load]) is load
    seen = HistogramCounts((1, 2), 3.0)
    merged = merge_loads([load, replace(load, queue_seconds=seen)])
    assert (merged.queue_seconds, merged.steps) == (seen, 6)
    assert merge_loads([load, load]).queue_seconds == HistogramCounts()
