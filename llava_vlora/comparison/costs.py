"""What answers cost, as lines of text for pages, Markdown and terminals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .analysis import Comparison

_UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6))
Cost = Mapping[str, Any]


def known_costs(comparison: Comparison) -> dict[str, Cost]:
    """Measured costs, in the order of the models."""
    costs = comparison["costs"]
    return {model: costs[model] for model in comparison["models"] if model in costs}


def cost_table(comparison: Comparison) -> list[list[str]]:
    """Head and lines of what one answer costs each model; the head alone where nothing was measured."""
    costs = known_costs(comparison)
    lines = [["", *costs]]
    if not costs:
        return lines
    unit, size = flops_unit(costs)

    def add(title: str, show: Callable[[Cost], str]) -> None:
        lines.append([title, *(show(cost) for cost in costs.values())])

    def flops(title: str, part: str) -> None:
        add(title, lambda cost: f"{cost['flops'][part] / size:,.3g}")

    add("Tokens the language model reads", lambda c: f"{c['sequence']:,}")
    flops(f"{unit}FLOPs to the first token", "first_token")
    flops("of these vision tower", "vision")
    flops("of these projector or generator", "connector")
    flops("of these language model", "prefill")
    flops(f"{unit}FLOPs of each further token", "decode")
    add("Milliseconds to the first token", lambda c: _time(c["time"], "first_token"))
    add("Milliseconds of each further token", lambda c: _time(c["time"], "per_token"))
    if all("image_bytes" in cost for cost in costs.values()):
        add("Kept for an image while decoding, KiB", lambda c: f"{c['image_bytes'] / 1024:,.1f}")
        add("Parameters of projector or generator", lambda c: f"{c['connector']:,}")
    add("Parameters in all", lambda c: f"{c['parameters']:,}")
    add("Weights, MiB", lambda c: _mebi(c["memory"]["weights"]))
    add("Peak beyond the weights, MiB", lambda c: _mebi(c["memory"]["peak_beyond_weights"]))
    return lines


def flops_unit(costs: Mapping[str, Cost]) -> tuple[str, float]:
    """Prefix and size of the unit in which the largest count of FLOPs has digits before the point."""
    most = max(cost["flops"]["first_token"] for cost in costs.values())
    return next(((unit, size) for unit, size in _UNITS if most >= size), _UNITS[-1])


def in_turns(comparison: Comparison) -> bool:
    """Whether all models were timed together, so that a slow spell of the machine met all of them."""
    turns = [cost.get("turns") for cost in known_costs(comparison).values()]
    return bool(turns) and turns[0] is not None and all(one == turns[0] for one in turns)


def _mebi(count: float | None) -> str:
    return "not counted here" if count is None else f"{count / 2**20:,.1f}"


def _time(times: Mapping[str, Any], part: str) -> str:
    fastest, slowest = (1e3 * v for v in times[f"{part}_range"])
    return f"{1e3 * times[part]:.1f} ({fastest:.1f} to {slowest:.1f})"
