"""The report as one HTML page: no network, everything from outside escaped, one small script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from mergelab import figures, headlines
from mergelab.drawing import clean
from mergelab.family_tree import Arrow, Box, family_tree
from mergelab.palette import DARK, LIGHT

KINDS = ("base", "expert", "merge", "outside")
COMPARED = ("vs_base", "vs_parent")
TICKS = 80_000  # of all contamination pictures of a page; more rows mean fewer ticks each


def render(data: Mapping[str, Any]) -> str:
    """The page of a study: every text from outside is escaped by Jinja2, pictures by drawing."""
    from markupsafe import Markup

    extra: dict[str, Any] = {
        "panels": [Markup(_panel(bench)) for bench in data["benchmarks"]],
        "forests": [Markup(_forest(bench)) for bench in data["benchmarks"]],
        "tree": Markup(_tree(data["lineage"])),
    }
    detectors = [(check, d) for check in data["checks"] for d in check["detectors"]]
    rows = [row for _, detector in detectors for row in detector["rows"]]
    most = min(max(TICKS // max(2 * len(rows), 1), 24), figures.MOST_TICKS)
    extra["strips"] = [
        [Markup(_strips(check, detector, most)) for detector in check["detectors"]]
        for check in data["checks"]
    ]
    tables = [*data["benchmarks"], *data["suites"]]
    extra["n_comparisons"] = sum(
        row[key] is not None for table in tables for row in table["rows"] for key in COMPARED
    )
    extra["merges_vs_parents"] = any(r["vs_parent"] for b in data["benchmarks"] for r in b["rows"])
    extra["n_findings"] = sum(row.get("q") is not None for row in rows)
    return fill("report.html.j2", {**data, **extra})


def fill(template: str, values: Mapping[str, Any]) -> str:
    """A template of this package as a page; what is missing in `values` is an error.

    The page's policy allows no script but ours, which it names by its hash."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("mergelab", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "signed": headlines.signed,
        "small": headlines.small,
        "listed": headlines.listed,
    }
    environment.globals |= {"decimals": headlines.decimals, "local": local}
    assert environment.loader is not None
    script = environment.loader.get_source(environment, "sort.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = {"light": LIGHT, "dark": DARK, "script": Markup(script), "script_sha256": Markup(digest)}
    return environment.get_template(template).render({**values, **page})


def local(*parts: str) -> str:
    """A link to a file beside the page, from the names of its folders and its own."""
    return "/".join(quote(clean(part), safe="") for part in parts)


def _plain(value: Any) -> Any:
    """What a template prints: our own markup as it is, other text without marks of direction."""
    return clean(value) if type(value) is str else value


def _panel(bench: Mapping[str, Any]) -> str:
    dots = [
        figures.Dot(
            row["variant"],
            row["kind"],
            row["value"],
            *_pair(row["ci95"]),
            row["kind"] == "base" or _settled(row["vs_base"]),
            f"{row['value']:.3f}" if row["value"] is not None else "",
        )
        for row in bench["rows"]
    ]
    base = [d.value for d in dots if d.kind == "base" and d.value is not None]
    marks = {"chance": bench["chance"]} if bench["chance"] is not None else {}
    return figures.panel(
        dots,
        title=f"{bench['name']}: {bench['axis']} of each variant with its 95 % interval",
        axis=bench["axis"],
        higher=bench["higher_is_better"],
        marks={**marks, **({"base": base[0]} if base else {})},
    )


def _forest(bench: Mapping[str, Any]) -> str:
    """Paired differences: to the base, and of merges to the best of their parents."""
    dots: list[figures.Dot] = []
    for key, heading in (("vs_base", "minus the base"), ("vs_parent", "minus the best parent")):
        found = [(row, row[key]) for row in bench["rows"] if row[key]]
        dots += [figures.Dot(heading)] if found else []
        dots += [
            figures.Dot(
                row["variant"],
                row["kind"],
                versus["difference"],
                *_pair(versus["ci95"]),
                _settled(versus),
                headlines.signed(versus["difference"]),
            )
            for row, versus in found
        ]
    return figures.panel(
        dots,
        title=f"{bench['name']}: differences in {bench['axis']} with their 95 % intervals",
        axis=f"difference in {bench['axis']}",
        higher=bench["higher_is_better"],
        marks={"no difference": 0.0},
    )


def _settled(comparison: Mapping[str, Any] | None) -> bool:
    return comparison is not None and comparison["verdict"] != "unsettled"


def _strips(check: Mapping[str, Any], detector: Mapping[str, Any], most: int) -> str:
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
    axis = f"{detector['name']} score of an item · seen →"
    return figures.strips(rows, title=title, axis=axis, most=most)


def _effects(
    check: Mapping[str, Any], detector: Mapping[str, Any], known: Sequence[Mapping[str, Any]]
) -> str:
    dots = [
        figures.Dot(
            row["variant"],
            row["kind"],
            row["effect"],
            *_pair(row["ci95"]),
            row["flagged"],
            f"{row['effect']:.3f}",
        )
        for row in known
    ]
    title = f"{check['benchmark']}, {detector['name']}: {detector['effect_name']} of each variant"
    return figures.panel(dots, title=title, axis=detector["effect_name"] or "effect")


def _flag(detector: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    if detector["informational"] or row["q"] is None:
        return ""
    return " flagged" if row["flagged"] else " not flagged"


def _tree(tree: Mapping[str, Any]) -> str:
    boxes = [
        Box(
            node["name"],
            node["kind"] if node["kind"] in KINDS else "outside",
            [node["origin"], *node["notes"]],
            node["marked"],
        )
        for node in tree["nodes"]
    ]
    arrows = [
        Arrow(edge["parent"], edge["child"], edge["kind"], edge["label"])
        for edge in tree["edges"]
        if edge["shown"]
    ]
    return family_tree(boxes, arrows, title="Lineage: base, specialists, merges")


def _pair(interval: Sequence[float] | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval[0], interval[1])
