"""Fills the configuration tree: defaults < file < environment < flags.

Reads what it is given and decides nothing about the machine. Every fault is collected, and all of them are raised as
one ConfigError, before any socket or device is touched. The words of `--help` live in cli/config_help.py.

- file: TOML or JSON, named by `--config FILE` or TANDEM_CONFIG; one table a section
- environment: TANDEM_SECTION__FIELD; variables without the double underscore are not ours (Kubernetes makes
  TANDEM_GATEWAY_PORT of a service named so)
- flags: --section.field-name VALUE, or the short form of SHORT_FLAGS
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from tandem.config import ADAPTER_NAME, Config, ParallelConfig, TlsConfig
from tandem.config_values import ENVIRONMENT_PREFIX, SETTINGS, convert, suggestion
from tandem.errors import ConfigError

Program = Literal["gateway", "prefill", "decode", "unified"]

FILE_VARIABLE = "TANDEM_CONFIG"
MAX_FILE_BYTES = 1 << 20

_WORKER_SECTIONS = (
    *("model", "scheduler", "parallel", "cache", "lora"),
    *("handoff", "transfer", "server", "tls", "telemetry"),
)
PROGRAM_SECTIONS: dict[Program, tuple[str, ...]] = {
    "gateway": ("model", "gateway", "discovery", "server", "tls", "telemetry"),
    "prefill": _WORKER_SECTIONS,
    "decode": _WORKER_SECTIONS,
    "unified": ("model", "scheduler", "parallel", "cache", "lora", "server", "tls", "telemetry"),
}
_WILDCARDS = ("0.0.0.0", "::", "")
SHORT_FLAGS = {
    "model": "model.path",
    "loop": "scheduler.loop",
    "transport": "transfer.transport",
    "host": "server.host",
    "port": "server.port",
}


@dataclass(frozen=True, slots=True)
class _Given:
    """A value as somebody wrote it. `typed`: it comes from a file and has a type; else it is text."""

    value: Any
    source: str
    typed: bool


def load(
    program: Program,
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Return the configuration of one program. `argv` has only flags of this module; `defaults` replaces defaults.

    Raises ConfigError with every fault, one a line.
    """
    faults: list[str] = []
    flags, file_name = _read_flags(program, argv, faults)
    given = {key: _Given(value, "built-in", True) for key, value in (defaults or {}).items()}
    given |= _read_file(file_name or environ.get(FILE_VARIABLE, ""), faults)
    given |= _read_environment(environ, faults)
    given |= flags
    values: dict[str, dict[str, Any]] = {}
    for key, item in given.items():
        setting = SETTINGS[key]
        try:
            value = convert(setting, item.value, typed=item.typed)
        except ValueError as error:
            faults.append(f"{key} = {item.value!r} ({item.source}): {error}")
        else:
            values.setdefault(setting.section, {})[setting.field.name] = value
    config = Config(**{name: cls(**values.get(name, {})) for name, cls in get_type_hints(Config).items()})
    faults += _check_together(program, config)
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the tree as plain values, in the form that a JSON file for `--config` has."""
    tree: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS.values():
        value = getattr(getattr(config, setting.section), setting.field.name)
        tree.setdefault(setting.section, {})[setting.field.name] = list(value) if isinstance(value, tuple) else value
    return tree


def to_toml(config: Config, program: Program) -> str:
    """Return the sections of a program as a TOML file for `--config`, with the help texts as comments."""
    tree, lines = to_dict(config), []
    for section in PROGRAM_SECTIONS[program]:
        lines.append(f"[{section}]")
        for name, value in tree[section].items():
            lines.append(f"# {SETTINGS[f'{section}.{name}'].field.metadata['help']}")
            lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
        lines.append("")
    return "\n".join(lines)


# ---- sources ------------------------------------------------------------------------------------------------------


def _read_flags(program: Program, argv: Sequence[str], faults: list[str]) -> tuple[dict[str, _Given], str]:
    given: dict[str, _Given] = {}
    file_name = ""
    for name, text in _split(argv, faults):
        if name == "config":
            file_name = text or ""
            if not file_name:
                faults.append("--config needs the name of a TOML or JSON file")
            continue
        key = SHORT_FLAGS.get(name, name.replace("-", "_"))
        if key not in SETTINGS:
            known = [*(setting.flag for setting in SETTINGS.values()), *(f"--{short}" for short in SHORT_FLAGS)]
            faults.append(f"--{name}: no such setting{suggestion('--' + name, known)}")
        elif SETTINGS[key].section not in PROGRAM_SECTIONS[program]:
            faults.append(f"--{name}: not a setting of `tandem {program}`; its sections are {_sections(program)}")
        elif text is None and SETTINGS[key].type is not bool:
            faults.append(f"--{name} needs a value")
        else:
            given[key] = _Given("true" if text is None else text, f"flag --{name}", False)
    return given, file_name


def _split(argv: Sequence[str], faults: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (flag name, its text or None). A value is anything that does not begin with two dashes."""
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--"):
            faults.append(f"{word!r}: not expected here; settings are written --section.field-name VALUE")
            continue
        name, equals, text = word[2:].partition("=")
        if equals:
            yield name, text
        elif position < len(argv) and not argv[position].startswith("--"):
            position += 1
            yield name, argv[position - 1]
        else:
            yield name, None


