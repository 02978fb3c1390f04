"""The pictures of an audit: differences, orderings, lineage with its ways of taint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from mergelab import figures
from mergelab.audit.summary import SCORES
from mergelab.family_tree import Arrow, Box, family_tree
from mergelab.figures import Dot
from mergelab.headlines import signed

MOST_BOXES = 40

Audit = Mapping[str, Any]


def forests(claims: Sequence[Audit]) -> list[str]:
    """Claimed minus ours with 95 % intervals, one picture per unit (percent, or the metric's)."""
    found = []
    for percent, unit in ((True, "percentage points"), (False, "the metric's own unit")):
        own = [claim for claim in claims if claim["percent"] is percent and claim["ours"]]
        dots: list[Dot] = []
        models = dict.fromkeys(claim["model"] for claim in own)
        for model in models:
            dots += [Dot(model)] if len(models) > 1 else []
            dots += [_difference(claim) for claim in own if claim["model"] == model]
        title = "Claimed minus re-scored, with the 95 % interval of the re-scored value"
        axis = f"claimed minus ours, {unit}"
        found.append(figures.panel(dots, title=title, axis=axis, marks={"as claimed": 0.0}))
    return [picture for picture in found if picture]


def _difference(claim: Audit) -> Dot:
    scale, ours = (100.0 if claim["percent"] else 1.0), claim["ours"]
    low, high = ours["ci95"] or (None, None)
    value = scale * (claim["value"] - ours["value"])
    digits = 2 if claim["percent"] else 4
    return Dot(
        claim["benchmark"],
        SCORES[claim["verdict"]],
        value,
        None if high is None else scale * (claim["value"] - high),
        None if low is None else scale * (claim["value"] - low),
        SCORES[claim["verdict"]] == "bad",
        signed(value, digits),
    )


def comparison_forest(found: Sequence[Audit]) -> str:
    """Claimed orderings: the difference with its 95 % interval, right of 0 if the order holds."""
    dots: list[Dot] = []
    known = [one for one in found if one["difference"] is not None]
    for pair in dict.fromkeys((one["model"], one["than"]) for one in known):
        dots += [Dot(" \N{MINUS SIGN} ".join(pair))]
        dots += [_order(one) for one in known if (one["model"], one["than"]) == pair]
    title = "Claimed orderings: difference with its 95 % interval"
    return figures.panel(dots, title=title, axis="difference", marks={"no difference": 0.0})


def _order(one: Audit) -> Dot:
    low, high = one["ci95"] or (None, None)
    value, settled = one["difference"], bool(one["significant"])
    kind = "good" if settled and value > 0 else "warn"
    return Dot(one["benchmark"], kind, value, low, high, settled, signed(value))


def tree(lineage: Audit) -> str:
    """The family tree, with the ways of taint in bold; of a large one the part that matters."""
    shown = drawn(lineage)
    ways = {step for taint in lineage["taints"] for step in pairwise(taint["path"])}
    tainted = {name for taint in lineage["taints"] for name in taint["path"]}
    boxes = [
        Box(
            node["name"],
            node["kind"] if node["kind"] in ("base", "expert", "merge") else "outside",
            _box_lines(node, lineage["taints"]),
            node["name"] in tainted,
        )
        for node in lineage["nodes"]
        if node["name"] in shown
    ]
    arrows = dict.fromkeys(
        Arrow(
            edge["parent"],
            edge["child"],
            edge["kind"],
            _weight(edge) if edge["kind"] == "merge" else "",
            (edge["parent"], edge["child"]) in ways,
        )
        for edge in lineage["edges"]
        if edge["kind"] != "base" or not _repeats(edge, lineage["edges"])
    )
    title = "Lineage: parents left, what was made of them right"
    return family_tree(boxes, list(arrows), title=title)


def _repeats(base: Audit, edges: Sequence[Audit]) -> bool:
    """Is the base of the task vectors an ancestor by another way?"""
    reached = {base["child"]}
    for _ in edges:
        further = {e["parent"] for e in edges if e["child"] in reached and e["kind"] != "base"}
        if further <= reached:
            break
        reached |= further
    return base["parent"] in reached


def drawn(lineage: Audit) -> set[str]:
    """Names of the nodes that are drawn: all, or the ways of taint and the nearest ancestors."""
    if len(lineage["nodes"]) <= MOST_BOXES:
        return {node["name"] for node in lineage["nodes"]}
    ways = [name for taint in lineage["taints"] for name in taint["path"]]
    near = sorted(lineage["nodes"], key=lambda node: node["depth"] or 0)
    names = dict.fromkeys([*ways, *(node["name"] for node in near)])
    return set(list(names)[:MOST_BOXES])


def _box_lines(node: Audit, taints: Iterable[Audit]) -> list[str]:
    made = node["merge_method"] or node["kind"]
    when = f"{made}, {node['date'][:10]}" if node["date"] else str(made)
    own = [taint for taint in taints if taint["path"][-1:] == [node["name"]]]
    lines = [when, *([f"missing: {node['missing']}"] if node["missing"] else [])]
    for benchmark in dict.fromkeys(taint["benchmark"] for taint in own):
        ways = [taint for taint in own if taint["benchmark"] == benchmark]
        best = max(ways, key=lambda taint: taint["strength"])
        source = len(best["path"]) == 1
        share = f"{'' if best['exact'] else 'at most '}{best['strength']:.2g}"
        lines.append(f"flagged: {benchmark}" if source else f"{benchmark}: taint {share}")
    return lines[:5]


def _weight(edge: Audit) -> str:
    if edge["weight"] is None:
        return "?"
    return ("" if edge["exact"] else "≈ ") + f"{edge['weight']:.2g}"
