"""Pages of mapped tensors: given back, and the same when they are read again."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tandem.engine.mapped import MappedFiles

ROWS = 4096


def resident_bytes(address: int) -> int:
    """Return the resident bytes of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(bound, 16) for bound in first.split("-"))
            inside = low <= address < high
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no mapping holds this address")


def test_forgotten_pages_are_given_back_and_come_again(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    values = torch.arange(ROWS * 1024, dtype=torch.float32).view(ROWS, 1024)
    save_file({"weight": values}, path)
    mapped = MappedFiles([path])
    with safe_open(path, framework="pt") as files:
        tensor = files.get_tensor("weight")
        assert torch.equal(tensor, values)
        assert resident_bytes(tensor.data_ptr()) > values.nbytes // 2
        assert mapped.forget(tensor)
        assert resident_bytes(tensor.data_ptr()) < values.nbytes // 10
        assert torch.equal(tensor, values)


def test_other_memory_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(4)}, path)
    ours = torch.arange(1 << 20)
    assert not MappedFiles([path]).forget(ours)
    assert torch.equal(ours, torch.arange(1 << 20))
