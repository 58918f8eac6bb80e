"""Render the results as a text table."""

from __future__ import annotations

from typing import Any

HEAD = (
    f"{'case':<56} {'median':>10} {'p95':>10} {'TFLOP/s':>8} {'of bf16':>8} {'of fp8':>7} {'error':>8} {'peak GB':>8}"
)


def render(facts: dict[str, Any]) -> str:
    """Render the rows, what did not run and why, the projection, and the remaining cases."""
    device = facts.get("device", {})
    lines = [f"{device.get('name', 'no device')}, torch {device.get('torch', '?')}", HEAD]
    lines += [_line(row) for row in facts["rows"] if row["state"] == "measured"]
    lost = [row for row in facts["rows"] if row["state"] != "measured"]
    if lost:
        lines += ["", "did not run:"]
        lines += [f"{row['id']:<56} {row['state']}: {row['reason']}" for row in lost]
    if facts.get("left"):
        lines += [
            "",
            f"{len(facts['left'])} cases remain, starting with {facts['left'][0]}; run the same command again",
        ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    share = row.get("share", {})
    cells = [
        f"{row['id']:<56}",
        f"{row['median'] * 1000:>8.2f}ms",
        f"{row['p95'] * 1000:>8.2f}ms",
        f"{row['rate'] / 1e12:>8.3g}" if "rate" in row else f"{'':>8}",
        f"{share['bf16']:>8.1%}" if "bf16" in share else f"{'':>8}",
        f"{share['fp8']:>7.1%}" if "fp8" in share else f"{'':>7}",
        f"{row['error']:>8.1e}" if "error" in row else f"{'':>8}",
        f"{row['peak_bytes'] / 1e9:>8.2f}" if row.get("peak_bytes") else f"{'':>8}",
    ]
    return " ".join([*cells, *_notes(row)])


def _notes(row: dict[str, Any]) -> list[str]:
    notes = []
    if "bytes_moved" in row:
        notes.append(f"{row['bytes_moved'] / row['median'] / 1e12:.3g} TB/s")
    if "images_per_minute" in row:
        notes.append(f"{row['images_per_minute']:.1f} images/min")
    if "rows_per_call" in row:
        notes.append(f"{row['rows_per_call']:.2f} rows per call")
    if "projected_step_seconds" in row:
        notes.append(f"PROJECTION of the whole step: {row['projected_step_seconds'] * 1000:.1f} ms")
    return notes
