"""The ranks of a job, a line each, and all of it for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.doctor.facts import Facts
from pipeline.doctor.links import Links, bus_bandwidth
from pipeline.doctor.nodes import Examined

_HEAD = ("rank", "node", "device", "memory", "driver", "shared", "clock", "decodes", "link", "cache")


def table(examined: Examined) -> list[str]:
    """Lines of equal columns: a job's log has no width that a table could be fitted into."""
    rows = [_HEAD, *(_row(fact, examined.links.get(fact.rank)) for fact in examined.facts)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def as_json(examined: Examined) -> dict[str, Any]:
    """Keys beside those of report.as_json. ranks: their facts.Facts without findings; network: what links.py measured.

    network holds backend and, where it was measured, statistics and gradients (bytes, median, worst in seconds,
    repeats; of rank 0), bus_bandwidth (bytes a second of each rank's link) and pairs: by rank and other rank, seconds
    of the best small and large exchange.
    """
    ranks = [{key: value for key, value in asdict(fact).items() if key != "findings"} for fact in examined.facts]
    network: dict[str, Any] = {"backend": examined.backend}
    if examined.links and (first := examined.links[min(examined.links)]).statistics and first.gradients:
        network |= {
            "statistics": asdict(first.statistics), "gradients": asdict(first.gradients),
            "bus_bandwidth": bus_bandwidth(first.gradients, len(examined.facts)),
            "pairs": {str(rank): {str(other): list(pair) for other, pair in link.pairs.items()}
                      for rank, link in examined.links.items()},
        }  # fmt: skip
    return {"ranks": ranks, "network": network}


def _row(fact: Facts, links: Links | None) -> Sequence[str]:
    device = fact.device if fact.device != "cpu" else f"cpu, {fact.cores:g} cores"
    clock = f"{fact.apart * 1000:+.1f} ms" if fact.apart_error >= 0 else "of rank 0" if fact.rank == 0 else "unknown"
    if abs(fact.apart) >= 10:
        clock = f"{fact.apart:+,.0f} s"
    pairs = links.pairs.values() if links else ()
    best = f"{min(small for small, _ in pairs) * 1e6:,.0f} us" if pairs else ""
    return (
        str(fact.rank), fact.host, device, _bytes(fact.memory), fact.driver or "-", _bytes(fact.shared_memory), clock,
        f"{fact.decoded:,.0f} /s" if fact.decoded >= 0 else "-", best or "-",
        f"{fact.cache} ({_bytes(fact.cache_free)} free)" if fact.cache else "-",
    )  # fmt: skip


def _bytes(size: int) -> str:
    return "-" if size < 0 else f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
