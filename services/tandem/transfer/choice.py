"""Which transports a worker offers, and why not others. Decided before anything starts, from configuration and host."""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from tandem.config import TransferConfig
from tandem.errors import ConfigError

TCP = "tcp"
MOONCAKE_RDMA = "mooncake-rdma"
MOONCAKE_TCP = "mooncake-tcp"
RDMA_DEVICES = Path("/sys/class/infiniband")
_KEY_BYTES_MIN = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """`one_sided` is tried first, "" if none; `with_tcp` says whether plain TCP is offered (too). `notes`: why."""

    one_sided: str
    with_tcp: bool
    notes: tuple[str, ...] = ()


def check_transport(config: TransferConfig, rdma_devices: Path = RDMA_DEVICES) -> None:
    """Raise ConfigError, with every fault, for a transport that was asked for and cannot be had on this host."""
    faults = []
    wanted = config.transport
    if wanted in (MOONCAKE_RDMA, MOONCAKE_TCP) and not config.trusted_network:
        faults.append(
            f"transfer.transport {wanted} needs transfer.trusted_network: Mooncake has no authentication, "
            "and registered memory is writable by everybody who can connect"
        )
    if wanted == MOONCAKE_RDMA and not devices(config, rdma_devices):
        faults.append(f"transfer.transport {wanted} needs an RDMA device, and {_absence(config, rdma_devices)}")
    if wanted in (MOONCAKE_RDMA, MOONCAKE_TCP) and config.strict and (reason := mooncake_absence()):
        faults.append(f"transfer.transport {wanted} with transfer.strict: {reason}")
    try:
        shared_key(config)
    except ConfigError as error:
        faults.append(error.message)
    if faults:
        raise ConfigError("\n".join(faults))


def choose(config: TransferConfig, rdma_devices: Path = RDMA_DEVICES) -> Choice:
    """Say what to offer. Call `check_transport` first."""
    if config.transport == "tcp":
        return Choice("", True)
    if config.transport != "auto":
        return Choice(config.transport, not config.strict)
    reasons = []
    if not devices(config, rdma_devices):
        reasons.append(_absence(config, rdma_devices))
    if not config.trusted_network:
        reasons.append("transfer.trusted_network is not set")
    if reasons:
        return Choice("", True, (f"plain TCP, not {MOONCAKE_RDMA}: {', '.join(reasons)}",))
    return Choice(MOONCAKE_RDMA, True, (f"{MOONCAKE_RDMA}: RDMA devices {', '.join(devices(config, rdma_devices))}",))


def devices(config: TransferConfig, rdma_devices: Path = RDMA_DEVICES) -> list[str]:
    """Return the RDMA devices that are there and allowed."""
    present = sorted(entry.name for entry in rdma_devices.iterdir()) if rdma_devices.is_dir() else []
    allowed = [name.strip() for name in config.mooncake_devices.split(",") if name.strip()]
    return [name for name in present if not allowed or name in allowed]


def mooncake_absence() -> str:
    """Return why Mooncake cannot be loaded, "" if nothing speaks against it. Does not load it."""
    if importlib.util.find_spec("mooncake") is None:
        return "the Mooncake wheel is not installed"
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        return "libibverbs.so.1 is missing (apt-get install libibverbs1)"
    return ""


def shared_key(config: TransferConfig) -> bytes | None:
    """Read the key of the HMAC challenge, None if there is none. Raises ConfigError."""
    if not config.shared_key_file:
        return None
    try:
        key = Path(config.shared_key_file).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"transfer.shared_key_file: {error}") from error
    if len(key) < _KEY_BYTES_MIN:
        raise ConfigError(f"transfer.shared_key_file holds {len(key)} bytes, {_KEY_BYTES_MIN} are the least")
    return key


def _absence(config: TransferConfig, rdma_devices: Path) -> str:
    if config.mooncake_devices:
        return f"none of {config.mooncake_devices} is in {rdma_devices}"
    return f"no RDMA device is in {rdma_devices}"
