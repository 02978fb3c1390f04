"""The ancestors of a model as data: a graph, what was found at each node, and its JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mergelab.claims.cards import Card
from mergelab.detectors import taint
from mergelab.detectors.taint import Source
from mergelab.lineage import Edge, Graph, Node

UNDECLARED = "it does not say what it was made from"
VERSION = 1  # of the section `ancestry` of a lock file
NODE = {
    "repo": str,
    "kind": str,
    "origin": str,
    "declared": bool,
    "commit": (str, None),
    "date": (str, None),
    "renamed_from": (str, None),
}
EDGE = {"parent": str, "child": str, "kind": str, "weight": float, "exact": bool}
LOCKED = {
    "version": int,
    "targets": {"*": str},
    "nodes": {"*": NODE},
    "edges": [EDGE],
    "notes": [str],
}


@dataclass(frozen=True)
class Ancestor:
    """A model as it was found: commit, its date (ISO 8601), its card, and what kept us from it.

    `repo` is its name on the hub now, or a local folder; `missing` says why nothing is known of it
    (None if it was read); `method` is that of a merge ("" if its card does not tell, None for
    other models); `depth` counts generations from the target."""

    repo: str
    commit: str | None = None
    date: str | None = None
    card: Card | None = None
    missing: str | None = None
    renamed_from: str | None = None
    licence: str | None = None
    method: str | None = None
    depth: int = 0
    complete: bool = False


@dataclass(frozen=True)
class Ancestry:
    """Targets (by the names they were asked for), their ancestors, and what was noted on the way.

    A node's name is its repository; a second commit of one is named REPO@<12 hex>."""

    targets: Mapping[str, str]
    graph: Graph
    nodes: Mapping[str, Ancestor]
    notes: tuple[str, ...]

    @property
    def target(self) -> str:
        """The node of the (first) target."""
        return next(iter(self.targets.values()))


def graph_of(nodes: Mapping[str, Ancestor], edges: Iterable[Edge]) -> Graph:
    """The graph of what was found, in the order in which it was found; data sets come last.

    A model that is known as trained from nothing need not declare anything; models that descend
    from themselves have not said what they were made from."""
    bases, drawn, lines = taint.bases(), [], tuple(edges)
    circle = _circling(lines)
    for name, one in nodes.items():
        base = not one.complete and one.repo.casefold() in bases and not one.missing
        kind = "outside" if one.missing else "base" if base else "expert"
        kind = "merge" if one.method is not None else kind
        origin = one.missing or ("hub" if one.commit else "local folder")
        declared = base or (one.complete and name not in circle)
        drawn.append(Node(name, kind, origin, declared))
    sets = dict.fromkeys(edge.parent for edge in lines if edge.parent not in nodes)
    drawn += [Node(name, "dataset", "hub") for name in sets]
    return Graph(tuple(drawn), lines)


def _circling(edges: tuple[Edge, ...]) -> set[str]:
    """Models on a circle of parents, or between two: those with neither beginning nor end."""
    while True:
        children, parents = {edge.child for edge in edges}, {edge.parent for edge in edges}
        left = tuple(e for e in edges if e.parent in children and e.child in parents)
        if left == edges:
            return children
        edges = left


def reports(ancestry: Ancestry) -> list[Source]:
    """The published reports on models and data sets of an ancestry, by their names of any time."""
    names = {node.name: [node.name] for node in ancestry.graph.nodes}
    for name, one in ancestry.nodes.items():
        names[name] = [one.repo, one.renamed_from or one.repo]
    return taint.published(names)


def plain(ancestry: Ancestry, sources: Iterable[Source] = ()) -> dict[str, Any]:
    """As JSON: nodes, edges, the taint of every node, notes.

    `sources` are findings of ours (taint.Source with a node's name), beside published reports."""
    known = {
        node.name: ancestry.nodes.get(node.name, Ancestor(node.name))
        for node in ancestry.graph.nodes
    }
    found = taint.trace(ancestry.graph, [*reports(ancestry), *sources])
    return {
        "nodes": [_node(node, known[node.name]) for node in ancestry.graph.nodes],
        "edges": [asdict(edge) for edge in ancestry.graph.edges],
        "taints": [
            {"model": name, "benchmark": one.source.benchmark, **one.plain()}
            for name, several in found.items()
            for one in several
        ],
        "notes": list(ancestry.notes),
    }


def _node(node: Node, found: Ancestor) -> dict[str, Any]:
    return {
        "name": node.name,
        "kind": node.kind,
        "commit": found.commit,
        "date": found.date,
        "licence": found.licence,
        "missing": found.missing or (None if node.declared else UNDECLARED),
        "depth": found.depth,
        "merge_method": found.method,
    }


def locked(ancestry: Ancestry) -> dict[str, Any]:
    """An ancestry as a lock file keeps it: what policies ask for, no more."""
    known = {
        node.name: ancestry.nodes.get(node.name, Ancestor(node.name))
        for node in ancestry.graph.nodes
    }
    return {
        "version": VERSION,
        "targets": dict(ancestry.targets),
        "nodes": {
            node.name: {
                "repo": known[node.name].repo,
                "kind": node.kind,
                "origin": node.origin,
                "declared": node.declared,
                "commit": known[node.name].commit,
                "date": known[node.name].date,
                "renamed_from": known[node.name].renamed_from,
            }
            for node in ancestry.graph.nodes
        },
        "edges": [asdict(edge) for edge in ancestry.graph.edges],
        "notes": list(ancestry.notes),
    }


def unlocked(value: Mapping[str, Any]) -> Ancestry | None:
    """The ancestry of a lock file, of the shape LOCKED; None if it does not hang together."""
    nodes = {
        name: Ancestor(one["repo"], one["commit"], one["date"], renamed_from=one["renamed_from"])
        for name, one in value["nodes"].items()
    }
    drawn = tuple(
        Node(name, one["kind"], one["origin"], one["declared"])
        for name, one in value["nodes"].items()
    )
    edges = tuple(Edge(*(edge[key] for key in EDGE)) for edge in value["edges"])
    named = {name for edge in edges for name in (edge.parent, edge.child)}
    if not named | set(value["targets"].values()) <= nodes.keys():
        return None
    return Ancestry(value["targets"], Graph(drawn, edges), nodes, tuple(value["notes"]))
