"""Python's garbage collector, which stops every thread while it looks at all objects that there are.

A program that has started has some hundred thousand of them, most from imports, which it keeps to its end: looking at
them costs a rank 40 to 100 ms in the middle of its steps, and its frontend as much.
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
