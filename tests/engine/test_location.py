"""Where a checkpoint comes from: a folder, the demo, or the hub's local cache."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from tandem.config import ModelConfig
from tandem.demo import model_path
from tandem.engine import location
from tandem.engine.location import locate_checkpoint
from tandem.errors import ConfigError

tqdm_module = importlib.import_module("huggingface_hub.utils.tqdm")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def locate(path: Path | str, revision: str = "", progress: Callable[[str], None] = lambda _: None) -> Any:
    return locate_checkpoint(ModelConfig(path=str(path), revision=revision), progress)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model in it, and no network."""
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    references = tmp_path / "models--someone--tiny" / "refs"
    references.mkdir()
    (references / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def no_network(*_: object) -> None:
        raise AssertionError("offline means no connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    return tmp_path


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        locate(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    found = locate(tmp_path)
    assert (found.folder, found.revision) == (tmp_path, "")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert locate("~/model").folder == tmp_path / "model"


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "a/b/c", "~/none", "", "white space"])
def test_no_such_folder(path: str) -> None:
    with pytest.raises(ConfigError, match=r"no such folder|holds no config"):
        locate(path)


def test_demo() -> None:
    assert locate("demo").folder == model_path()


@pytest.mark.parametrize("revision", ["", "main", COMMIT])
def test_hub_id_in_the_cache(hub_cache: Path, revision: str) -> None:
    lines: list[str] = []
    found = locate("someone/tiny", revision, lines.append)
    assert found.folder == hub_cache / "models--someone--tiny" / "snapshots" / COMMIT
    assert found.revision == COMMIT
    assert "someone/tiny" in lines[0]


@pytest.mark.parametrize(("path", "revision"), [("someone/other", ""), ("someone/tiny", "v2")])
@pytest.mark.usefixtures("hub_cache")
def test_hub_id_that_is_not_there(path: str, revision: str) -> None:
    with pytest.raises(ConfigError, match=f"{path} is no folder here, and it cannot be had"):
        locate(path, revision)


def test_download_progress_is_text(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The bar class that the hub's library drives: bytes as text, now and then, and nothing on the terminal."""
    lines: list[str] = []
    now = 100.0
    monkeypatch.setattr(location, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(tqdm_module, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    make_bar = location._progress_bar("someone/tiny", lines.append)
    for unit, total in (("B", 400_000_000), ("it", 4)):
        bar = make_bar(total=total, unit=unit, mininterval=0, miniters=1, desc="Downloading", name="any", disable=None)
        for _ in range(4):
            bar.update(total // 4)
            now += 1.5
        bar.close()
    name = "downloading someone/tiny"
    assert lines == [
        f"{name}: 100 of 400 MB",
        f"{name}: 300 of 400 MB",
        f"{name}: 400 of 400 MB",
        f"{name}: 1 of 4 files",
        f"{name}: 3 of 4 files",
        f"{name}: 4 of 4 files",
    ]
    assert capfd.readouterr() == ("", "")
