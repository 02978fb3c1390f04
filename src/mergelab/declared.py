"""What a model's page declares: its parents with the share of each, and the data it was trained on.

Parents are those of the recipe (mergekit_config.yml, or a fence of the card), of `base_model`, of
an adapter's settings, and the tags by which merges name them. Names stay as they are written.

Data sets on the card of a merge are taken for those of one of its parents, whichever it is, so that
at most the largest share of a parent can be left of them: an assumption, which fails where several
parents were trained on the same. It is not made if a tag says that the merge was trained (TRAINED).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergelab import lineage
from mergelab.claims.cards import Card
from mergelab.errors import UserError
from mergelab.hub_cards import NAME, STRANGE, Page
from mergelab.lineage import Edge
from mergelab.yamlfile import Map, parse

MERGED = {"merge", "mergekit", "lazymergekit", "mergelab"}  # tags of merges
TRAINED = {"dpo", "fine-tune", "fine-tuned", "finetune", "finetuned", "grpo", "kto", "orpo", "ppo"}
TRAINED |= {"reinforcement-learning", "rlhf", "sft", "trl", "unsloth"}
QUANTISED = {"gguf", "ggml", "gptq", "awq", "exl2", "quantized"}
MOE = "mixture of experts"
MAX_PARENTS = 64  # followed, of one page
LONGEST = 200  # letters of a name
DOCUMENTS = re.compile(r"^---[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Declared:
    """Edges to `child` from its parents and data sets; `method` is a merge's, "" if not told.

    `complete`: are all parents said? `notes` tell what could not be read."""

    parents: tuple[Edge, ...]
    datasets: tuple[Edge, ...]
    method: str | None
    complete: bool
    notes: tuple[str, ...]


def declared(page: Page, card: Card) -> Declared:
    """What the files of `page`, whose card is `card`, say of the model's origin."""
    child, notes = page.repo, []
    text = card.recipe or page.recipe
    edges, method = [], None
    try:
        edges, method = recipe_edges(child, text) if text.strip() else ([], None)
    except (UserError, *STRANGE) as error:
        why = f": {shown(str(error))}" if isinstance(error, UserError) else ""
        notes.append(f"its recipe cannot be read{why}")
    tags = {tag.casefold() for tag in card.tags}
    merged = bool(tags & MERGED) or method is not None
    others = _others(page, card, edges, tagged=merged)
    merged = merged or len(others) > 1
    kind = "train" if edges or not merged else "merge"
    kind = "quantised" if kind == "train" and tags & QUANTISED and not edges else kind
    edges += [Edge(name, child, kind, 1.0, kind != "merge") for name in others]
    complete = bool(edges)
    if not complete:
        notes += [shown(problem) for problem in card.problems[:1]]
    if merged and method is None and len(edges) < 2:
        complete = False
        notes.append("is a merge, but its card does not name its parents")
    if len(edges) > MAX_PARENTS:
        complete = False
        notes.append(f"names {len(edges):,} parents; the first {MAX_PARENTS} are followed")
    names = [name for name in dict.fromkeys(card.datasets) if NAME.match(name)][:MAX_PARENTS]
    whole = not merged or bool(tags & TRAINED)
    share = 1.0 if whole else max((min(edge.weight, 1.0) for edge in edges), default=1.0)
    data = tuple(
        Edge(f"datasets/{shown(name)}", child, "train", share, not merged) for name in names
    )
    told = method if method is not None else "" if merged else None
    return Declared(tuple(edges[:MAX_PARENTS]), data, told, complete, tuple(notes))


def shown(name: str) -> str:
    """A stranger's text on one line, not too long."""
    text = "".join(letter if letter.isprintable() else " " for letter in name[: LONGEST + 1])
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def recipe_edges(child: str, text: str) -> tuple[list[Edge], str]:
    """The parents that a recipe names, and its method.

    Of a recipe of several documents, each with a `name`, the last one makes the model; what it
    takes from the others is followed to their parents. Raises UserError or one of STRANGE."""
    parts: dict[str, list[Edge]] = {}
    edges: list[Edge] = []
    method = ""
    for document in filter(str.strip, DOCUMENTS.split(text)):
        recipe = parse(document, Path("recipe"))
        edges, method = _parents(child, recipe)
        edges = _summed(_followed(edge, parts) for edge in edges)
        parts[str(recipe.get("name"))] = edges
    if not edges:
        raise UserError("recipe: names no models.")
    return edges, method


def _parents(child: str, recipe: Map) -> tuple[list[Edge], str]:
    """One document's edges; every expert of a mixture is whole in it."""
    if isinstance(recipe.get("experts"), list):
        sources = [expert.get("source_model") for expert in recipe["experts"]]
        sources += [recipe.get("base_model")]
        names = dict.fromkeys(lineage.spelled(source) for source in sources if source)
        parts = dict.fromkeys(part for name in names for part in lineage.apart(name))
        return [Edge(shown(name), child, "merge", 1.0) for name in parts], MOE
    edges = lineage.merge_edges(child, recipe)
    edges = [replace(edge, parent=shown(edge.parent)) for edge in edges]
    return edges, shown(str(recipe.get("merge_method")))


def _followed(edge: Edge, parts: dict[str, list[Edge]]) -> list[Edge]:
    """The edge, or, if its parent is made by an earlier document, those to that one's parents."""
    return [
        replace(one, weight=one.weight * min(edge.weight, 1.0), exact=one.exact and edge.exact)
        for one in parts.get(edge.parent, ())
    ] or [edge]


def _summed(groups: Iterable[list[Edge]]) -> list[Edge]:
    """One edge per parent and kind."""
    found: dict[tuple[str, str], Edge] = {}
    for edge in (edge for group in groups for edge in group):
        old = found.get((edge.parent, edge.kind), replace(edge, weight=0.0))
        exact = old.exact and edge.exact
        found[edge.parent, edge.kind] = replace(old, weight=old.weight + edge.weight, exact=exact)
    return list(found.values())


def _others(page: Page, card: Card, edges: list[Edge], *, tagged: bool) -> list[str]:
    """Parents that only the front matter, the adapter's settings or the tags name."""
    known = {edge.parent.partition("@")[0].casefold() for edge in edges}
    tags = [tag for tag in card.tags if tagged and "/" in tag and NAME.match(tag)]
    found: dict[str, str] = {}
    for name in (*card.base_models, *_adapted(page.adapter), *tags):
        key = name.partition("@")[0].casefold()
        if key not in known and key:
            found.setdefault(key, shown(name))
    return list(found.values())


def _adapted(text: str) -> list[str]:
    """The model that an adapter's settings name."""
    try:
        value: Any = json.loads(text).get("base_model_name_or_path") if text else None
    except STRANGE:
        return []
    return [value] if isinstance(value, str) and value else []
