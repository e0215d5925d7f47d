"""What two workers compare before they pair."""

from __future__ import annotations

from dataclasses import replace

from tandem.transfer.layout import KvLayout

WHOLE = KvLayout(num_pages=3, num_layers=6, num_kv_heads=4, page_tokens=16, head_dim=8, dtype="float32")


def test_the_fingerprint_is_of_the_whole_model() -> None:
    """Ranks of any sharding, with any number of pages, have one."""
    whole = WHOLE.fingerprint("digest", 6, 4)
    assert whole == "digest/float32/page-major-6x2x4x16x8/protocol-1"
    rank = replace(WHOLE, num_pages=9, num_layers=3, num_kv_heads=2)
    assert rank.fingerprint("digest", 6, 4) == whole
    for other in (replace(WHOLE, page_tokens=8), replace(WHOLE, head_dim=16), replace(WHOLE, dtype="bfloat16")):
        assert other.fingerprint("digest", 6, 4) != whole
    assert WHOLE.fingerprint("digest", 6, 2) != whole
    assert WHOLE.fingerprint("other", 6, 4) != whole
