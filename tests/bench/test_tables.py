"""What the search has against a uniform file, by hand."""

from __future__ import annotations

from typing import Any

from bench.tables import duel


def file(name: str, kind: str, metric: float, size_bytes: int, latency_ratio: float) -> dict[str, Any]:
    return {"name": name, "kind": kind, "metric": metric, "size_bytes": size_bytes, "latency_ratio": latency_ratio}


def test_only_files_of_no_lower_metric_count() -> None:
    files = [
        file("full", "reference", 0.9, 1000, 1.0),
        file("int8", "uniform", 0.8, 300, 0.5),
        file("theirs", "foreign", 0.95, 300, 0.5),
        file("half", "uniform", 0.5, 100, 0.2),
        file("small", "search", 0.7995, 150, 0.51),
        file("smaller, slow", "search", 0.8, 120, 0.9),
        file("smaller, less accurate", "search", 0.7985, 100, 0.5),
        file("fast", "search", 0.81, 300, 0.4),
        file("fast, large", "search", 0.85, 301, 0.3),
    ]
    smallest, fast = "x 0.400 (+0.00): smaller, slow", "x 0.800 (+1.00): fast"
    rows = duel(files, noise=0.01).splitlines()[2:5]
    assert rows == [  # small is as slow as int8 within the noise, and as accurate; what is fastest is larger
        f"| int8 | {smallest} | x 0.500 (-0.05): small | x 0.600 (+5.00): fast, large | {fast} |",
        "| theirs | none | none | none | none |",
        "| half | none | none | none | none |",
    ]
    narrow = duel(files, noise=0.001).splitlines()[2]
    assert narrow == f"| int8 | {smallest} | none | x 0.600 (+5.00): fast, large | {fast} |"
    assert duel([f for f in files if f["kind"] != "search"], 0.01) == ""
