"""Where settings come from, which one wins, and that every fault is told at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tandem.config import Config
from tandem.config_load import PROGRAM_SECTIONS, SHORT_FLAGS, load, to_dict, to_toml
from tandem.config_values import SETTINGS
from tandem.errors import ConfigError


def faults(*arguments: Any, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*arguments, **options)
    return caught.value.message.splitlines()


def test_defaults() -> None:
    assert load("prefill", [], {}) == Config()


def test_precedence_is_file_environment_flags(tmp_path: Path) -> None:
    file = tmp_path / "tandem.toml"
    file.write_text("[scheduler]\nbudget_tokens = 11\nmax_running_requests = 12\nmax_waiting_requests = 13\n")
    environ = {"TANDEM_SCHEDULER__BUDGET_TOKENS": "21", "TANDEM_SCHEDULER__MAX_RUNNING_REQUESTS": "22"}
    config = load("decode", ["--config", str(file), "--scheduler.budget-tokens", "31"], environ)
    assert config.scheduler.budget_tokens == 31
    assert config.scheduler.max_running_requests == 22
    assert config.scheduler.max_waiting_requests == 13
    assert config.scheduler.loop == "auto"


def test_json_file_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "tandem.json"
    file.write_text(json.dumps({"gateway": {"decode": ["a:1", "b:2"]}, "server": {"reflection": False}}))
    config = load("gateway", [], {"TANDEM_CONFIG": str(file)})
    assert config.gateway.decode == ("a:1", "b:2")
    assert config.server.reflection is False


def test_every_way_to_write_a_flag() -> None:
    config = load(
        "prefill",
        [
            *("--model", "/m", "--port=0", "--loop", "normal", "--transport=tcp"),
            *("--server.metrics-port", "-1", "--cache.prefix-cache=no", "--server.reflection"),
            *("--handoff.lease-seconds", "2.5"),
        ],
        {},
    )
    assert (config.model.path, config.scheduler.loop, config.transfer.transport) == ("/m", "normal", "tcp")
    assert (config.server.metrics_port, config.cache.prefix_cache, config.server.reflection) == (-1, False, True)
    assert config.handoff.lease_seconds == 2.5


def test_all_faults_are_told_together(tmp_path: Path) -> None:
    file = tmp_path / "tandem.toml"
    file.write_text('[model]\ndtype = "float31"\nthreads = "2"\n[schedule]\nloop = "normal"\n[server]\nprot = 1\n')
    told = faults(
        "prefill",
        [
            *("--config", str(file), "--scheduler.budgt-tokens", "4", "--server.port", "99999"),
            *("stray", "--cache.memory-fraction", "nan", "--cache.page-tokens", "--gateway.decode", "a:1"),
            *("--transfer.mooncake-port-min", "20000", "--cache.prefix-cache", "perhaps"),
        ],
        {"TANDEM_SCHEDULER__BUDGET": "5", "TANDEM_HANDOFF__LEASE_SECONDS": "0"},
    )
    text = "\n".join(told)
    for expected in (
        "model.dtype = 'float31'",
        "did you mean float32?",
        "model.threads = '2'",
        "schedule (",
        "did you mean scheduler?",
        "server.prot",
        "did you mean server.port?",
        "--scheduler.budgt-tokens: no such setting; did you mean --scheduler.budget-tokens?",
        "server.port = '99999' (flag --server.port): must be at most 65535",
        "'stray'",
        "cache.memory_fraction = 'nan'",
        "--cache.page-tokens needs a value",
        "not a setting of `tandem prefill`",
        "mooncake_port_min",
        "cache.prefix_cache = 'perhaps'",
        "TANDEM_SCHEDULER__BUDGET (environment)",
        "handoff.lease_seconds = '0'",
    ):
        assert expected in text, expected
    assert len(told) == 14


@pytest.mark.parametrize("text", ["[model\n", '"just a string"'])
def test_a_broken_file_is_a_fault(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tandem.json" if text.startswith('"') else tmp_path / "tandem.toml"
    file.write_text(text)
    assert len(faults("prefill", ["--config", str(file)], {})) == 1


def test_a_missing_file_is_a_fault(tmp_path: Path) -> None:
    assert "No such file" in faults("prefill", ["--config", str(tmp_path / "none.toml")], {})[0]


def test_variables_of_kubernetes_services_are_not_ours() -> None:
    environ = {"TANDEM_GATEWAY_PORT": "tcp://10.0.0.1:50051", "TANDEM_GATEWAY_SERVICE_HOST": "10.0.0.1"}
    assert load("prefill", [], environ) == Config()


def test_a_gateway_needs_workers_and_addresses_that_are_addresses() -> None:
    assert "gateway.decode" in faults("gateway", [], {})[0]
    assert faults("gateway", ["--gateway.decode", "a:1,b", "--gateway.prefill", "c:0"], {}) == [
        "gateway.prefill: 'c:0' is not host:port",
        "gateway.decode: 'b' is not host:port",
    ]
    assert load("gateway", ["--gateway.decode", " a:1, [::1]:2 "], {}).gateway.decode == ("a:1", "[::1]:2")


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--discovery.mode", "dns"], "discovery.dns_names: name the headless services"),
        (["--discovery.mode", "dns", "--discovery.dns-names", "decode"], "'decode' is not host:port"),
        (["--discovery.mode", "kubernetes", "--gateway.decode", "a:1"], "only with discovery.mode static"),
        (["--gateway.decode", "a:1", "--tls.key-file", "k"], "one without the other"),
        (["--gateway.decode", "a:1", "--tls.client-ca-file", "c"], "tls.client_ca_file: needs"),
        (["--gateway.decode", "a:1", "--tls.peer-ca-file", "c"], "all three or none"),
    ],
)
def test_discovery_and_tls_are_whole(flags: list[str], fault: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(fault)):
        load("gateway", flags, {})


def test_discovery_needs_no_addresses_where_it_finds_them() -> None:
    assert load("gateway", ["--discovery.mode", "kubernetes"], {}).discovery.mode == "kubernetes"


def test_a_worker_on_every_address_has_to_say_where_it_is_reached() -> None:
    assert "advertise_host" in faults("prefill", ["--host", "0.0.0.0"], {})[0]
    load("unified", ["--host", "0.0.0.0"], {})
    load("decode", ["--host", "0.0.0.0", "--server.advertise-host", "10.0.0.1"], {})


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_what_is_printed_can_be_read_again(tmp_path: Path, suffix: str) -> None:
    flags = ["--gateway.decode", "a:1,b:2", "--server.port", "7", "--model.path", 'with "quotes" \\ and ü']
    config = load("gateway", flags, {})
    file = tmp_path / f"tandem.{suffix}"
    file.write_text(json.dumps(to_dict(config)) if suffix == "json" else to_toml(config, "gateway"), encoding="utf-8")
    assert load("gateway", ["--config", str(file)], {}) == config


def test_every_default_is_within_its_own_bounds() -> None:
    for setting in SETTINGS.values():
        default = setting.field.default
        low, high = setting.field.metadata["low"], setting.field.metadata["high"]
        assert low is None or default >= low, setting.key
        assert high is None or default <= high, setting.key


def test_names_point_to_settings() -> None:
    assert set(SHORT_FLAGS.values()) <= set(SETTINGS)
    sections = {setting.section for setting in SETTINGS.values()}
    assert all(set(names) <= sections for names in PROGRAM_SECTIONS.values())


@pytest.mark.parametrize("endpoint", ["collector:4317", "ftp://a:1", "http://collector", "http://:4317", "http://a:b"])
def test_a_collector_needs_scheme_host_and_port(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"telemetry\.otlp_endpoint: .* is not http://host:port"):
        load("decode", ["--telemetry.otlp-endpoint", endpoint], {})
    assert load("decode", ["--telemetry.otlp-endpoint", "http://a:1"], {}).telemetry.otlp_endpoint == "http://a:1"


def test_devices_are_those_of_a_replica_or_of_all() -> None:
    sizes = ("--parallel.tensor-size", "2", "--parallel.data-size", "2")
    for devices in ("cpu,cpu", "cpu,cpu,cpu,cpu"):
        assert load("unified", [*sizes, "--parallel.devices", devices], {}).parallel.devices
    with pytest.raises(ConfigError, match=r"parallel.devices: 3 named, there are 2 ranks, or 4 for all replicas"):
        load("unified", [*sizes, "--parallel.devices", "cpu,cpu,cpu"], {})


def test_adapters_are_not_trained_where_there_are_several_replicas() -> None:
    assert load("unified", ["--server.admin", "true"], {}).server.admin
    with pytest.raises(ConfigError, match=r"server.admin: .* parallel.data_size must be 1"):
        load("unified", ["--server.admin", "true", "--parallel.data-size", "2"], {})
