"""Who descends from whom, with which effective weight, and how far known taint reaches.

Nodes are the models and merges of a study. An edge's weight is the largest share of the parent
that can be left in the child: 1 for training (it keeps what was seen) and for the base of task
vectors; the recipe's weight for a merge, times the density where entries are dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergelab.methods import METHODS
from mergelab.methods.base import Method
from mergelab.study import Model, Study
from mergelab.yamlfile import as_number, parse

ORIGINS = {"train": "trained here", "hub": "hub", "path": "local folder", "gguf": "GGUF file"}

AVERAGES = ("karcher", "nuslerp", "multislerp")  # always divide by the sum of the weights


@dataclass(frozen=True)
class Node:
    """A model, merge or data set; `kind` base, expert, merge, dataset or outside (only named).

    `declared`: is it said what it was made from? Of a base that means: from nothing."""

    name: str
    kind: str
    origin: str
    declared: bool = True


@dataclass(frozen=True)
class Edge:
    """`kind` train, merge, base, adapter or quantised; `exact` is False where one number stands for
    a gradient, or where nothing is known of the share."""

    parent: str
    child: str
    kind: str
    weight: float
    exact: bool = True


@dataclass(frozen=True)
class Graph:
    """Nodes in the study's order, parents before children among the edges of each node."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    @cached_property
    def below(self) -> dict[str, list[Edge]]:
        """The edges from each node down to its children, in order."""
        found: dict[str, list[Edge]] = {}
        for edge in self.edges:
            found.setdefault(edge.parent, []).append(edge)
        return found

    def parents(self, child: str) -> tuple[str, ...]:
        """Names of the direct parents, in recipe order; the base of task vectors is none, so that
        merges of the same experts have the same parents whatever the method."""
        edges = (edge for edge in self.edges if edge.child == child and edge.kind != "base")
        return tuple(dict.fromkeys(edge.parent for edge in edges))

    def descends(self, child: str, ancestor: str, without: str) -> bool:
        """Is there a way from `ancestor` to `child` that takes no edge of kind `without`?"""
        reached = {child}
        for _ in self.nodes:
            steps = (e for e in self.edges if e.child in reached and e.kind != without)
            reached |= {edge.parent for edge in steps}
        return ancestor in reached - {child}


@dataclass(frozen=True)
class Way:
    """How a model reaches a descendant: the share of it that can be left, and through whom.

    `exact` is False where the weights are gradients or unknown (then `strength` is the most that
    is possible); `path` begins with the ancestor and ends with the descendant."""

    strength: float
    exact: bool
    path: tuple[str, ...]


def base_of(study: Study) -> str | None:
    """The common ancestor: what checks, training runs or recipes call base, in this order."""
    starts = [m.train.start for m in study.models.values() if m.train and m.train.start]
    named = [*(check.base for check in study.contamination), *starts, *study.models]
    return named[0] if named else None


def graph(study: Study, recipes: Mapping[str, str]) -> Graph:
    """The lineage of a study; `recipes` maps each merge to its recipe's text."""
    base = base_of(study)
    nodes, edges = [], []
    for model in study.models.values():
        kind = "base" if model.name == base else "expert"
        declared = kind == "base" or model.train is not None or bool(model.declared)
        nodes.append(Node(model.name, kind, ORIGINS[model.kind], declared))
        if model.train and model.train.start:
            edges.append(Edge(model.train.start, model.name, "train", 1.0))
    for name, text in recipes.items():
        recipe = parse(text, Path(f"{name}.yaml"))
        found = merge_edges(name, recipe, lambda text: _variants(text, study))
        start = "".join(f" from {edge.parent}" for edge in found if edge.kind == "base")
        nodes.append(Node(name, "merge", f"merged by {recipe.get('merge_method')}{start}"))
        edges += found
    known = {node.name for node in nodes}
    outside = dict.fromkeys(edge.parent for edge in edges if edge.parent not in known)
    strangers = [Node(name, "outside", "not in this study", False) for name in outside]
    return Graph((*nodes[:1], *strangers, *nodes[1:]), tuple(edges))


