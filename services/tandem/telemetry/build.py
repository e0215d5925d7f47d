"""What a program is: its version and that of Python, as the info metric that every program exports."""

from __future__ import annotations

import platform
from importlib.metadata import version

from prometheus_client.core import InfoMetricFamily

from tandem.telemetry.table import BUILD_INFO


def build_family(program: str) -> InfoMetricFamily:
    """Return the info metric of `program`: gateway, prefill, decode or unified."""
    family = InfoMetricFamily(BUILD_INFO.name, BUILD_INFO.help, labels=BUILD_INFO.labels)
    family.add_metric([program, version("tandem-serve"), platform.python_version()], {})
    return family
