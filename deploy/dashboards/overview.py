"""Overview: are clients well, is there room, and is it the prefill or the decode side that is short."""

from __future__ import annotations

from deploy.dashboards.panels import (
    ERROR_CODES,
    GATEWAY,
    RATE,
    WORKER,
    Panel,
    board,
    graph,
    number,
    quantile,
    quantiles,
    rate,
)
from grafana_foundation_sdk.builders import dashboard

_REQUESTS = "tandem_gateway_requests_total"
_FAILED = f'{GATEWAY},code=~"{ERROR_CODES}"'
_ERRORS = f"{rate(_REQUESTS, _FAILED)} / {rate(_REQUESTS, GATEWAY)}"
_PURPOSE = (
    "Start here. First row: is anybody hurt? Second: how long do clients wait? Third: is there room, and on which "
    "side "
    "is it short? *Hand-off* and *Workers* (links above) say why."
)


def build() -> dashboard.Dashboard:
    made = board("tandem-overview", "Tandem / Overview", "Clients, room, and the balance of both sides", _PURPOSE)
    for row, panels in (
        ("Is anybody hurt?", _now()),
        ("Clients", _clients()),
        ("Room and balance", _room()),
        ("Changes", _changes()),
    ):
        made = made.with_row(dashboard.Row(row))
        for panel in panels:
            made = made.with_panel(panel)
    return made


def _now() -> list[Panel]:
    return [
        number("Requests", "Requests that ended, a second.", "reqps", rate(_REQUESTS, GATEWAY)),
        number(
            "Failing",
            "Share of requests that failed by a fault of ours; the objective is below 0.1 %. Look at *Requests by "
            "status* for the kind.",
            "percentunit",
            _ERRORS,
            warn=0.001,
        ),
        number(
            "TTFT p95",
            "95 % of the first tokens came sooner. High: *Wait by role*, third row.",
            "s",
            quantile(0.95, "tandem_gateway_ttft_seconds", GATEWAY),
            warn=5,
        ),
        number(
            "TPOT p95",
            "95 % of the answers had less between tokens. High: batches are too large or decode computes prompts; see"
            " *Workers*.",
            "s",
            quantile(0.95, "tandem_gateway_tpot_seconds", GATEWAY),
            warn=0.2,
        ),
        number("In flight", "Answers that are being produced.", "short", f"sum(tandem_gateway_inflight{{{GATEWAY}}})"),
        number(
            "Decode ready",
            "Decode and unified workers that take requests. Zero: nobody answers; look at their pods.",
            "short",
            f'sum(max by (namespace, role) (tandem_gateway_ready_workers{{{GATEWAY},role=~"decode|unified"}}))',
            warn=-1,
        ),
    ]


def _clients() -> list[Panel]:
    return [
        graph(
            "Time to first token",
            "From a request's arrival at the gateway to its first token. Rises with the prefill queue first.",
            "s",
            *quantiles("tandem_gateway_ttft_seconds", GATEWAY),
        ),
        graph(
            "Time per output token",
            "Mean of each answer after its first token. Rises with decode's batch and with prompts computed on decode.",
            "s",
            *quantiles("tandem_gateway_tpot_seconds", GATEWAY),
        ),
        graph(
            "Time between arrivals",
            "Between two arrivals of output for one request. A p99 far above the p50: streams stutter, by "
            "retractions, hand-offs that are late, or prompts on decode.",
            "s",
            *quantiles("tandem_gateway_itl_seconds", GATEWAY),
        ),
        graph(
            "Requests by status",
            "How requests ended. INVALID_ARGUMENT and CANCELLED are the clients'; RESOURCE_EXHAUSTED is a full "
            "service: add workers.",
            "reqps",
            (rate(_REQUESTS, GATEWAY, "code") + " > 0", "{{code}}"),
            stacked=True,
        ),
        graph(
            "Finish reasons",
            "Answers that stopped, met their length, or (none) never came to an end.",
            "reqps",
            (rate("tandem_gateway_finished_total", GATEWAY, "reason"), "{{reason}}"),
            stacked=True,
        ),
        graph(
            "Tokens",
            "Prompt and output tokens a second; cached ones did not have to be computed.",
            "short",
            (rate("tandem_gateway_tokens_total", GATEWAY, "kind"), "{{kind}}"),
        ),
        graph(
            "Whole requests",
            "From arrival to end.",
            "s",
            *quantiles("tandem_gateway_request_duration_seconds", GATEWAY),
        ),
        graph(
            "Failing, against the budget",
            "Share of requests that failed by a fault of ours, against the budget of 0.1 %.",
            "percentunit",
            (_ERRORS, "failing"),
            ("vector(0.001)", "budget"),
        ),
        graph(
            "In flight by gateway",
            "Answers that are being produced, by gateway.",
            "short",
            (f"sum by (pod) (tandem_gateway_inflight{{{GATEWAY}}})", "{{pod}}"),
            stacked=True,
        ),
    ]