def _read_file(name: str, faults: list[str]) -> dict[str, _Given]:
    if not name:
        return {}
    path = Path(name)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        faults.append(f"{name}: {error.strerror or error}")
        return {}
    except ValueError as error:
        faults.append(f"{name}: {error}")
        return {}
    if not isinstance(tree, dict):
        faults.append(f"{name}: must be a table of sections")
        return {}
    return _flatten(tree, name, faults)


def _flatten(tree: Mapping[str, Any], name: str, faults: list[str]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    sections = [item.name for item in fields(Config)]
    for section, table in tree.items():
        if section not in sections:
            faults.append(f"{section} ({name}): no such section{suggestion(section, sections)}")
        elif not isinstance(table, dict):
            faults.append(f"{section} ({name}): must be a table")
        else:
            for field_name, value in table.items():
                key = f"{section}.{field_name}"
                if key in SETTINGS:
                    given[key] = _Given(value, name, True)
                else:
                    faults.append(f"{key} ({name}): no such setting{suggestion(key, SETTINGS)}")
    return given


def _read_environment(environ: Mapping[str, str], faults: list[str]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    variables = {setting.variable: key for key, setting in SETTINGS.items()}
    for name, text in sorted(environ.items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or "__" not in name:
            continue
        if name in variables:
            given[variables[name]] = _Given(text, f"environment {name}", False)
        else:
            faults.append(f"{name} (environment): no such setting{suggestion(name, variables)}")
    return given


# ---- faults -------------------------------------------------------------------------------------------------------


def _check_together(program: Program, config: Config) -> list[str]:
    """Return the faults of values that are right alone and wrong together."""
    faults = []
    if config.transfer.mooncake_port_min > config.transfer.mooncake_port_max:
        faults.append("transfer.mooncake_port_min: must not be above transfer.mooncake_port_max")
    for key, addresses in (("prefill", config.gateway.prefill), ("decode", config.gateway.decode)):
        faults += [f"gateway.{key}: {a!r} is not host:port" for a in addresses if not _is_address(a)]
    if program == "gateway":
        faults += _check_discovery(config)
    faults += _check_parallel(config)
    faults += _check_adapters(config)
    faults += _check_tls(config.tls)
    endpoint = config.telemetry.otlp_endpoint
    if endpoint and not _is_endpoint(endpoint):
        faults.append(f"telemetry.otlp_endpoint: {endpoint!r} is not http://host:port or https://host:port")
    if program in ("prefill", "decode") and config.server.host in _WILDCARDS and not config.server.advertise_host:
        faults.append(f"server.advertise_host: say where others reach this worker; server.host is {config.server.host}")
    return faults


def _check_discovery(config: Config) -> list[str]:
    discovery, gateway = config.discovery, config.gateway
    if discovery.mode == "static":
        return [] if gateway.decode else ["gateway.decode: name at least one decode or unified worker, host:port"]
    faults = []
    if gateway.prefill or gateway.decode:
        faults.append(f"gateway.prefill, gateway.decode: only with discovery.mode static, which is {discovery.mode}")
    if discovery.mode == "dns":
        if not discovery.dns_names:
            faults.append("discovery.dns_names: name the headless services of the workers, host:port")
        faults += [
            f"discovery.dns_names: {name!r} is not host:port" for name in discovery.dns_names if not _is_address(name)
        ]
    return faults


def _check_parallel(config: Config) -> list[str]:
    parallel = config.parallel
    faults = _check_remote_ranks(parallel) + _check_devices(parallel)
    if parallel.tensor_size % parallel.expert_size:
        faults.append(
            f"parallel.expert_size: {parallel.expert_size} does not divide parallel.tensor_size "
            f"{parallel.tensor_size}: experts are spread over tensor ranks"
        )
    if config.server.admin and parallel.data_size > 1:
        faults.append("server.admin: adapters are trained and loaded in one replica; parallel.data_size must be 1")
    stages = parallel.pipeline_size
    if config.scheduler.loop == "overlap" and stages > 1:
        faults += [
            f"scheduler.loop: overlap cannot run with parallel.pipeline_size {stages}: a stage has no last token to go"
            " on from until the plan before has left the last stage; leave it at auto, which is pipelined then"
        ]
    return faults


def _check_devices(parallel: ParallelConfig) -> list[str]:
    """Devices are named for the ranks of one replica, which all share, or of every one."""
    num_ranks = parallel.tensor_size * parallel.pipeline_size
    named = len(parallel.devices)
    if named in (0, num_ranks, num_ranks * parallel.data_size):
        return []
    of_all = f", or {num_ranks * parallel.data_size} for all replicas" if parallel.data_size > 1 else ""
    return [f"parallel.devices: {named} named, there are {num_ranks} ranks{of_all}"]


def _check_remote_ranks(parallel: ParallelConfig) -> list[str]:
    """Ranks on several hosts find each other by an address and a secret."""
    if not parallel.remote_ranks and not parallel.rank:
        return []
    faults = []
    num_ranks = parallel.tensor_size * parallel.pipeline_size
    if parallel.rank and parallel.remote_ranks:
        faults.append("parallel.rank, parallel.remote_ranks: the latter is for rank 0 to know")
    if not parallel.rank and parallel.remote_ranks >= num_ranks:
        faults.append(f"parallel.remote_ranks: {parallel.remote_ranks} of {num_ranks} ranks; rank 0 is always here")
    if parallel.data_size > 1:
        faults.append("parallel.data_size: 1 replica only, where ranks are started elsewhere")
    if not _is_address(parallel.rendezvous):
        faults.append(f"parallel.rendezvous: {parallel.rendezvous!r} is not host:port")
    elif parallel.rendezvous.rpartition(":")[0] in _WILDCARDS and not parallel.host:
        faults.append(f"parallel.host: say where other ranks reach this host; rendezvous is {parallel.rendezvous}")
    if not parallel.token_file:
        faults.append("parallel.token_file: ranks that are started elsewhere prove themselves by a shared secret")
    if not parallel.trusted_network:
        faults.append("parallel.trusted_network: tensors travel bare to ranks elsewhere; say that nobody else is there")
    return faults


def _check_adapters(config: Config) -> list[str]:
    names, faults = [], []
    for entry in config.model.adapters:
        name, separator, folder = entry.partition("=")
        if not separator or not folder or not ADAPTER_NAME.fullmatch(name):
            faults.append(f"model.adapters: {entry!r} is not name=folder, the name of letters, digits and ._-")
        names.append(name)
    faults += [f"model.adapters: {name} is there twice" for name in sorted({n for n in names if names.count(n) > 1})]
    if len(names) > config.lora.max_adapters:
        faults.append(f"model.adapters: {len(names)} adapters, lora.max_adapters is {config.lora.max_adapters}")
    parallel = config.parallel
    for size_name in ("tensor_size", "pipeline_size", "expert_size") if names else ():
        if getattr(parallel, size_name) > 1:
            faults.append(f"model.adapters: not with parallel.{size_name} {getattr(parallel, size_name)}, only with 1")
    return faults


def _check_tls(tls: TlsConfig) -> list[str]:
    faults = []
    if bool(tls.certificate_file) != bool(tls.key_file):
        faults.append("tls.certificate_file, tls.key_file: one without the other")
    if tls.client_ca_file and not tls.certificate_file:
        faults.append("tls.client_ca_file: needs tls.certificate_file and tls.key_file")
    peer = (tls.peer_certificate_file, tls.peer_key_file, tls.peer_ca_file)
    if any(peer) and not all(peer):
        faults.append("tls.peer_certificate_file, tls.peer_key_file, tls.peer_ca_file: all three or none")
    return faults


def _is_endpoint(text: str) -> bool:
    scheme, separator, address = text.partition("://")
    return scheme in ("http", "https") and bool(separator) and _is_address(address)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 65536


def _sections(program: Program) -> str:
    return ", ".join(PROGRAM_SECTIONS[program])
