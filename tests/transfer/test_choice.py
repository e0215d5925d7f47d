"""Which transport is offered, and when a worker refuses to start."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.config import TransferConfig
from tandem.errors import ConfigError
from tandem.transfer import choice
from tandem.transfer.choice import check_transport, choose, devices, shared_key


@pytest.fixture
def rdma(tmp_path: Path) -> Path:
    (tmp_path / "mlx5_0").mkdir()
    (tmp_path / "mlx5_1").mkdir()
    return tmp_path


NONE = Path("/nonexistent")


def test_auto_without_a_device_is_tcp_and_says_why() -> None:
    chosen = choose(TransferConfig(trusted_network=True), NONE)
    assert (chosen.one_sided, chosen.with_tcp) == ("", True)
    assert "no RDMA device" in chosen.notes[0]


def test_auto_on_an_untrusted_network_is_tcp_and_says_why(rdma: Path) -> None:
    chosen = choose(TransferConfig(), rdma)
    assert (chosen.one_sided, chosen.with_tcp) == ("", True)
    assert "trusted_network" in chosen.notes[0]


def test_auto_with_a_device_that_is_trusted_is_rdma_and_tcp(rdma: Path) -> None:
    chosen = choose(TransferConfig(trusted_network=True), rdma)
    assert (chosen.one_sided, chosen.with_tcp) == ("mooncake-rdma", True)
    assert "mlx5_0" in chosen.notes[0]
    check_transport(TransferConfig(trusted_network=True), rdma)


@pytest.mark.parametrize(("strict", "with_tcp"), [(False, True), (True, False)])
def test_strict_keeps_tcp_away(strict: bool, with_tcp: bool) -> None:
    config = TransferConfig(transport="mooncake-tcp", trusted_network=True, strict=strict)
    assert choose(config).with_tcp is with_tcp


def test_tcp_is_tcp(rdma: Path) -> None:
    assert choose(TransferConfig(transport="tcp", trusted_network=True), rdma).one_sided == ""


def test_devices_can_be_named(rdma: Path) -> None:
    assert devices(TransferConfig(mooncake_devices="mlx5_1, mlx5_7"), rdma) == ["mlx5_1"]


def test_rdma_without_a_device_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="no RDMA device"):
        check_transport(TransferConfig(transport="mooncake-rdma", trusted_network=True), NONE)


def test_rdma_without_the_named_device_is_refused(rdma: Path) -> None:
    config = TransferConfig(transport="mooncake-rdma", trusted_network=True, mooncake_devices="mlx5_9")
    with pytest.raises(ConfigError, match="mlx5_9"):
        check_transport(config, rdma)


@pytest.mark.parametrize("transport", ["mooncake-rdma", "mooncake-tcp"])
def test_mooncake_on_an_untrusted_network_is_refused(transport: str, rdma: Path) -> None:
    with pytest.raises(ConfigError, match="trusted_network"):
        check_transport(TransferConfig(transport=transport), rdma)  # type: ignore[arg-type]


def test_all_faults_are_reported_at_once() -> None:
    config = TransferConfig(transport="mooncake-rdma", shared_key_file="/nonexistent/key")
    with pytest.raises(ConfigError) as caught:
        check_transport(config, NONE)
    assert len(caught.value.message.splitlines()) == 3


def test_strict_without_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "mooncake_absence", lambda: "libibverbs.so.1 is missing")
    config = TransferConfig(transport="mooncake-tcp", trusted_network=True)
    check_transport(config)  # falls back, visibly
    with pytest.raises(ConfigError, match="libibverbs"):
        check_transport(TransferConfig(transport="mooncake-tcp", trusted_network=True, strict=True))


@pytest.mark.parametrize("config", [TransferConfig(), TransferConfig(transport="tcp")])
def test_the_defaults_need_nothing(config: TransferConfig) -> None:
    check_transport(config, NONE)


def test_a_key_is_read_and_has_a_least_length(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"0123456789abcdef\n")
    assert shared_key(TransferConfig(shared_key_file=str(file))) == b"0123456789abcdef"
    file.write_bytes(b"short\n")
    with pytest.raises(ConfigError, match="16 are the least"):
        shared_key(TransferConfig(shared_key_file=str(file)))
    assert shared_key(TransferConfig()) is None
