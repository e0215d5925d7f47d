"""Hand-off: KV pages on their way from prefill to decode: how many, how fast, and what goes wrong between whom."""

from __future__ import annotations

from deploy.dashboards.panels import GATEWAY, RATE, WORKER, Panel, board, graph, mean, number, quantile, quantiles, rate
from grafana_foundation_sdk.builders import dashboard

_DECODE = f'{GATEWAY},role="decode"'
_LANDED = "tandem_worker_handoff_seconds_count"
_FAILURES = "tandem_worker_handoff_failures_total"
_REAL = f'{_DECODE},reason!~"draining|superseded|deadline"'
_FAILING = f"{rate(_FAILURES, _REAL)} / ({rate(_FAILURES, _REAL)} + {rate(_LANDED, _DECODE)})"
_BYTES, _SECONDS = "tandem_worker_transferred_bytes_total", "tandem_worker_transfer_seconds_total"
_PURPOSE = (
    "Decode pulls the KV pages of a prompt from the prefill worker that computed it; the first token does not wait "
    "for "
    "them, the second does. *What a request spends* shows where that time goes; the last row says who fails with "
    "whom."
)


def build() -> dashboard.Dashboard:
    made = board("tandem-handoff", "Tandem / Hand-off", "KV pages from prefill to decode", _PURPOSE)
    for row, panels in (
        ("Now", _now()),
        ("Time", _time()),
        ("Bytes", _bytes()),
        ("What goes wrong, and between whom", _faults()),
    ):
        made = made.with_row(dashboard.Row(row))
        for panel in panels:
            made = made.with_panel(panel)
    return made


def _now() -> list[Panel]:
    return [
        number("Hand-offs", "Prompts whose pages arrived, a second.", "ops", rate(_LANDED, _DECODE)),
        number(
            "Failing",
            "Share of the attempts to receive one that failed. They are repeated, and computed on decode at last.",
            "percentunit",
            _FAILING,
            warn=0.05,
        ),
        number(
            "Bandwidth of a pull",
            "Bytes over the time that pulls took. Far below the network's: wrong transport, or a busy peer.",
            "Bps",
            f"{rate(_BYTES, _DECODE)} / {rate(_SECONDS, _DECODE)}",
        ),
        number(
            "Stall p95",
            "What the hand-off adds between a client's first and second token.",
            "s",
            quantile(0.95, "tandem_worker_handoff_stall_seconds", _DECODE),
            warn=1,
        ),
        number(
            "Mismatches, 1 h",
            "Pages that differed from what was announced. They were read again. Any at all: suspect memory or network"
            " hardware.",
            "short",
            f"sum(increase(tandem_worker_checksum_mismatches_total{{{_DECODE}}}[1h]))",
            warn=1,
        ),
        number(
            "Transport",
            "First choice of the workers, by their number. `tcp` where RDMA was meant: the worker's log says why.",
            "short",
            f'count by (transport) (tandem_worker_transport{{{WORKER},rank="0"}})',
            legend="{{transport}}",
        ),
    ]


def _time() -> list[Panel]:
    parts = (
        ("tandem_worker_queue_seconds", f'{GATEWAY},role="prefill"', "wait on prefill"),
        ("tandem_worker_prefill_seconds", f'{GATEWAY},role="prefill"', "prefill"),
        ("tandem_worker_handoff_stall_seconds", _DECODE, "stall: pages not here yet"),
        ("tandem_worker_first_decode_seconds", _DECODE, "first decode step"),
    )
    return [
        graph(
            "What a request spends until its second token",
            "Means, one on top of the other: the first two make the first token, the other two the second. The "
            "thickest layer is what to work on.",
            "s",
            *[(mean(name, where), legend) for name, where, legend in parts],
            stacked=True,
            size="half",
        ),
        graph(
            "The same, p95",
            "Not additive: each line's own slowest requests.",
            "s",
            *[(quantile(0.95, name, where), legend) for name, where, legend in parts],
            size="half",
        ),
        graph(
            "Hand-off",
            "From a hand-off's first read to its last verified page. Overlaps with a long prompt's computation.",
            "s",
            *quantiles("tandem_worker_handoff_seconds", _DECODE),
        ),
        graph(
            "Stall",
            "From the first token, which goes out at once, to the last verified page. Clients feel it as one long gap.",
            "s",
            *quantiles("tandem_worker_handoff_stall_seconds", _DECODE),
        ),
        graph(
            "Wait for pages on decode",
            "From the first announced page to the first read. High: decode's KV memory is full, see *Workers*.",
            "s",
            *quantiles("tandem_worker_queue_seconds", _DECODE),
        ),
    ]


