"""Generate services/tandem/rpc/gen from proto/: `python -m tandem.rpc.generate [--check]`.

protoc writes imports relative to the proto root, whose name is our package's; they are moved below tandem.rpc.gen.
Needs the `dev` extra. `--check` fails if what is committed is not what proto/ gives.
"""

from __future__ import annotations

import argparse
import filecmp
import re
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE = "tandem.rpc.gen"
REPOSITORY = Path(__file__).resolve().parents[3]
PROTO = REPOSITORY / "proto"
OUTPUT = Path(__file__).resolve().parent / "gen"
_IMPORT = re.compile(r"^(from|import) tandem\.", re.MULTILINE)
_USE = re.compile(r"(?<![\w./\"'])tandem\.(?=\w+\.v1\.)")


def generate(output: Path) -> None:
    """Run protoc into `output`, which must not exist."""
    import grpc_tools
    from grpc_tools import protoc

    output.mkdir(parents=True)
    include = Path(grpc_tools.__file__).parent / "_proto"
    googleapis = Path(sys.modules["grpc_tools"].__file__ or "").parent.parent
    names = [str(path.relative_to(PROTO)) for path in sorted(PROTO.rglob("*.proto"))]
    plugin = Path(sys.executable).parent
    arguments = [
        "protoc",
        f"--plugin=protoc-gen-mypy={plugin / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugin / 'protoc-gen-mypy_grpc'}",
        f"-I{PROTO}",
        f"-I{include}",
        f"-I{googleapis}",
        f"--python_out={output}",
        f"--grpc_python_out={output}",
        f"--mypy_out=quiet:{output}",
        f"--mypy_grpc_out=quiet:{output}",
        *names,
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed")
    _relocate(output)


def _relocate(output: Path) -> None:
    """Flatten output/tandem/AREA/v1 to output/AREA/v1, make packages, and repair the imports."""
    for area in sorted((output / "tandem").iterdir()):
        shutil.move(area, output / area.name)
    (output / "tandem").rmdir()
    for folder in [output, *(path for path in output.rglob("*") if path.is_dir())]:
        (folder / "__init__.py").touch()
    for path in [*output.rglob("*.py"), *output.rglob("*.pyi")]:
        text = _IMPORT.sub(rf"\1 {PACKAGE}.", path.read_text())
        if path.suffix == ".pyi":
            text = _USE.sub(f"{PACKAGE}.", text)
        path.write_text(text)


def _differences(fresh: Path) -> list[str]:
    names = sorted(
        str(path.relative_to(root)) for root in (fresh, OUTPUT) for path in root.rglob("*.py*") if path.suffix != ".pyc"
    )
    _, mismatch, errors = filecmp.cmpfiles(fresh, OUTPUT, sorted(set(names)), shallow=False)
    return mismatch + errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the generated code is stale")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "gen"
        generate(fresh)
        if check:
            stale = _differences(fresh)
            if stale:
                print("stale, run `python -m tandem.rpc.generate`:", *stale, sep="\n  ")
            return 1 if stale else 0
        shutil.rmtree(OUTPUT, ignore_errors=True)
        shutil.copytree(fresh, OUTPUT)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
