"""Workers: event loops, batches, pages and devices, pod by pod."""

from __future__ import annotations

from deploy.dashboards.panels import RATE, WORKER, Panel, board, graph, mean, number, quantile, rate
from grafana_foundation_sdk.builders import dashboard

_PURPOSE = (
    "Pod by pod: what a device does, what its loop feeds it, and where its memory goes. Choose a role above: prefill "
    "and "
    "decode pods are different machines in all of these."
)
_IDLE, _DEVICE, _STEPS = (
    f"{rate(f'tandem_worker_{name}', WORKER)} / sum(tandem_worker_replicas{{{WORKER}}})"
    for name in ("device_idle_seconds_total", "device_seconds_total", "step_seconds_sum")
)
_IDLE_BY_POD = (
    f"{rate('tandem_worker_device_idle_seconds_total', WORKER, 'pod')} / "
    f"sum by (pod) (tandem_worker_replicas{{{WORKER}}})"
)


def build() -> dashboard.Dashboard:
    made = board("tandem-workers", "Tandem / Workers", "Loops, batches, pages, devices", _PURPOSE)
    for row, panels in (
        ("Now", _now()),
        ("Devices and loops", _loops()),
        ("Batches", _batches()),
        ("Memory", _memory()),
        ("Replicas within a pod", _replicas()),
        ("Life", _life()),
    ):
        made = made.with_row(dashboard.Row(row))
        for panel in panels:
            made = made.with_panel(panel)
    return made


def _now() -> list[Panel]:
    return [
        number("Workers", "Workers that report.", "short", f"count(tandem_worker_info{{{WORKER}}})"),
        number(
            "Idle devices",
            "Share of the time without a plan at the device: nothing to do, or nothing that may begin.",
            "percentunit",
            _IDLE,
        ),
        number(
            "Step p95",
            "95 % of the steps were shorter. It bounds the time between tokens.",
            "s",
            quantile(0.95, "tandem_worker_step_seconds", WORKER),
            warn=0.5,
        ),
        number(
            "Fullest KV memory",
            "Share of a worker's pages that is neither free nor evictable.",
            "percentunit",
            f"max(tandem_worker_kv_usage_ratio{{{WORKER}}})",
            warn=0.95,
        ),
        number(
            "Retractions, 1 h",
            "Requests that lost their pages to older ones and are computed again. Many: too little KV memory for the "
            "load.",
            "short",
            f"sum(increase(tandem_worker_retractions_total{{{WORKER}}}[1h]))",
        ),
        number(
            "Silent loop",
            "Longest silence of an event loop. 5 s is normal when idle; from 20 s on it is stuck.",
            "s",
            f"max(tandem_worker_loop_silent_seconds{{{WORKER}}})",
            warn=20,
        ),
    ]


def _loops() -> list[Panel]:
    return [
        graph(
            "What devices do",
            "Mean over replicas. Computing is use; launching is host work that the device waits for (the overlap loop "
            "hides most of it); idle is room.",
            "percentunit",
            (_DEVICE, "computing"),
            (f"clamp_min({_STEPS} - {_DEVICE}, 0)", "launching"),
            (_IDLE, "idle"),
            stacked=True,
            top=1,
        ),
        graph(
            "Idle device",
            "By pod. One pod idle beside busy ones: routing does not reach it.",
            "percentunit",
            (_IDLE_BY_POD, "{{pod}}"),
            top=1,
        ),
        graph(
            "Step time, p95",
            "From a plan's launch, or the end of the plan before it, to its result.",
            "s",
            (quantile(0.95, "tandem_worker_step_seconds", WORKER, "pod"), "{{pod}}"),
        ),
        graph(
            "Silent loops",
            "Since a pod's most silent event loop was heard of; up to 5 s when idle. Beyond 20 s: TandemStuckLoop.",
            "s",
            (f"max by (pod) (tandem_worker_loop_silent_seconds{{{WORKER}}})", "{{pod}}"),
        ),
        graph(
            "Late frontends",
            "How late the frontend's own loop is with its heartbeat. High: its CPU is taken by others.",
            "s",
            (f"max by (pod) (tandem_worker_frontend_lag_seconds{{{WORKER}}})", "{{pod}}"),
        ),
        graph("Steps", "Plans executed.", "ops", (rate("tandem_worker_steps_total", WORKER, "pod"), "{{pod}}")),
    ]


def _batches() -> list[Panel]:
    return [
        graph(
            "Requests of a plan",
            "Mean batch. Small on a busy decode pod: requests are spread too thin, fewer and larger pods would do "
            "more.",
            "short",
            (mean("tandem_worker_batch_requests", WORKER, "pod"), "{{pod}}"),
        ),
        graph(
            "Tokens of a plan",
            "Mean. Prefill plans are long; on decode a long one is a prompt, and delays everybody's next token.",
            "short",
            (mean("tandem_worker_batch_tokens", WORKER, "pod"), "{{pod}}"),
        ),
        graph(
            "Tokens",
            "Computed, and output of them.",
            "short",
            (rate("tandem_worker_computed_tokens_total", WORKER, "pod"), "{{pod}} computed"),
            (rate("tandem_worker_generated_tokens_total", WORKER, "pod"), "{{pod}} output"),
        ),
        graph(
            "Requests",
            "Those that hold pages, and those that wait.",
            "short",
            (f"sum by (pod) (tandem_worker_running_requests{{{WORKER}}})", "{{pod}} running"),
            (f"sum by (pod) (tandem_worker_waiting_requests{{{WORKER}}})", "{{pod}} waiting"),
        ),
        graph(
            "How requests end here",
            "handed_off is prefill's good end. peer_lost: a decode worker never came back for its pages. failed: read"
            " the log.",
            "reqps",
            (rate("tandem_worker_ended_requests_total", WORKER, "reason") + " > 0", "{{reason}}"),
            stacked=True,
        ),
        graph(
            "Rows for nothing",
            "Speculative rows whose request had ended meanwhile, of all: the price of the overlap loop.",
            "short",
            (rate("tandem_worker_discarded_rows_total", WORKER, "pod"), "{{pod}}"),
        ),
    ]


