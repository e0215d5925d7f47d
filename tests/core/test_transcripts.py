"""Golden transcripts: what both schedulers hear, plan and say in a few scenes, line by line.

A transcript is a text file: `# ` comments, `> ` commands (the methods of `Pair`), and below each command what came of
it. TANDEM_REWRITE_TRANSCRIPTS=1 writes the files anew; look at the difference before you keep it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.core.pair import Pair

FOLDER = Path(__file__).parent / "transcripts"
REWRITE = os.environ.get("TANDEM_REWRITE_TRANSCRIPTS") == "1"
SCENES = sorted(FOLDER.glob("*.txt"))


def perform(script: str) -> str:
    """Run the commands of a transcript; return the transcript with what came of them."""
    pair, lines = Pair(), []
    for line in script.splitlines():
        if line.startswith("# ") or not line.strip():
            lines.append(line)
        elif line.startswith("> "):
            before = len(pair.lines)
            command, *words = line[2:].split()
            getattr(pair, command)(*words)
            lines += [line, *(f"    {said}" for said in pair.lines[before:])]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("scene", SCENES, ids=lambda path: path.stem)
def test_transcript(scene: Path) -> None:
    expected = scene.read_text()
    found = perform(expected)
    if REWRITE:
        scene.write_text(found)
        return
    assert found.splitlines() == expected.splitlines(), f"if this is meant: TANDEM_REWRITE_TRANSCRIPTS=1, {scene.name}"


def test_there_are_scenes_and_they_say_something() -> None:
    assert [scene.stem for scene in SCENES] == ["attach", "calm", "cancel_mid_pull", "pipelined"]
    assert all(scene.read_text().count("    ") > 10 for scene in SCENES)


def test_a_changed_line_is_noticed() -> None:
    text = (FOLDER / "calm.txt").read_text()
    changed = text.replace("SendRelease(stream_id=1, reason=DONE)", "SendRelease(stream_id=1, reason=LOCAL)")
    assert changed != text
    assert perform(changed) != changed
