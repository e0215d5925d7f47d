"""Python's garbage collector, which stops every thread while it looks at all objects that there are.

A program that has started has tens of thousands of them, a rank 180,000, most from imports, and keeps them to its end:
looking at them would stop a rank for 74 ms in the middle of its steps (docs/performance.md).
"""

from __future__ import annotations

import gc


def keep_what_is_here() -> None:
    """Clear away what nobody needs any more, and have later collections look at newer objects only.

    Call it when a program is ready. What is there then is never looked at again, so a cycle of it that becomes garbage
    is not freed.
    """
    gc.collect()
    gc.freeze()
