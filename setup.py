"""Builds the C++ operators beside the package; everything else is in pyproject.toml.

Without a compiler the package still installs: it then says what it lost, here and when an engine starts.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "native"))
from build import BuildFailed, build

FOLDER = Path("tandem") / "engine" / "native"
LIBRARY, NOTE = "libtandem_operators.so", "not_built.txt"


class BuildOperators(build_ext):
    """Runs native/build.py. The library is loaded by its path, so its name says nothing about a Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(FOLDER / LIBRARY) if "." in fullname else LIBRARY

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        note = library.with_name(NOTE)
        note.unlink(missing_ok=True)
        try:
            build(library, Path(self.build_temp) / "operators")
        except BuildFailed as failure:
            library.unlink(missing_ok=True)
            library.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{failure}\n")
            self.warn(f"the C++ operators were not built, the slower `reference` ones will run: {failure}")

    def copy_extensions_to_source(self) -> None:
        """For an editable install: bring the library, or the note that it is missing, into the source tree."""
        super().copy_extensions_to_source()
        source = Path(self.get_finalized_command("build_py").get_package_dir(".".join(FOLDER.parts)))
        built = Path(self.build_lib) / FOLDER
        for name in (LIBRARY, NOTE):
            if not (built / name).is_file():
                (source / name).unlink(missing_ok=True)
        if (built / NOTE).is_file():
            shutil.copyfile(built / NOTE, source / NOTE)


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 of this platform: the library is no Python extension."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


SOURCES = sorted(str(path) for path in Path("native").glob("*.cpp"))
HEADERS = sorted(str(path) for pattern in ("*.hpp", "*.py") for path in Path("native").glob(pattern))

setup(
    ext_modules=[Extension("tandem.engine.native.operators", SOURCES, depends=HEADERS, optional=True)],
    cmdclass={"build_ext": BuildOperators, "bdist_wheel": PlatformWheel},
)
