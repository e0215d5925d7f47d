"""Loads the C++ operators library and declares its functions. It knows pointers and sizes, no torch.

Every call releases the GIL. Callers vouch for shapes; a function that returns a status gives 0 for success.
"""

from __future__ import annotations

import ctypes
import platform
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

INTERFACE_VERSION = 5  # raised with every change of a function or a structure below
LIBRARY_PATH = Path(__file__).parent / "libtandem_operators.so"
NOTE_PATH = Path(__file__).parent / "not_built.txt"  # written by setup.py instead of the library
FLOAT32, BFLOAT16 = 0, 1
# `Kind` of native/pool.hpp, in its order.
PROFILE_KINDS = (
    "packing of inputs",
    "linear",
    "output head",
    "norm",
    "rope and store",
    "attention",
    "merge",
    "experts",
    "embedding",
    "other",
)


class NativeUnavailable(Exception):
    """There is no library, or not the one that this package needs; the message says why and what to do."""


class LinearFields(Structure):
    """`TandemLinear` of native/interface.cpp."""

    _fields_ = [
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int64),
        ("depth", c_int64),
        ("element", c_int32),
        ("gated", c_int32),
    ]


class PlanFields(Structure):
    """`TandemPlan` of native/interface.cpp."""

    _fields_ = [
        ("num_rows", c_int64),
        ("offsets", c_void_p),
        ("starts", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("page_table", c_void_p),
        ("page_table_stride", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("pool", c_void_p),
        ("pool_element", c_int32),
        ("attention_factor", c_float),
        ("num_layers", c_int64),
        ("page_tokens", c_int64),
        ("frequencies", c_void_p),
    ]


class ExpertsFields(Structure):
    """`TandemExperts` of native/interface.cpp."""

    _fields_ = [
        ("router", LinearFields),
        ("gate_up", LinearFields),
        ("down", LinearFields),
        ("first", c_int64),
        ("count", c_int64),
        ("per_row", c_int64),
        ("normalized", c_int32),
    ]


class LayerFields(Structure):
    """`TandemLayer` of native/interface.cpp."""

    _fields_ = [
        ("input_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("middle_norm", c_void_p),
        ("qkv", LinearFields),
        ("output", LinearFields),
        ("gate_up", LinearFields),
        ("down", LinearFields),
        ("experts", POINTER(ExpertsFields)),
        ("window", c_int64),
        ("epsilon", c_float),
        ("head_epsilon", c_float),
    ]


_LINEAR, _PLAN = POINTER(LinearFields), POINTER(PlanFields)
_FUNCTIONS = {
    "tandem_supports": (c_int32, [c_char_p]),
    "tandem_create": (c_void_p, [c_char_p, c_int32, c_int64]),
    "tandem_destroy": (None, [c_void_p]),
    "tandem_workspace_bytes": (c_int64, [c_void_p]),
    "tandem_allocate": (c_void_p, [c_int64]),
    "tandem_release": (None, [c_void_p, c_int64]),
    "tandem_packed_bytes": (c_int64, [_LINEAR]),
    "tandem_pack": (c_int32, [c_void_p, _LINEAR, c_void_p, c_void_p, c_int64]),
    "tandem_unpack": (c_int32, [c_void_p, _LINEAR, c_void_p, c_void_p, c_int64]),
    "tandem_linear": (
        c_int32,
        [c_void_p, _LINEAR, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int32, c_int32],
    ),
    "tandem_experts": (
        c_int32,
        [c_void_p, POINTER(ExpertsFields), c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int32],
    ),
    "tandem_rms_norm": (
        c_int32,
        [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_float, c_void_p],
    ),
    "tandem_gate": (c_int32, [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p]),
    "tandem_embedding": (
        c_int32,
        [c_void_p, c_void_p, c_int32, _LINEAR, c_int64, c_int64, c_int64, c_void_p, c_void_p],
    ),
    "tandem_begin": (c_void_p, [c_void_p, _PLAN]),
    "tandem_end": (None, [c_void_p]),
    "tandem_rope_and_store": (
        c_int32,
        [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_float, c_void_p],
    ),
    "tandem_attend": (c_int32, [c_void_p, c_int64, c_int64, c_void_p, c_void_p]),
    "tandem_layers": (c_int32, [c_void_p, POINTER(LayerFields), c_int64, c_int64, c_void_p]),
    "tandem_set_profiling": (None, [c_void_p, c_int32]),
    "tandem_take_profile": (c_int32, [c_void_p, c_int64, c_void_p]),
    "tandem_read_rate": (c_double, [c_void_p, c_void_p, c_int64]),
    "tandem_multiply_rate": (c_double, [c_void_p, c_int64, c_int32]),
}


def load_library(path: Path = LIBRARY_PATH) -> ctypes.CDLL:
    """Load the operators library; raises NativeUnavailable that says what is missing and why."""
    if not path.is_file():
        if path == LIBRARY_PATH and NOTE_PATH.is_file():
            raise NativeUnavailable(f"it was not built when the package was installed: {NOTE_PATH.read_text().strip()}")
        raise NativeUnavailable(f"{path} is not there (kernels exist for x86-64; this is {platform.machine()})")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"it cannot be loaded: {error}") from error
    version = library.tandem_interface_version()
    lacking = [name for name in _FUNCTIONS if not hasattr(library, name)]
    if version != INTERFACE_VERSION or lacking:
        found = f"interface {version}" + (f" without {', '.join(lacking)}" if lacking else "")
        raise NativeUnavailable(
            f"{path} has {found}, this package needs {INTERFACE_VERSION}: install the package again"
        )
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library