def _room() -> list[Panel]:
    device = "tandem_worker_device_seconds_total"
    busy = f"{rate(device, WORKER, 'role')} / sum by (role) (tandem_worker_replicas{{{WORKER}}})"
    prefill, decode = (
        f"{rate(device, where)} / sum(tandem_worker_replicas{{{where}}})"
        for where in (f'{GATEWAY},role="prefill"', f'{GATEWAY},role="decode"')
    )
    return [
        graph(
            "Busy devices",
            "Share of the time in which a role's devices compute. One side near 100 % and the other far below: shift "
            "replicas to the busy one.",
            "percentunit",
            (busy, "{{role}}"),
            top=1,
        ),
        graph(
            "P:D balance",
            "Busy share of prefill over that of decode. Above 1: prefill is the shorter side, below 1: decode.",
            "short",
            (f"({prefill}) / ({decode})", "prefill : decode"),
        ),
        graph(
            "Wait by role, p95",
            "Until a worker had pages and a slot. On prefill it is part of TTFT: add prefill workers. On decode: add "
            "decode workers or KV memory.",
            "s",
            (quantile(0.95, "tandem_worker_queue_seconds", WORKER, "role"), "{{role}}"),
        ),
        graph(
            "Requests by role",
            "Requests that hold pages, and that wait. Waiting ones that grow: see the alert TandemQueueGrowth.",
            "short",
            (f"sum by (role) (tandem_worker_running_requests{{{WORKER}}})", "{{role}} running"),
            (f"sum by (role) (tandem_worker_waiting_requests{{{WORKER}}})", "{{role}} waiting"),
        ),
        graph(
            "KV memory by role",
            "Fullest worker of each role. At 100 % requests wait for pages and younger ones are retracted: add "
            "workers or memory.",
            "percentunit",
            (f"max by (role) (tandem_worker_kv_usage_ratio{{{WORKER}}})", "{{role}}"),
            top=1,
        ),
        graph(
            "Prompt tokens that wait",
            "Uncomputed prompt tokens in the queues: what the prefill side owes. The autoscaler of prefill follows it.",
            "short",
            (f"sum by (role) (tandem_worker_waiting_uncached_tokens{{{WORKER}}})", "{{role}}"),
        ),
    ]


def _changes() -> list[Panel]:
    return [
        graph(
            "Ready workers",
            "As the gateways see them.",
            "short",
            (f"max by (role) (tandem_gateway_ready_workers{{{GATEWAY}}})", "{{role}}"),
        ),
        graph(
            "Sessions",
            "Of gateways to workers. `down` for long: a worker is unreachable; `refused`: it serves another model.",
            "short",
            (f"sum by (state) (tandem_gateway_sessions{{{GATEWAY}}})", "{{state}}"),
        ),
        graph(
            "Answers that changed workers",
            "Resumed elsewhere, by cause; and those that could not be, by the bound that was met.",
            "short",
            (f"sum by (cause) (increase(tandem_gateway_resumptions_total{{{GATEWAY}}}[{RATE}]))", "{{cause}}"),
            (
                f"sum by (reason) (increase(tandem_gateway_resumptions_refused_total{{{GATEWAY}}}[{RATE}]))",
                "refused: {{reason}}",
            ),
        ),
        graph(
            "Drains",
            "How long programs have been draining. See the alert TandemDrainOverrun for those that meet their limit.",
            "s",
            (f"max by (pod) (tandem_gateway_drain_seconds{{{GATEWAY}}})", "{{pod}}"),
            (f"max by (pod) (tandem_worker_drain_seconds{{{WORKER}}})", "{{pod}}"),
        ),
        graph(
            "Discovery restarts",
            "Times that the list of workers had to be read anew. A steady rate: the API server or DNS is in trouble.",
            "short",
            (f"sum by (reason) (increase(tandem_gateway_discovery_restarts_total{{{GATEWAY}}}[{RATE}]))", "{{reason}}"),
        ),
        graph(
            "Versions",
            "Programs by version. Two for long: a rollout is stuck.",
            "short",
            (f"count by (program, version) (tandem_build_info{{{GATEWAY}}})", "{{program}} {{version}}"),
        ),
    ]
