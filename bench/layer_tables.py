"""Tables of what single layers lose."""

from __future__ import annotations

from typing import Any

from bench import markdown


def methods() -> str:
    """One row a cell, a pair of columns a layer."""
    rows = markdown.read("methods")["rows"]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    blocks = [name for name in layers if name.count(".") == 1]
    parts = []
    for group in ([name for name in layers if name not in blocks], blocks):
        found = {(row["choice"], row["layer"]): row for row in rows if row["layer"] in group}
        choices = list(dict.fromkeys(choice for choice, _ in found))
        head = ["choice", *(f"`{name}` bytes | error | plain" for name in group)]
        lines = [[choice, *(_cell(found.get((choice, name))) for name in group)] for choice in choices]
        width = 1 + 3 * len(group)
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"| {' | '.join(head)} |\n|{'---|' * width}\n{body}")
    return "\n\n".join(parts)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "— | — | —"
    plain = "—" if row["plain_error"] is None else f"{row['plain_error']:.4f}"
    return f"{row['bytes']:,} | {row['error']:.4f} | {plain}"


def shrinkage() -> str:
    """One row a layer and number of pictures, a column for each share that covariances were made smaller by."""
    body = markdown.read("shrinkage")
    ways = list(body["rows"][0]["errors"])
    rows = [
        [
            f"`{row['layer']}`",
            *(f"{row[name]:,}" for name in ("inputs", "pictures", "rows")),
            *(f"{100 * row['errors'][way]:.3f}" for way in ways),
        ]
        for row in body["rows"]
    ]
    table = markdown.table(["layer", "inputs", "pictures", "rows of x", *ways], rows)
    return f"{table}\n\nErrors in percent. `{body['command']}` on {body['machine']}."


def students() -> str:
    """A row for each training, a column for each block."""
    if not markdown.made("students"):
        return "No results yet: `python -m bench.students`."
    body = markdown.read("students")
    rows = {(row["steps"], row["loss"], row["block"]): row for row in body["rows"]}
    blocks = list(dict.fromkeys(row["block"] for row in body["rows"]))
    lines = []
    for steps, loss in dict.fromkeys((row["steps"], row["loss"]) for row in body["rows"]):
        own = [rows[steps, loss, block] for block in blocks]
        errors, seconds = [f"{row['error']:.4f}" for row in own], sum(row["seconds"] for row in own) / len(own)
        lines.append([str(steps), loss if steps else "re-fit alone", *errors, f"{seconds:.1f}"])
    head = ["steps", "loss", *(f"`{block}`" for block in blocks), "seconds each"]
    return f"{markdown.table(head, lines)}\n\n`{body['command']}` on {body['machine']}."