def _memory() -> list[Panel]:
    hits, queries = (rate(f"tandem_worker_prefix_{name}_tokens_total", WORKER, "role") for name in ("hit", "query"))
    return [
        graph(
            "KV memory in use",
            "Neither free nor evictable. The autoscaler of decode follows it.",
            "percentunit",
            (f"max by (pod) (tandem_worker_kv_usage_ratio{{{WORKER}}})", "{{pod}}"),
            top=1,
        ),
        graph(
            "Pages by state",
            "cached ones are free on demand. quarantined ones wait for a launch or a read to end; many for long: a "
            "peer or device hangs.",
            "short",
            (f"sum by (state) (tandem_worker_pages{{{WORKER}}})", "{{state}}"),
            stacked=True,
        ),
        graph(
            "Prefix cache hits",
            "Share of the prompt tokens that were found computed.",
            "percentunit",
            (f"{hits} / ({queries} > 0)", "{{role}}"),
            top=1,
        ),
        graph(
            "Retractions",
            "Requests that lost their pages to an older one.",
            "short",
            (f"sum by (pod) (increase(tandem_worker_retractions_total{{{WORKER}}}[{RATE}]))", "{{pod}}"),
        ),
        graph(
            "Orphaned pages",
            "Pages that nothing owns. Any at all is a defect of ours: report it with the log's self-check lines, "
            "restart the pod when it suits.",
            "short",
            (f"sum by (pod) (tandem_worker_orphaned_pages{{{WORKER}}})", "{{pod}}"),
            (f"sum by (pod) (increase(tandem_worker_self_check_faults_total{{{WORKER}}}[{RATE}]))", "{{pod}}, faults"),
        ),
        graph(
            "Wait for pages and a slot, p95",
            "By pod.",
            "s",
            (quantile(0.95, "tandem_worker_queue_seconds", WORKER, "pod"), "{{pod}}"),
        ),
    ]


def _replicas() -> list[Panel]:
    """What a pod with parallel.data_size above 1 makes of its load; elsewhere one line a pod."""
    by, legend = "pod, replica", "{{pod}} / {{replica}}"
    return [
        graph(
            "Requests by replica",
            "Those that hold pages. Lines of a pod that part for long: its requests share a beginning, or a few are "
            "very long.",
            "short",
            (f"sum by ({by}) (tandem_worker_replica_running_requests{{{WORKER}}})", legend),
        ),
        graph(
            "Prompt tokens that wait, by replica",
            "What new requests are balanced by, together with what decodes.",
            "short",
            (f"sum by ({by}) (tandem_worker_replica_waiting_uncached_tokens{{{WORKER}}})", legend),
        ),
        graph(
            "Tokens by replica",
            "Computed tokens, prompt and output.",
            "short",
            (rate("tandem_worker_replica_computed_tokens_total", WORKER, by), legend),
        ),
        graph(
            "KV memory by replica",
            "Share of a replica's pages that is neither free nor evictable. One request fits into one replica only.",
            "percentunit",
            (
                f'sum by ({by}) (tandem_worker_replica_pages{{{WORKER},state=~"held|quarantined"}})'
                f" / sum by ({by}) (tandem_worker_replica_pages{{{WORKER}}})",
                legend,
            ),
            top=1,
        ),
        graph(
            "Prefix cache hits by replica",
            "Prompt tokens that were found computed: conversations stay where their beginning is.",
            "short",
            (rate("tandem_worker_replica_prefix_hit_tokens_total", WORKER, by), legend),
        ),
        graph(
            "Silent loops by replica",
            "Which one of a pod does not turn any more.",
            "s",
            (f"max by ({by}) (tandem_worker_replica_loop_silent_seconds{{{WORKER}}})", legend),
        ),
    ]


def _life() -> list[Panel]:
    return [
        graph(
            "Drains",
            "Seconds of a drain, and what it may take until the rest is cut.",
            "s",
            (f"max by (pod) (tandem_worker_drain_seconds{{{WORKER}}})", "{{pod}}"),
            (f"max by (pod) (tandem_worker_drain_limit_seconds{{{WORKER}}})", "{{pod}} limit"),
        ),
        graph(
            "Sessions",
            "Gateways that are connected. Fewer than gateways: a network policy or a broken address.",
            "short",
            (f"sum by (pod) (tandem_worker_sessions{{{WORKER}}})", "{{pod}}"),
        ),
        graph(
            "What runs",
            "Workers by loop, operators and type of numbers. Two of a role for long: a rollout is stuck, and "
            "bit-equal answers are not promised across.",
            "short",
            (
                f"count by (role, loop, operators, dtype) (tandem_worker_info{{{WORKER}}})",
                "{{loop}} {{operators}} {{dtype}}",
            ),
        ),
    ]
