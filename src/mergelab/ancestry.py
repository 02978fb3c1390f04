"""The ancestors of a model as hub pages and local folders declare them, each at its time.

A merge's parents are looked up at the commit that was current when its weights were committed (a
commit that the recipe pins wins): later changes of a parent are not in its children. A parent that
is gone, or a folder of somebody's machine, stays in the graph, undeclared: what descends from it is
unverifiable, never clean. Everything read is a stranger's word, and there is a limit to it."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from mergelab import hub, hub_cards, locate
from mergelab.ancestors import Ancestor, Ancestry, graph_of, plain
from mergelab.claims.cards import read_card
from mergelab.declared import declared, shown
from mergelab.errors import UserError
from mergelab.hub_cards import Commit, Page
from mergelab.hub_files import COMMIT
from mergelab.lineage import Edge
from mergelab.progress import say
from mergelab.record import read_json

__all__ = ["DEPTH", "Ancestor", "Ancestry", "ancestries", "ancestry", "beside", "plain"]
DEPTH = 4  # generations above the target
MAX_REPOS = 200  # looked up in one trace
MAX_NODES = 1000  # told apart in one trace; what is further is one node
FURTHER = "further models"
PAGE = "https://huggingface.co/"  # some cards name their parents by their pages
REPO = re.compile(r"((?:[\w-][\w.-]*/)?[\w-][\w.-]*)(?:@([\w][\w./+-]*))?\Z", re.A)


def ancestry(target: str, depth: int = DEPTH, as_of: str | None = None) -> Ancestry:
    """The ancestors of a hub model (org/name[@revision]) or of a local folder, `depth` generations.

    as_of: an ISO date; the target is taken as it was then. Raises UserError if there is no such
    model, or the hub cannot be asked; a parent that cannot be had is only noted."""
    return ancestries([target], depth, as_of)


def ancestries(targets: Iterable[str], depth: int = DEPTH, as_of: str | None = None) -> Ancestry:
    """The ancestors of several models, as one graph."""
    walk = _Walk(depth)
    when = hub_cards.moment(as_of) if as_of else None
    found = {target: walk.start(target, when) for target in dict.fromkeys(targets)}
    walk.finish()
    graph = graph_of(walk.nodes, walk.edges.values())
    return Ancestry(found, graph, walk.nodes, tuple(walk.notes))


@dataclass(frozen=True)
class _Wanted:
    """A parent to look up: as it is written, for whom, as of when, how deep, and from where.

    `home` is the local folder whose recipe names it, None for a page of the hub: those never lead
    to folders of this machine."""

    edge: Edge
    as_of: datetime | None
    depth: int
    home: Path | None


class _Walk:
    """Breadth first, so that what is near is looked up before the limits are reached."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.nodes: dict[str, Ancestor] = {}
        self.edges: dict[tuple[str, str, str], Edge] = {}
        self.notes: dict[str, None] = {}
        self.waiting: deque[_Wanted] = deque()
        self.histories: dict[tuple[str, str], list[Commit]] = {}
        self.pages: dict[tuple[str, str], str] = {}  # repository and commit: its node
        self.lacking: dict[str, str] = {}  # what was asked for in vain: why

    def start(self, target: str, as_of: datetime | None) -> str:
        """Look up a target; here everything that is missing is an error."""
        if folder := locate.local(target):
            return self.folder(folder, as_of, 0)
        repo, revision = hub.split(target)
        return self.repo(repo, revision, as_of, 0)

    def finish(self) -> None:
        """Look up parents until none is left."""
        while self.waiting:
            wanted = self.waiting.popleft()
            parent = self.find(wanted)
            child = wanted.edge.child
            if parent == child:
                self.note(child, "names itself as a parent")
                self.nodes[child] = replace(self.nodes[child], complete=False)
                continue
            key = (parent, child, wanted.edge.kind)
            old = self.edges.get(key, replace(wanted.edge, parent=parent, weight=0.0))
            weight, exact = old.weight + wanted.edge.weight, old.exact and wanted.edge.exact
            self.edges[key] = replace(old, weight=weight, exact=exact)

    def find(self, wanted: _Wanted) -> str:
        """The node of a parent, looked up if that has not been done."""
        name, depth = wanted.edge.parent, wanted.depth
        folder = beside(name, wanted.home) if wanted.home else None
        match = REPO.match(name.removeprefix(PAGE).rstrip("/"))
        strange = not match or ".." in name or (wanted.home and "/" not in name)
        repo, revision = (match[1], match[2]) if match else (name, None)
        if strange and not folder:
            return self.absent(name, "a name or folder of its author's machine", depth)
        if limit := self.limit(depth):
            return self.absent(name if folder else repo, f"not looked up: {limit}", depth)
        if folder:
            return self.folder(folder, wanted.as_of, depth)
        key = name.casefold()
        if key not in self.lacking:
            try:
                return self.repo(repo, revision, wanted.as_of, depth)
            except UserError as error:
                why = hub_cards.lacking(error)
                if why is None:
                    raise
                self.lacking[key] = why
        return self.absent(name, self.lacking[key], depth, repo)

    def limit(self, depth: int) -> str:
        """Which limit keeps us from looking any further, in words, or nothing."""
        if depth > self.depth:
            return f"more than {self.depth} generations up"
        ended = len(self.pages) >= MAX_REPOS or len(self.nodes) >= MAX_NODES
        return f"the trace ended after {MAX_REPOS} models" if ended else ""

    def repo(self, repo: str, revision: str | None, as_of: datetime | None, depth: int) -> str:
        """The node of a repository at its time; raises UserError if it cannot be had."""
        commit, when = self.commit(repo, revision, as_of)
        known = self.pages.get((repo, commit))
        if known is not None:
            return known
        page = hub_cards.page(repo, commit)
        page = replace(page, date=hub_cards.iso(when) if when else page.date)
        known = self.pages.get((page.repo, str(page.commit)))
        if known is None:
            name = page.repo
            if name in self.nodes and not self.nodes[name].missing:
                name = f"{name}@{str(page.commit)[:12]}"
            moved = repo if repo.casefold() != page.repo.casefold() else None
            if moved:
                self.note(name, f"was named {moved}")
            say(f"lineage: {name}, commit of {(page.date or 'no date')[:10]}")
            known = self.read(name, page, as_of, depth, None, moved)
        self.pages[repo, commit] = self.pages[page.repo, str(page.commit)] = known
        return known

    def commit(
        self, repo: str, revision: str | None, as_of: datetime | None
    ) -> tuple[str, datetime | None]:
        """The commit that was current then, and its date (None where the history is not known)."""
        branch = revision or "main"
        if (repo, branch) not in self.histories:
            try:
                self.histories[repo, branch] = hub_cards.history(repo, branch)
            except UserError as error:
                why = hub_cards.lacking(error)
                if why in (None, hub_cards.NO_REVISION):
                    raise
                commit = str(hub_cards.page(repo, branch).commit)  # raises if there is none
                self.note(repo, f"{why}: its history is not known, so today's commit is taken")
                return commit, None
        commits = self.histories[repo, branch]
        pinned = bool(revision and COMMIT.match(revision))
        found = hub_cards.current(commits, None if pinned else as_of)
        if found is None:
            self.note(repo, f"was not there yet; its first commit, {commits[-1].id}, is taken")
            found = commits[-1]
        return found.id, found.date

    def folder(self, folder: Path, as_of: datetime | None, depth: int) -> str:
        """The node of a folder of this machine."""
        found = hub_cards.folder_page(folder)
        if not isinstance(found, Page):
            return self.repo(*found, as_of, depth)
        name = shown(found.repo)
        if name not in self.nodes:
            text = merged_here(folder)
            page = replace(found, recipe=text) if text else found
            self.read(name, page, as_of, depth, folder, None)
        return name

    def read(
        self,
        name: str,
        page: Page,
        as_of: datetime | None,
        depth: int,
        home: Path | None,
        moved: str | None,
    ) -> str:
        """Note a model and what its page declares; its parents will be looked up."""
        card = read_card(page.card, name, config=page.recipe or None, date=page.date)
        origin = declared(replace(page, repo=name), card)
        for text in (*page.notes, *origin.notes):
            self.note(name, text)
        self.nodes[name] = Ancestor(
            page.repo,
            page.commit,
            page.date,
            card,
            renamed_from=moved,
            licence=card.licence,
            method=origin.method,
            depth=depth,
            complete=origin.complete,
        )
        for edge in origin.datasets:
            self.edges[edge.parent, name, edge.kind] = edge
        if origin.parents and depth < self.depth:
            as_of = self.made(name, page) or as_of
        self.waiting += [_Wanted(edge, as_of, depth + 1, home) for edge in origin.parents]
        return name

    def made(self, name: str, page: Page) -> datetime | None:
        """When a page's weights were made, for its card may be edited long after; where the hub
        does not tell, the date of the page's own commit."""
        try:
            found = hub_cards.weights_date(page.repo, page.commit) if page.commit else None
        except UserError as error:
            if hub_cards.lacking(error) is None:
                raise
            self.note(name, "when its weights were made is not told: its last commit counts")
            found = None
        return found or (hub_cards.moment(page.date) if page.date else None)

    def absent(self, name: str, why: str, depth: int, repo: str = "") -> str:
        """A node of which nothing is known but the name (unless a model of that name was found),
        and the repository that it means, if it means one."""
        if name not in self.nodes and len(self.nodes) >= MAX_NODES:
            name, why = FURTHER, f"not told apart: the trace ended after {MAX_NODES} names"
        if name not in self.nodes:
            self.nodes[name] = Ancestor(repo or name, missing=why, depth=depth)
            self.note(name, why)
        return name

    def note(self, name: str, text: str) -> None:
        """Something to tell, once."""
        self.notes[f"{name}: {text}"] = None


def merged_here(folder: Path) -> str:
    """The recipe in the record of a merge that mergelab made, or nothing."""
    record = folder / hub_cards.RECORD
    shape = {"recipe": {"text": str}}
    try:
        return str((read_json(record, "", shape) or {"recipe": {"text": ""}})["recipe"]["text"])
    except (UserError, OSError):
        return ""


def beside(name: str, home: Path) -> Path | None:
    """The folder that a recipe of the local folder `home` means: a merge beside it, a model of the
    same study's results, or a path."""
    other = name.removeprefix(locate.PREFIX)
    places = [home.parent / other] if other != name else []
    if re.fullmatch(r"[\w.-]+", name) and not name.startswith("."):
        places.append(home.parent.parent / "models" / name)
    each = (locate.local(str(place)) for place in (*places, name))
    return next((found for found in each if found and found.is_dir()), None)
