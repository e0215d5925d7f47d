"""`tandem doctor`: what this machine has, what is lost without the rest, and the command that brings it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tandem.config import TransferConfig
from tandem.engine.native.library import NativeUnavailable, load_library
from tandem.transfer.choice import devices, mooncake_absence
from tandem.transfer.huge_pages import HUGE_PAGE_BYTES, advice_is_heeded, free_huge_pages, shmem_choice

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_COMFORTABLE_BYTES = 2 << 30
_GPUS = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. `level`: "ok", "lost" (something optional is missing) or "broken" (no worker runs without it)."""

    level: str
    name: str
    text: str


def report() -> tuple[list[str], int]:
    """Return the lines to print and the exit code: 1 if no worker can run here."""
    findings = [check() for check in _CHECKS]
    lines = [f"{finding.level:<7} {finding.name:<14} {finding.text}" for finding in findings]
    broken = any(finding.level == "broken" for finding in findings)
    lost = sum(finding.level == "lost" for finding in findings)
    lines += ["", "No worker runs here." if broken else f"Tandem runs here; {lost} optional parts are missing."]
    return lines, int(broken)


def _python() -> Finding:
    return Finding("ok", "python", f"{platform.python_version()} at {sys.executable}")


def _torch() -> Finding:
    try:
        return Finding("ok", "torch", importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "broken",
            "torch",
            "not installed: only the gateway runs here; pip install 'tandem-serve[cpu]' brings workers",
        )


def _verbs() -> Finding:
    absence = mooncake_absence()
    if "libibverbs" in absence:
        sudo = "" if os.geteuid() == 0 else "sudo "
        return Finding(
            "lost",
            "libibverbs1",
            f"missing: no Mooncake, so no RDMA; plain TCP works. {sudo}apt-get install -y libibverbs1",
        )
    return Finding("ok", "libibverbs1", "there" if not absence else "not looked for without Mooncake")


def _mooncake() -> Finding:
    absence = mooncake_absence()
    if absence:
        advice = "" if "libibverbs" in absence else "; pip install 'tandem-serve[cpu]' brings it"
        return Finding("lost", "mooncake", f"{absence}: no RDMA, plain TCP works{advice}")
    for package in ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine"):
        try:
            return Finding("ok", "mooncake", f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return Finding("ok", "mooncake", "there")


def _rdma() -> Finding:
    found = devices(TransferConfig(), Path("/sys/class/infiniband"))
    if found:
        return Finding("ok", "RDMA", ", ".join(found) + "; used by `auto` if transfer.trusted_network is set")
    return Finding("lost", "RDMA", "no device: KV pages travel over plain TCP")


def _cpu() -> Finding:
    flags: set[str] = set()
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            break
    found = [flag for flag in _CPU_FLAGS if flag in flags]
    text = f"{len(os.sched_getaffinity(0))} CPUs, {' '.join(found) or platform.machine()}"
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return Finding("ok", "CPU", text)
    return Finding("ok", "CPU", text + "; no bf16 instructions, bf16 weights are widened as they are used")


def _ranks() -> Finding:
    """How large parallel.* may usefully be: a rank computes on a GPU of its own, or on a CPU of its own."""
    num_gpus = len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0
    kind, count = ("GPUs", num_gpus) if num_gpus else ("CPUs", len(os.sched_getaffinity(0)))
    text = f"{count} {kind}: so many ranks compute side by side (tensor x pipeline x data size, over all workers here)"
    return Finding("ok", "ranks", text)


def _operators() -> Finding:
    try:
        load_library()
    except NativeUnavailable as missing:
        return Finding("lost", "operators", f"no C++ kernels, the plain ones are several times slower: {missing}")
    return Finding("ok", "operators", "C++ kernels are built; a worker's log says which of them it uses")


def _memory() -> Finding:
    values = {line.partition(":")[0]: line for line in _read("/proc/meminfo").splitlines()}
    available = int(values.get("MemAvailable", "x: 0 kB").split()[1]) * 1024
    text = f"{available / 1e9:.1f} GB available"
    if available < _COMFORTABLE_BYTES:
        return Finding("lost", "memory", text + ": small models only; cache.pool_bytes makes the KV pool smaller")
    return Finding("ok", "memory", text)


def _huge_pages(root: Path = Path("/")) -> Finding:
    """What KV pools lie in, by cache.huge_pages: auto."""
    free, choice = free_huge_pages(root), shmem_choice(root) or "not there"
    if free:
        size = free * HUGE_PAGE_BYTES / 1e9
        return Finding("ok", "huge-pages", f"{free} of 2 MB are reserved and free, for KV pools of {size:.1f} GB")
    text = f"none of 2 MB is reserved and free, shmem_enabled is {choice}: KV pools lie in "
    if advice_is_heeded(root):
        return Finding("ok", "huge-pages", text + "transparent ones where the kernel has some; see docs/performance.md")
    advice = "sysctl -w vm.nr_hugepages=512 (1 GB), or echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"
    return Finding(
        "lost", "huge-pages", f"{text}ordinary ones, attention to long contexts is slower. As root: {advice}"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


_CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _torch,
    _cpu,
    _ranks,
    _operators,
    _memory,
    _huge_pages,
    _verbs,
    _mooncake,
    _rdma,
)
