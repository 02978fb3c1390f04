"""A study's rules on what may be merged: `policy` of study.yaml, kept before anything is fetched.

`mergelab lock` writes the lineage of every hub model to lock.json; the rules are then judged
without a network, on that and on what the study itself declares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergelab import hub, lineage, locate, lockfile
from mergelab.ancestors import LOCKED, VERSION, Ancestry, locked, reports, unlocked
from mergelab.ancestry import ancestries
from mergelab.detectors import taint
from mergelab.detectors.taint import Source, Taint
from mergelab.errors import Problems, UserError, nearest
from mergelab.lineage import Edge, Graph
from mergelab.record import read_json
from mergelab.study import Policy, Study

SECTION = "ancestry"  # of lock.json
COPY = "copy"  # kind of an edge from a hub model to the study's model of another name


def tracing(study: Study) -> Callable[[Mapping[str, Any]], dict[str, Any]] | None:
    """What `mergelab lock` adds to a lock file, given its models: their lineage, if the study has
    a policy. Asks the hub."""

    def trace(models: Mapping[str, Any]) -> dict[str, Any]:
        pins = {name: f"{hub.split(name)[0]}@{one['commit']}" for name, one in models.items()}
        found = ancestries(pins.values())
        targets = {name: found.targets[pin] for name, pin in pins.items()}
        return {SECTION: locked(replace(found, targets=targets))}

    return trace if study.policy.asks else None


def check(
    study: Study, only: Iterable[str] | None = None, planned: Mapping[str, str] | None = None
) -> list[str]:
    """Judge every merge of the study (or `only` these recipes); returns notes on what is unknown.

    planned: texts of recipes that are not written yet, by name: these alone are judged.

    Raises UserError with every breach: rule, recipe, parent, path, and what to do."""
    if not study.policy.asks:
        return []
    judge, problems = _Judge(study, planned), Problems()
    for _, text in judge.breaches(planned or only):
        problems.add(text)
    problems.raise_if_any()
    return list(dict.fromkeys(judge.notes))


def rows(study: Study) -> list[dict[str, str]]:
    """For each rule of the study: is it kept or broken, or unverifiable, and why."""
    if not study.policy.asks:
        return []
    judge = _Judge(study)
    broken: dict[str, list[str]] = {}
    for rule, text in judge.breaches(None):
        broken.setdefault(rule, []).append(text)
    unknown = list(dict.fromkeys(judge.notes))
    kept = "unverifiable" if unknown else "kept"
    return [
        {
            "rule": rule,
            "verdict": "broken" if rule in broken else kept,
            "why": " ".join(broken.get(rule, unknown)),
        }
        for rule in _rules(study.policy)
    ]


def _rules(policy: Policy) -> list[str]:
    """Every rule, as it stands in study.yaml."""
    found = [] if policy.allow_merged_parents else ["allow_merged_parents: false"]
    if policy.max_merge_depth is not None:
        found.append(f"max_merge_depth: {policy.max_merge_depth}")
    found += [f"deny_taint: {benchmark}" for benchmark in policy.deny_taint]
    return found if policy.allow_unknown else [*found, "allow_unknown: false"]


def whole(study: Study, planned: Mapping[str, str] | None = None) -> tuple[Graph, list[Source]]:
    """The study's lineage with that of its hub models, as locked, and what is reported on it;
    `planned` recipes are taken for written.

    Raises UserError if the lock holds no lineage of a hub model."""
    wanted = [(model.hub, name) for name, model in study.models.items() if model.hub]
    wanted += [(name, name) for name in locate.hub_ids(study.recipes, study)]
    texts = {path.stem: path.read_text(encoding="utf-8") for path in study.recipes}
    texts |= planned or {}
    own = lineage.graph(study, texts)
    if not wanted:
        return own, taint.study_sources(study, own)
    known = _apart(_kept(study, [hub_id for hub_id, _ in wanted]), own)
    nodes = {node.name: node for node in (*own.nodes, *known.graph.nodes)}
    copies = []
    for hub_id, name in wanted:
        target = known.targets[hub_id]
        if target != name and name in nodes:
            nodes[name] = replace(nodes[name], declared=True)  # what it is a copy of says it
            copies.append(Edge(target, name, COPY, 1.0))
    graph = Graph(tuple(nodes.values()), (*own.edges, *known.graph.edges, *copies))
    sources = [*taint.study_sources(study, graph), *reports(known)]
    return graph, list(dict.fromkeys(sources))


def _apart(known: Ancestry, own: Graph) -> Ancestry:
    """The hub's lineage, where what a card happens to call like a model of the study is another."""
    taken = {node.name for node in own.nodes} - set(known.targets.values())

    def name(text: str) -> str:
        return f"{text} (of a card)" if text in taken else text

    nodes = tuple(replace(node, name=name(node.name)) for node in known.graph.nodes)
    edges = tuple(
        replace(edge, parent=name(edge.parent), child=name(edge.child))
        for edge in known.graph.edges
    )
    found = {name(text): one for text, one in known.nodes.items()}
    return replace(known, graph=Graph(nodes, edges), nodes=found)


