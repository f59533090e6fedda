from __future__ import annotations

from xml.etree import ElementTree

from grainwise.plan.choices import Choice, Entry, Granularity, Method
from grainwise.report.timeline import changed_share, timeline

MILD = Entry(Choice(Method.PRUNE, Granularity.CHANNEL, 0.3))
HARD = Entry(Choice(Method.PRUNE, Granularity.CHANNEL, 0.7), Choice(Method.QUANTIZE, Granularity.BLOCK, 4))
EPOCHS = [{}, {"a<b": MILD}, {"a<b": MILD, "c": HARD}]


def test_each_entry_stands_in_its_cell_and_changes_are_framed() -> None:
    picture = timeline(["a<b", "c"], EPOCHS)
    root = ElementTree.fromstring(picture)
    words = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("a<b") == 1 and words.count("ch 0.3") == 2 and words.count("bl 4") == 1
    frames = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("stroke") == "black"]
    assert len(frames) == 2
    strengths = {e.get("fill-opacity") for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("fill-opacity")}
    assert len(strengths) == 3  # two levels of pruning and one of bits: the harder the darker


def test_share_of_changed_layers() -> None:
    assert changed_share(["a<b", "c"], EPOCHS, 1) == 1.0
    assert changed_share(["a<b", "c"], EPOCHS, 2) == 0.5
    assert changed_share(["a<b", "c"], EPOCHS, 3) == 0.0
