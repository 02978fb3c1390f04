"""The report as one HTML page: no script, no network, everything from outside escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from mergelab import figures, headlines

KINDS = ("base", "expert", "merge")
COMPARED = ("vs_base", "vs_parent")


def render(data: Mapping[str, Any]) -> str:
    """The page: every text from outside is escaped by Jinja2, every picture by figures."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    text = resources.files("mergelab").joinpath("templates/report.html.j2").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "signed": headlines.signed,
        "small": headlines.small,
        "listed": headlines.listed,
    }
    environment.globals |= {"decimals": headlines.decimals}
    panels = [Markup(_panel(bench)) for bench in data["benchmarks"]]
    strips = [
        [Markup(_strips(check, detector)) for detector in check["detectors"]]
        for check in data["checks"]
    ]
    tree = Markup(_tree(data["lineage"]))
    page = environment.from_string(text)
    extra: dict[str, Any] = {"panels": panels, "strips": strips, "tree": tree}
    tables = [*data["benchmarks"], *data["suites"]]
    extra["n_comparisons"] = sum(
        row[key] is not None for table in tables for row in table["rows"] for key in COMPARED
    )
    extra["merges_vs_parents"] = any(r["vs_parent"] for b in data["benchmarks"] for r in b["rows"])
    rows = (r for c in data["checks"] for d in c["detectors"] for r in d["rows"])
    extra["n_findings"] = sum(row.get("q") is not None for row in rows)
    return page.render(**extra, **data)


def _panel(bench: Mapping[str, Any]) -> str:
    dots = [
        figures.Dot(
            row["variant"],
            row["kind"],
            row["value"],
            *_pair(row["ci95"]),
            bool(row["vs_base"]) and row["vs_base"]["verdict"] != "unsettled",
        )
        for row in bench["rows"]
    ]
    return figures.score_panel(
        dots,
        title=f"{bench['name']}: {bench['axis']} of each variant with its 95 % interval",
        axis=bench["axis"],
        higher=bench["higher_is_better"],
        chance=bench["chance"],
    )


def _strips(check: Mapping[str, Any], detector: Mapping[str, Any]) -> str:
    """Item scores where there are any, else the effects with their intervals."""
    known = [row for row in detector["rows"] if row["effect"] is not None]
    if not any(row["suspects"] for row in known):
        return _effects(check, detector, known)
    rows = [
        figures.Strip(
            row["variant"],
            row["kind"],
            row["suspects"],
            row["controls"],
            f"{row['auc']:.2f}" + _flag(detector, row),
            row["flagged"],
        )
        for row in known
        if row["suspects"]
    ]
    title = f"{check['benchmark']}, {detector['name']}: item scores of suspects and controls"
    return figures.strips(rows, title=title, axis=f"{detector['name']} score of an item · seen →")


def _effects(
    check: Mapping[str, Any], detector: Mapping[str, Any], known: Sequence[Mapping[str, Any]]
) -> str:
    dots = [
        figures.Dot(row["variant"], row["kind"], row["effect"], *_pair(row["ci95"]), row["flagged"])
        for row in known
    ]
    title = f"{check['benchmark']}, {detector['name']}: {detector['effect_name']} of each variant"
    axis = detector["effect_name"] or "effect"
    return figures.score_panel(dots, title=title, axis=axis, higher=None, chance=None)


def _flag(detector: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    if detector["informational"] or row["q"] is None:
        return ""
    return " flagged" if row["flagged"] else " not flagged"


def _tree(tree: Mapping[str, Any]) -> str:
    boxes = [
        figures.Box(
            node["name"],
            node["kind"] if node["kind"] in KINDS else "expert",
            [node["origin"], *node["notes"]],
            node["marked"],
        )
        for node in tree["nodes"]
    ]
    arrows = [
        figures.Arrow(edge["parent"], edge["child"], edge["kind"], edge["label"])
        for edge in tree["edges"]
        if edge["shown"]
    ]
    return figures.lineage(boxes, arrows, title="Lineage: base, specialists, merges")


def _pair(interval: Sequence[float] | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval[0], interval[1])