def _kept(study: Study, wanted: Iterable[str]) -> Ancestry:
    """The ancestry in the lock file; UserError if one of `wanted` is not in it as pinned."""
    again = f"Run: mergelab lock {study.folder}"
    shape = {f"{SECTION}?": LOCKED}
    value = (read_json(study.lock, f"mergelab lock {study.folder}", shape) or {}).get(SECTION)
    known = unlocked(value) if value and value["version"] == VERSION else None
    if known is None:
        raise UserError(
            f"{study.lock}: holds no lineage of the hub models, which the policy of "
            f"{study.folder / 'study.yaml'} asks for. {again}"
        )
    for hub_id in wanted:
        target = known.nodes.get(known.targets.get(hub_id, ""))
        if target is None or target.commit != lockfile.resolve(hub_id, study.lock).commit:
            raise UserError(
                f"{study.lock}: holds no lineage of {hub_id} at its commit, which the policy of "
                f"{study.folder / 'study.yaml'} asks for. {again}"
            )
    return known


@dataclass(frozen=True)
class _Chain:
    """The longest way up through merges: how many there are, and the way, ancestor first."""

    merges: int
    path: tuple[str, ...]


class _Judge:
    """Knows the whole lineage of a study; `notes` collects what no rule forbids."""

    def __init__(self, study: Study, planned: Mapping[str, str] | None = None) -> None:
        self.study, self.policy = study, study.policy
        self.merges = dict.fromkeys([*(path.stem for path in study.recipes), *(planned or ())])
        self.graph, sources = whole(study, planned)
        self.taints = taint.trace(self.graph, sources)
        self.unknown = taint.unknown(self.graph)
        self.notes: list[str] = []
        known = {source.benchmark for source in taint.flags()}
        known |= {one.benchmark for one in study.contamination}
        for name in self.policy.deny_taint:
            if name not in known:
                hint = nearest(name, known)
                self.notes.append(f"policy deny_taint: nothing is reported of '{name}' yet.{hint}")

    def breaches(self, only: Iterable[str] | None) -> Iterator[tuple[str, str]]:
        """(rule, breach in words) of every merge of the study, or of `only` these."""
        for merge in self.merges:
            if only is None or merge in only:
                for rule, why in self.of_merge(merge):
                    yield rule, self.told(rule, merge, why)

    def of_merge(self, merge: str) -> Iterator[tuple[str, str]]:
        """(rule, why) of one merge."""
        deepest, most = _chain(self.graph, merge), self.policy.max_merge_depth
        if most is not None and deepest.merges > most:
            path = " > ".join(deepest.path)
            yield f"max_merge_depth: {most}", f"it would be merged {deepest.merges} deep: {path}"
        for parent in dict.fromkeys(e.parent for e in self.graph.edges if e.child == merge):
            above, model = _chain(self.graph, parent), self.study.models.get(parent)
            named = f"'{parent}' ({model.hub})" if model and model.hub else f"'{parent}'"
            if not self.policy.allow_merged_parents and above.merges:
                path = f" ({' > '.join(above.path)})" if above.path[1:] else ""
                why = f"its parent {named} is a merge or comes from one{path}"
                yield "allow_merged_parents: false", why
            for benchmark in self.policy.deny_taint:
                found = [t for t in self.taints[parent] if t.source.benchmark == benchmark]
                if found:
                    why = f"its parent {named} is tainted: {_told(found[0])}"
                    yield f"deny_taint: {benchmark}", why
            if strangers := self.unknown[parent]:
                why = f"nothing is declared of {taint.some(strangers)}, in the lineage of {named}"
                if not self.policy.allow_unknown:
                    yield "allow_unknown: false", why
                else:
                    self.notes.append(f"{self.place(merge)}: {why}: it is unverifiable, not clean")

    def place(self, merge: str) -> str:
        """The recipe's file."""
        return str(self.study.folder / f"{merge}.yaml")

    def told(self, rule: str, merge: str, why: str) -> str:
        """A breach: where, which rule, why, and what to do."""
        where = self.study.folder / "study.yaml"
        return (
            f"{self.place(merge)}: forbidden by the policy '{rule}': {why}. Take another parent, "
            f"or change the policy in {where}."
        )


def _told(one: Taint) -> str:
    """A taint in words: the way, what can be left of it, who says so."""
    way = one.way
    share = f"{'' if way.exact else 'at most '}{way.strength:.2g}"
    left = f" ({share} of it can be left)" if way.path[1:] else ""
    return f"{' > '.join(way.path)}{left}; {one.source.evidence}; {one.source.source}"


def _chain(graph: Graph, start: str) -> _Chain:
    """The longest way up from a node through merges; no way goes round a circle.

    What is known of a node on a circle depends on where one began, so each start begins anew."""
    above: dict[str, list[str]] = {node.name: [] for node in graph.nodes}
    for edge in graph.edges:
        above[edge.child].append(edge.parent)
    merged = {node.name for node in graph.nodes if node.kind == "merge"}
    found: dict[str, _Chain] = {}
    below: set[str] = set()

    def climb(name: str) -> _Chain:
        if name not in found:
            below.add(name)
            ways = [climb(parent) for parent in above[name] if parent not in below]
            below.discard(name)
            best = max(ways, key=lambda way: way.merges, default=_Chain(0, ()))
            count = best.merges + (name in merged)
            found[name] = _Chain(count, (*best.path, name) if count else ())
        return found[name]

    return climb(start)
