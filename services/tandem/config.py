"""The configuration of every program: one frozen tree. `tandem.config_load` fills it, nothing changes it afterwards.

Precedence: defaults < file < environment (TANDEM_SCHEDULER__BUDGET_TOKENS=512) < flags (--scheduler.budget-tokens 512).
Units are last in the names. Each field's `help` is what `--help` prints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["prefill", "decode", "unified"]
OperatorChoice = Literal["auto", "reference", "cpu-avx2", "cpu-avx512", "cpu-avx512bf16", "cpu-amx"]
LoopName = Literal["auto", "normal", "overlap"]
HugePages = Literal["auto", "off", "require"]
TransportChoice = Literal["auto", "mooncake-rdma", "mooncake-tcp", "tcp"]

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # it may become the name of a folder


def setting(default: Any, help: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A field with its help text and, for numbers, its inclusive bounds."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    path: str = setting("demo", "folder of a Hugging Face checkpoint, a hub id, or `demo` for the built-in model")
    revision: str = setting("", "revision of a hub id")
    served_name: str = setting("", "name that clients use; empty: the last part of the path")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "compute type; auto: the best for this device")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where the model runs")
    ops: OperatorChoice = setting("auto", "operators; auto: the C++ ones where this CPU has kernels, else reference")
    adapters: tuple[str, ...] = setting((), "LoRA adapters in PEFT format, name=folder, comma separated")
    max_context_tokens: int = setting(0, "cut of the model's context length; 0: the model's own", low=0)
    threads: int = setting(0, "compute threads of a worker, all replicas; 0: the CPUs it may use", low=0, high=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    loop: LoopName = setting(
        "auto", "event loop: overlap plans while the device computes, normal does not; auto: pipelined with stages"
    )
    budget_tokens: int = setting(1024, "most tokens of one plan (chunked prefill)", low=1, high=1 << 20)
    microbatch_tokens_min: int = setting(64, "pipelined: prompts are not cut finer to fill stages", low=1, high=1 << 20)
    step_seconds_max: float = setting(0.2, "a plan's length by the measured rate, seconds; 0: no bound", low=0)
    max_running_requests: int = setting(256, "requests that are computed at once, by each replica", low=1, high=65536)
    max_waiting_requests: int = setting(
        4096, "requests that wait, for each replica; more are refused as overloaded", low=1
    )
    max_local_prefills: int = setting(2, "prompts that decode computes at once after prefill peers failed", low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    tensor_size: int = setting(1, "ranks that share every layer's heads and columns", low=1, high=64)
    pipeline_size: int = setting(1, "stages that share the layers; more than 1: pipelined loops", low=1, high=64)
    data_size: int = setting(1, "copies of the model in a worker, which share its threads and memory", low=1, high=64)
    expert_size: int = setting(
        1, "groups of tensor ranks that experts are spread over; 1: each expert is cut", low=1, high=64
    )
    devices: tuple[str, ...] = setting(
        (), "device of each rank, cpu or cuda:N, comma separated, replica after replica; empty: model.device"
    )
    backend: Literal["auto", "gloo", "nccl"] = setting(
        "auto", "what moves tensors between ranks; auto: NCCL where each has a GPU of its own, else gloo"
    )
    remote_ranks: int = setting(0, "the last so many ranks are started elsewhere, each with its parallel.rank", low=0)
    rank: int = setting(0, "which rank this is; above 0: a follower, which dials parallel.rendezvous", low=0)
    rendezvous: str = setting("", "host:port where rank 0 listens for ranks that are started elsewhere")
    host: str = setting("", "address that other ranks reach the ranks here at; empty: this end of the rendezvous")
    token_file: str = setting("", "file with the secret that the ranks of one worker share, 16 bytes at least")
    trusted_network: bool = setting(
        False, "everybody who can reach the ranks is trusted: needed for ranks elsewhere, whose tensors travel bare"
    )
    start_seconds: float = setting(600.0, "how long ranks wait for each other while they start", low=1.0)
    collective_seconds: float = setting(60.0, "a rank that is stuck for this long ends the worker", low=0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    max_adapters: int = setting(32, "adapters that a worker serves, trained ones included", low=1, high=4096)
    folder: str = setting("", "where adapters trained here are saved; empty: training is refused")
    device_share: float = setting(0.3, "most of the time that training takes from the device", low=0.01, high=1.0)
    max_examples: int = setting(100_000, "examples of one training", low=1, high=10_000_000)
    max_text_bytes: int = setting(64 << 20, "text of one training, bytes", low=1, high=1 << 30)
    max_sequence_tokens: int = setting(1024, "longest example; what is longer is cut", low=2, high=1 << 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    # 32: keys of one head of 64 in bf16 then fill 4 KB. Attention reads shorter runs a third slower.
    page_tokens: int = setting(32, "tokens in a KV page", low=1, high=1024)
    pool_bytes: int = setting(0, "KV pools of one worker in bytes, all replicas; 0: see memory_fraction", low=0)
    memory_fraction: float = setting(0.25, "share of the free memory that the KV pools take", low=0.01, high=0.95)
    pool_bytes_max: int = setting(4 << 30, "bound of memory_fraction in bytes", low=1 << 20)
    huge_pages: HugePages = setting(
        "auto", "KV pools in reserved pages of 2 MB; auto: where enough are free, else ordinary, huge ones advised"
    )
    prefix_cache: bool = setting(True, "reuse the pages of equal prompt beginnings")


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffConfig:
    lease_seconds: float = setting(10.0, "how long prefill keeps a hand-off whose stream ended unreleased", low=0.05)
    importer_share: float = setting(0.5, "share of prefill's pool that one decode replica may pin", low=0.01, high=1.0)
    pull_pages_max: int = setting(256, "pages of one pull", low=1, high=65536)
    progress_seconds: float = setting(5.0, "a pull without progress for this long is broken off", low=0.1)
    connect_seconds: float = setting(2.0, "time to reach a prefill worker", low=0.1)
    fence_faults: int = setting(3, "faults in a row after which a pair is fenced", low=1)
    fence_seconds: float = setting(10.0, "how long a fenced pair is not tried", low=0.0)
    attempts_max: int = setting(4, "streams opened for one request before its prompt is computed on decode", low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferConfig:
    transport: TransportChoice = setting("auto", "what moves KV bytes; auto: RDMA where it is there and trusted")
    trusted_network: bool = setting(False, "everybody who can reach the KV ports is trusted: needed for Mooncake")
    strict: bool = setting(False, "refuse instead of falling back to plain TCP")
    host: str = setting("", "address that peers reach the KV port at; empty: the worker's own host")
    port: int = setting(0, "KV port of the TCP transport; 0: any free port", low=0, high=65535)
    advertise_address: str = setting("", "host:port that peers are told for it, behind NAT; empty: where it listens")
    connections: int = setting(2, "TCP connections to one peer", low=1, high=16)
    idle_seconds: float = setting(60.0, "an unused connection is closed after this long", low=1.0)
    mooncake_devices: str = setting("", "RDMA devices, comma separated; empty: all")
    mooncake_port_min: int = setting(15000, "first port of Mooncake's range", low=1024, high=65535)
    mooncake_port_max: int = setting(17000, "last port of Mooncake's range", low=1024, high=65535)
    shared_key_file: str = setting("", "key for the HMAC challenge of the TCP data plane; empty: none")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(0, "gRPC port; 0: any free port", low=0, high=65535)
    advertise_host: str = setting("", "host that others reach this program at; empty: `host`")
    metrics_port: int = setting(
        -1, "port of /metrics, /livez and /readyz; 0: any free port, -1: off", low=-1, high=65535
    )
    metrics_host: str = setting("", "address that they listen on; empty: `host`")
    handoff_port: int = setting(
        -1,
        "port of a prefill worker's hand-offs, apart from its gRPC port; 0: any free port, -1: not apart",
        low=-1,
        high=65535,
    )
    drain_delay_seconds: float = setting(
        0.0, "how long a stopping gateway still takes new requests, until nobody sends it any", low=0.0
    )
    reflection: bool = setting(True, "gRPC server reflection")
    admin: bool = setting(False, "AdminService on a worker's gRPC port: whoever reaches it may train adapters")
    drain_seconds: float = setting(30.0, "how long a stopping program waits for its requests", low=0.0)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe log line that is written")
    log_format: Literal["text", "json"] = setting("text", "form of the log lines")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    prefill: tuple[str, ...] = setting((), "addresses of prefill workers, host:port, comma separated")
    decode: tuple[str, ...] = setting((), "addresses of decode or unified workers, host:port, comma separated")
    max_inflight_requests: int = setting(4096, "requests at once; more are refused as overloaded", low=1)
    request_seconds_max: float = setting(600.0, "deadline of a request whose client set none, and its cap", low=0.1)
    max_prompt_bytes: int = setting(8 << 20, "longest text of a prompt, bytes", low=1)
    stream_buffer_tokens: int = setting(8192, "tokens kept for a slow client; more ends its request", low=1)
    prefill_peers: int = setting(2, "prefill workers named to decode, best first", low=1, high=8)
    max_resumptions: int = setting(3, "how often one answer goes on at another worker; 0: never", low=0, high=16)
    resumption_burst: int = setting(1024, "resumptions and retries at once, over all requests", low=1)
    resumptions_per_second: float = setting(20.0, "rate at which that budget fills again", low=0.01)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryConfig:
    mode: Literal["static", "dns", "kubernetes"] = setting(
        "static", "how the gateway finds workers: gateway.prefill and .decode, DNS names, or the pods of a namespace"
    )
    dns_names: tuple[str, ...] = setting((), "names whose addresses are the workers', host:port, comma separated")
    dns_seconds: float = setting(2.0, "how often names are resolved again", low=0.1)
    namespace: str = setting("", "namespace of the worker pods; empty: the gateway pod's own")
    selector: str = setting("app.kubernetes.io/part-of=tandem,llm-d.ai/role", "label selector of the worker pods")
    port_name: str = setting("grpc", "name of the container port that sessions go to")
    kubeconfig: str = setting("", "file with the API server's address and credentials; empty: the pod's own account")
    resync_seconds: float = setting(600.0, "how often the whole list is read again, whatever the watch said", low=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    certificate_file: str = setting("", "PEM chain that the gateway shows to its clients; empty: no TLS for them")
    key_file: str = setting("", "PEM key of that certificate")
    client_ca_file: str = setting("", "PEM authorities; clients must then show a certificate of one of them")
    peer_certificate_file: str = setting("", "PEM chain shown to the other pods; empty: no TLS between pods")
    peer_key_file: str = setting("", "PEM key of that certificate")
    peer_ca_file: str = setting("", "PEM authorities that the certificates of all pods come from")
    peer_name: str = setting("tandem", "DNS name that the certificate of every pod must carry")
    reload_seconds: float = setting(10.0, "how often the files are looked at for a change", low=0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig:
    vllm_metrics: bool = setting(False, "export the `vllm:` gauges of the Gateway API model-server contract as well")
    genai_metrics: bool = setting(False, "export the OpenTelemetry GenAI server metrics as well")
    otlp_endpoint: str = setting("", "OTLP/gRPC collector for traces, http://host:4317; empty: no traces")
    trace_ratio: float = setting(1.0, "share of requests without a trace of their own that get one", low=0.0, high=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    handoff: HandoffConfig = field(default_factory=HandoffConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