def _bytes() -> list[Panel]:
    return [
        graph(
            "Bytes",
            "KV bytes that decode has read.",
            "Bps",
            (rate(_BYTES, _DECODE, "transport"), "{{transport}}"),
            stacked=True,
        ),
        graph(
            "Bandwidth by transport",
            "Bytes over the time that pulls took, by transport. Falls when many pulls share a link.",
            "Bps",
            (f"{rate(_BYTES, _DECODE, 'transport')} / ({rate(_SECONDS, _DECODE, 'transport')} > 0)", "{{transport}}"),
        ),
        graph(
            "Hand-offs under way",
            "Decode: pulls and hand-offs that wait for pages. Prefill: announced, not yet released.",
            "short",
            (f"sum by (role) (tandem_worker_transfers_inflight{{{WORKER}}})", "{{role}}"),
            (f"sum(tandem_worker_transfers_waiting{{{_DECODE}}})", "waiting for pages"),
        ),
    ]


def _faults() -> list[Panel]:
    each = f"tandem_worker_peer_handoff_failures_total{{{_DECODE}}}[{RATE}]"
    return [
        graph(
            "Failures by reason",
            "pull, lost: the network or a peer's death. integrity: hardware. incompatible: two models or versions. "
            "overloaded: prefill is full. The rest is orderly.",
            "short",
            (f"sum by (reason) (increase({_FAILURES}{{{_DECODE}}}[{RATE}]))", "{{reason}}"),
        ),
        graph(
            "Failures by transport",
            "`none`: before one was chosen, so no fault of a transport.",
            "short",
            (f"sum by (transport) (increase({_FAILURES}{{{_DECODE}}}[{RATE}]))", "{{transport}}"),
        ),
        graph(
            "Failures by pair",
            "Decode pod and address of the prefill worker. One pair: that path or worker; one peer: that worker; all:"
            " the network or a bad version.",
            "short",
            (f"sum by (pod, peer) (increase({each}))", "{{pod}} from {{peer}}"),
        ),
        graph(
            "Hand-offs by pair",
            "A pair that is missing is fenced or not used.",
            "ops",
            (rate("tandem_worker_peer_handoffs_total", _DECODE, "pod, peer"), "{{pod}} from {{peer}}"),
        ),
        graph(
            "Pulls by result",
            "refused: the peer no longer held the pages (its lease had passed). cancelled: the request had ended.",
            "ops",
            (rate("tandem_worker_pulls_total", _DECODE, "result"), "{{result}}"),
        ),
        graph(
            "Mismatched pages",
            "By decode pod and transport. See the alert TandemIntegrityMismatch.",
            "short",
            (
                f"sum by (pod, transport) (increase(tandem_worker_checksum_mismatches_total{{{_DECODE}}}[{RATE}]))",
                "{{pod}} {{transport}}",
            ),
        ),
        graph(
            "Remedies",
            "Prompts that decode computed itself since every peer had failed, and pairs that fell back to another "
            "transport.",
            "short",
            (f"sum(increase(tandem_worker_local_prefills_total{{{_DECODE}}}[{RATE}]))", "computed on decode"),
            (f"sum(increase(tandem_worker_transfer_fallbacks_total{{{_DECODE}}}[{RATE}]))", "transport fallbacks"),
        ),
        graph(
            "Leases",
            "Hand-offs whose stream broke: kept for another decode worker, until their lease has passed.",
            "short",
            (f"sum(tandem_worker_leased_handoffs{{{GATEWAY}}})", "leased now"),
            (f"sum(increase(tandem_worker_leases_started_total{{{GATEWAY}}}[{RATE}]))", "started"),
            (f"sum(increase(tandem_worker_leases_expired_total{{{GATEWAY}}}[{RATE}]))", "expired"),
        ),
        graph(
            "Fenced peers",
            "Pairs that are not used for a while after repeated faults.",
            "short",
            (f"sum by (pod) (tandem_worker_fenced_peers{{{_DECODE}}})", "{{pod}}"),
        ),
        graph(
            "Pairs with other numerics",
            "Decode pods and prefill workers whose operators round otherwise: other CPUs or settings. Answers stay "
            "right; they are not bit-identical, and the pages of such a pair are not cached on decode.",
            "short",
            (f"sum by (pod) (tandem_worker_peer_numerics_differ{{{_DECODE}}})", "{{pod}}"),
        ),
    ]