def spelled(model: Any) -> str:
    """A recipe's model as one text, mergekit's long form ({model: {path, revision}, lora}) too."""
    if not isinstance(model, Mapping):
        return str(model)
    inner = model if "path" in model else model.get("model")
    if not isinstance(inner, Mapping):
        inner = {"path": inner}
    at = f"@{inner['revision']}" if inner.get("revision") else ""
    lora = f"+{spelled(model['lora'])}" if model.get("lora") else ""
    return f"{inner.get('path')}{at}{lora}"


def apart(name: str) -> tuple[str, ...]:
    """MODEL and ADAPTER of MODEL+ADAPTER, or the model alone."""
    return tuple(part for part in name.partition("+")[::2] if part)


def merge_edges(
    child: str,
    recipe: Mapping[str, Any],
    nodes_of: Callable[[str], Sequence[str]] = apart,
) -> list[Edge]:
    """One edge per parent of a merge; slices count by their share of the layers.

    `nodes_of` gives the nodes that a recipe's model stands for: its own, and its adapter's."""
    edges: dict[tuple[str, str], Edge] = {}
    for edge in _named_edges(child, recipe):
        for i, parent in enumerate(nodes_of(edge.parent)):
            kind = "adapter" if i else edge.kind
            old = edges.get((parent, kind), Edge(parent, child, kind, 0.0))
            exact = old.exact and edge.exact
            edges[parent, kind] = Edge(parent, child, kind, old.weight + edge.weight, exact)
    return list(edges.values())


def _named_edges(child: str, recipe: Mapping[str, Any]) -> list[Edge]:
    """The edges of a merge, their parents named as in the recipe."""
    method = METHODS.get(str(recipe.get("merge_method")))
    from_base = method is None or method.base in ("needed", "optional")
    base = spelled(recipe["base_model"]) if recipe.get("base_model") else None
    modules = (recipe.get("modules") or {"": recipe}).values()
    parts = [
        {
            **part,
            "parameters": {**_given(module), **_given(part)},
        }
        for module in modules
        for part in module.get("slices") or [{"sources": module.get("models") or []}]
    ]
    layers = [_layers(part["sources"]) for part in parts]
    edges: dict[str, Edge] = {}
    starts = [base]
    for part, count in zip(parts, layers, strict=True):
        common = {**_given(recipe), **_given(part)}
        sources = [(spelled(s.get("model")), s) for s in part["sources"]]
        own = spelled(part["base_model"]) if part.get("base_model") else base
        if from_base:
            starts.append(own)
            sources = [(name, source) for name, source in sources if name != own]
        for parent, weight, exact in _shares(method, own, sources, common):
            old = edges.get(parent, Edge(parent, child, "merge", 0.0))
            share = old.weight + weight * count / sum(layers)
            edges[parent] = Edge(parent, child, "merge", share, old.exact and exact)
    for start in starts if from_base else ():
        if start is not None and start not in edges:
            edges[start] = Edge(start, child, "base", 1.0, method is not None)
    return [edge for edge in edges.values() if edge.weight > 0]


