"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# An example that the machine keeps waiting has not failed. A test that hangs meets pytest's own time-out.
settings.register_profile("tandem", deadline=None)
settings.load_profile("tandem")
