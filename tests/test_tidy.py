"""The repository checks itself: who may import whom, how long files and functions are, which names are banned."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "services" / "tandem"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
GENERATED = PACKAGE / "rpc" / "gen"
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}

# docs/architecture.md section 3: packages of ours that a package may import, and what it must never import.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "config_values": {"config", "errors"},
    "config_load": {"config", "config_values", "errors"},
    "certificates": {"config", "errors"},
    "ipc": set(),
    "collector": set(),
    "core": {"core", "errors", "config"},
    "transfer": {"transfer", "core", "config", "errors", "ipc", "certificates"},
    "engine": {"engine", "core", "transfer", "config", "errors", "demo"},
    "rpc": {"rpc", "core", "errors", "config", "certificates"},
    "telemetry": {"telemetry", "core", "config", "errors"},
    "worker": {
        "worker",
        "collector",
        "core",
        "engine",
        "transfer",
        "rpc",
        "telemetry",
        "config",
        "certificates",
        "errors",
        "ipc",
        "demo",
    },
    "gateway": {"gateway", "collector", "core", "rpc", "telemetry", "config", "certificates", "errors", "demo"},
    "demo": {"demo"},
    "cli": {
        "cli",
        "core",
        "engine",
        "certificates",
        "config",
        "config_load",
        "config_values",
        "errors",
        "rpc",
        "worker",
        "gateway",
        "demo",
        "transfer",
        "telemetry",
    },
}
CORE_PARTS = {  # what packages outside core's users may take from it
    "transfer": {"core.messages", "core.sharding"},
    "engine": {"core.messages", "core.sharding", "core.token_ids"},
    "rpc": {"core.messages", "core.stats", "core.token_ids"},
    "telemetry": {"core.stats", "core.messages"},
    "gateway": {"core.messages", "core.stats", "core.routing", "core.token_ids"},
}
PARTS = {  # of other packages
    ("engine", "transfer"): {"transfer.layout", "transfer.memory"},
    ("cli", "engine"): {"engine.native"},  # `tandem doctor` asks whether the operators were built; no torch there
}
NEVER = {
    "core": {"torch", "grpc", "asyncio", "threading", "time", "random", "os", "socket", "subprocess", "numpy"},
    "transfer": {"torch", "grpc"},
    "engine": {"grpc"},
    "rpc": {"torch"},
    "telemetry": {"torch", "grpc"},
    "worker": {"kubernetes"},
    "gateway": {"torch", "transformers"},
    "cli": {"torch", "transformers"},
}
ONLY_IN = {
    "mooncake": {"transfer/mooncake.py"},
    "kubernetes": {"gateway/discovery.py"},
    "opentelemetry": {"telemetry/otlp.py"},
}


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if GENERATED not in path.parents]


def all_sources() -> list[Path]:
    return modules() + sorted((ROOT / "tests").rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative import"
            yield node.module, node.lineno
            if node.module.startswith("tandem"):
                for alias in node.names:
                    yield f"{node.module}.{alias.name}", node.lineno


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def import_faults(path: Path) -> Iterator[str]:
    part = part_of(path)
    place = str(path.relative_to(PACKAGE))
    for name, line in imports(path):
        top, _, rest = name.partition(".")
        if top != "tandem":
            if top in NEVER.get(part, set()):
                yield f"{place}:{line} imports {name}"
            if top in ONLY_IN and place not in ONLY_IN[top]:
                yield f"{place}:{line} imports {name}, which only {ONLY_IN[top]} may"
            continue
        if not rest or part == "__init__":
            continue
        target = rest.split(".")[0]
        parts = PARTS.get((part, target))
        if target == "core":
            parts = CORE_PARTS.get(part)
        within = parts is None or rest == target or any(rest == one or rest.startswith(one + ".") for one in parts)
        if target not in ALLOWED.get(part, set()) or not within:
            yield f"{place}:{line} imports tandem.{rest}"


def test_import_rules() -> None:
    faults = [fault for path in modules() for fault in import_faults(path)]
    assert not faults, "\n".join(faults)


def test_core_imports_only_pure_standard_library() -> None:
    for path in (PACKAGE / "core").rglob("*.py"):
        for name, line in imports(path):
            top = name.split(".")[0]
            assert top == "tandem" or top in sys.stdlib_module_names, f"{path.name}:{line} imports {name}"


def test_sizes() -> None:
    faults = []
    for path in all_sources():
        text = path.read_text()
        if text.count("\n") > MAX_FILE_LINES:
            faults.append(f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    faults.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines")
    assert not faults, "\n".join(faults)


def test_names() -> None:
    for path in all_sources():
        assert path.stem not in BANNED_NAMES, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert "Manager" not in node.name, f"{path}: {node.name}"
                assert not node.name.startswith("Base"), f"{path}: {node.name}"


def test_every_module_says_what_it_is() -> None:
    for path in modules():
        if path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} has no docstring"


def test_environment_is_read_in_one_place() -> None:
    """Configuration has one door; a process may still pass its environment on to a child."""
    for path in modules():
        if part_of(path) in {"config_load", "cli"}:
            continue
        assert 'environ.get("TANDEM' not in path.read_text(), path


@pytest.mark.parametrize("word", ["pickle", "shelve", "marshal"])
def test_nothing_is_pickled(word: str) -> None:
    for path in modules():
        assert all(name.split(".")[0] != word for name, _ in imports(path)), f"{path} imports {word}"