def _given(part: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a part of a recipe; null is as good as none."""
    values = part.get("parameters") or {}
    return {name: value for name, value in values.items() if value is not None}


def _shares(
    method: Method | None,
    base: str | None,
    sources: Sequence[tuple[str, Mapping[str, Any]]],
    common: Mapping[str, Any],
) -> list[tuple[str, float, bool]]:
    """(parent, effective weight, exact) of the sources of one slice; of an unknown method any
    share is possible."""
    if method is None:
        return [(name, 1.0, False) for name, _ in sources]

    def default(name: str) -> Any:
        parameter = method.parameter(name)
        return parameter.default if parameter else None

    def mean(values: Mapping[str, Any], name: str) -> tuple[float, bool]:
        return _mean(values.get(name, default(name)), 1.0)

    if method.name == "slerp":
        t, exact = mean(common, "t")
        return [(str(base), abs(1 - t), exact), *((name, abs(t), exact) for name, _ in sources)]
    own = [{**common, **_given(source)} for _, source in sources]
    weights = [mean(values, "weight") for values in own]
    scale = mean(common, "lambda")[0]
    total = sum(abs(weight) for weight, _ in weights)
    normalized = common.get("normalize", default("normalize"))
    if method.name in AVERAGES:
        normalized = common.get("normalize_weights", True)
    if normalized and str(normalized).lower() != "false" and total > 0:
        scale /= total
    shares = []
    for (name, _), values, (weight, exact) in zip(sources, own, weights, strict=True):
        kept, whole = mean(values, "density")
        shares.append((name, min(abs(weight * scale * kept), 1.0), exact and whole))
    return shares


def taint(graph: Graph, planted: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Reach of planted items: strength of a child = max over parents of strength x edge weight.

    `planted` maps a benchmark to the models known to have seen it (strength 1). Small is not
    clean: a strength never drops to 0 along an edge, it only attenuates."""
    strength: dict[str, dict[str, float]] = {node.name: {} for node in graph.nodes}
    for benchmark, models in planted.items():
        for model in models:
            for child, way in reach(graph, model).items():
                strength[child][benchmark] = max(way.strength, strength[child].get(benchmark, 0.0))
    return strength


def reach(graph: Graph, start: str) -> dict[str, Way]:
    """The strongest way from a model to each of its descendants and to itself; of equally strong
    ones the first that is exact.

    Merges of a model with itself and cycles cannot strengthen anything, so they end the search."""
    ways = {start: Way(1.0, True, (start,))}
    waiting = [start]
    while waiting:
        parent = waiting.pop(0)
        way = ways[parent]
        for edge in graph.below.get(parent, ()):
            strength, exact = way.strength * min(edge.weight, 1.0), way.exact and edge.exact
            old = ways.get(edge.child)
            if old is None or (strength, exact) > (old.strength, old.exact):
                ways[edge.child] = Way(strength, exact, (*way.path, edge.child))
                waiting.append(edge.child)
    return ways


def _variants(text: str, study: Study) -> tuple[str, ...]:
    """The study's names for a recipe's model and its adapter: 'recipe:x' is the merge x, a hub id
    or path its model."""
    known = {name: model.name for model in study.models.values() for name in _names(model)}
    parts = (text,) if text in study.models or text in known else apart(text)
    plain = [part.removeprefix("recipe:") for part in parts]
    return tuple(known.get(part, part) for part in plain)


def _names(model: Model) -> list[str]:
    """What a recipe may call a model of the study, beside its name."""
    hub = model.hub or ""
    return [name for name in (hub, hub.partition("@")[0], model.path) if name]


def _layers(sources: Sequence[Mapping[str, Any]]) -> float:
    """Number of layers that a slice contributes; 1 for a merge of whole models."""
    for source in sources:
        span = source.get("layer_range")
        if isinstance(span, list) and len(span) == 2:
            start, end = (as_number(bound) for bound in span)
            if start is not None and end is not None and end > start:
                return end - start
    return 1.0


def _mean(value: Any, default: float) -> tuple[float, bool]:
    """One number for a scalar, and whether it is exact; for a gradient or a list of filters the
    mean size, for what has both signs is not absent."""
    if isinstance(value, Mapping):
        return _mean(value.get("value"), default)
    if isinstance(value, list) and value:
        parts = [_mean(part, default) for part in value]
        exact = len(parts) == 1 and parts[0][1]
        return sum(abs(number) for number, _ in parts) / len(parts), exact
    number = as_number(value)
    return (default, value is None) if number is None else (number, True)
