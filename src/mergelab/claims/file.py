"""claims.yaml: published scores written down by hand, read strictly into frozen data."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergelab.claims import names
from mergelab.claims.base import Claim
from mergelab.claims.cards import read_card
from mergelab.claims.entries import DATE, own_unit
from mergelab.claims.leaderboard import read_results
from mergelab.claims.numbers import PlainLoader, Printed, in_percent, read_number
from mergelab.errors import UserError, nearest
from mergelab.study import CLAIMS
from mergelab.study_file import load_study
from mergelab.yamlfile import Map, Reader, parse, read

KEYS = ("title", "source", "date", "protocol", "study", "models", "claims", "comparisons")
PROTOCOL = ("metric", "filter", "shots", "task_version", "chat_template", "dtype", "split")
SHARED = (*PROTOCOL, "percent", "source", "date", "commit")  # of the protocol and of one claim
HUB = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}(?:@[\w./-]{1,200})?\Z")
MOST_BYTES = 20_000_000  # of a card or results file


@dataclass(frozen=True)
class Subject:
    """A model that claims are about: `at` is org/name[@commit] or a folder.

    `recipe` is the claimed recipe; `base` and `candidates` are what it may have been made of."""

    name: str
    at: str
    recipe: Path | None = None
    base: str | None = None
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A claimed order: `model` scores better than `than` on a benchmark."""

    model: str
    than: str
    benchmark: str


@dataclass(frozen=True)
class ClaimsFile:
    """A claims file; `study` is the folder whose suite and data score the models again."""

    path: Path
    title: str
    study: Path | None
    models: dict[str, Subject]
    claims: tuple[Claim, ...]
    comparisons: tuple[Comparison, ...]
    problems: tuple[str, ...] = ()  # of the cards and results files that it takes claims from


def load_claims(path: Path) -> ClaimsFile:
    """Read a claims file, or the claims.yaml of a folder.

    Raises UserError with every mistake, each with file and line."""
    path = path / CLAIMS if path.is_dir() else path
    top = parse(read(path), path, PlainLoader)
    reader = _ClaimsReader(path)
    found = reader.file(top)
    reader.problems.raise_if_any()
    return found


class _ClaimsReader(Reader):
    def file(self, top: Map) -> ClaimsFile:
        self.keys(top, KEYS, "a claims file")
        self.taken: list[str] = []
        self.study, variants = self.studied(top)
        self.models = {name: self.subject(name, map) for name, map in self.named(top, "models")}
        self.known = (*self.models, *variants)
        shared = self.map(top, "protocol", None)
        self.keys(shared, SHARED, "protocol")
        self.shared = self.protocol(shared) | self.origin(top)
        title = self.text(top, "title")
        claims = self.claims(self.maps(top, "claims"))
        orders = tuple(self.comparison(map) for map in self.maps(top, "comparisons", None))
        problems = tuple(self.taken)
        return ClaimsFile(self.path, title, self.study, self.models, claims, orders, problems)

    def studied(self, top: Map) -> tuple[Path | None, tuple[str, ...]]:
        """The study's folder and variants: beside the file, or where `study` says."""
        folder, told = self.path.parent, self.text(top, "study", None)
        beside = (folder / "study.yaml").is_file() and self.path.name == CLAIMS
        if told is not None and beside:
            self.wrong(top.lines["study"], "this file lies in a study already: remove 'study'.")
        if told is not None and not beside:
            folder = folder / Path(told).expanduser()
        if told is None and not beside:
            return None, ()
        if not (folder / "study.yaml").is_file():
            self.wrong(top.lines["study"], f"there is no study.yaml in {told}. Check the path.")
            return None, ()
        return folder, load_study(folder).variants

    def named(self, top: Map, key: str) -> list[tuple[str, Map]]:
        section = self.map(top, key, None)
        for name, value in section.items():
            if not isinstance(value, Map):
                self.wrong(section.lines[name], f"'{name}' must be a mapping (key: value).")
        return [(name, value) for name, value in section.items() if isinstance(value, Map)]

    def subject(self, name: str, map: Map) -> Subject:
        self.keys(map, ("at", "recipe", "base", "candidates"), "a model")
        base = self.text(map, "base", None)
        recipe = self.inside(map, "recipe") if "recipe" in map else None
        others = self.texts(map, "candidates", None)
        line = map.lines.get("candidates", map.line)
        return Subject(
            name,
            self.place(self.text(map, "at"), map.lines.get("at", map.line)),
            recipe,
            self.place(base, map.lines["base"]) if base is not None else None,
            tuple(self.place(other, line) for other in others),
        )

    def place(self, text: str | None, line: int) -> str:
        """A hub id as it stands, a folder relative to the file; one that exists goes first."""
        if text is None:
            return ""
        folder = self.path.parent / Path(text).expanduser()
        if folder.is_dir():
            return str(folder)
        if text.startswith((".", "/", "~")) or not HUB.match(text):
            what = f"'{text}' is neither a folder nor a model of the hub (org/name@commit)"
            self.wrong(line, f"{what}. Check the path.")
        return text

    def inside(self, map: Map, key: str) -> Path | None:
        """A file in the folder of the claims file."""
        name: str | None = self.text(map, key)
        if name is None:
            return None
        folder = self.path.parent.resolve()
        path = self.path.parent / name
        if not path.resolve().is_relative_to(folder):
            self.wrong(map.lines[key], f"'{name}' leads out of the folder of this file.")
        elif not path.is_file():
            self.wrong(map.lines[key], f"there is no file {name} beside this file. Check the path.")
        else:
            return path
        return None

    def protocol(self, map: Map) -> dict[str, Any]:
        """What `protocol` or a claim says of how it was scored; only what is given."""
        metric, _, kind = (self.text(map, "metric", None) or "").partition(",")
        told = {
            "metric": names.metric_of(metric),
            "filter": self.text(map, "filter", kind or None),
            "shots": self.count(map, "shots", None),
            "task_version": self.version(map),
            "chat_template": self.get(map, "chat_template", bool, None),
            "dtype": self.text(map, "dtype", None),
            "split": self.text(map, "split", None),
            "percent": self.get(map, "percent", bool, None),
        }
        return {key: value for key, value in told.items() if value is not None} | self.origin(map)

    def version(self, map: Map) -> str | None:
        value = self.get(map, "task_version", (str, int, float), None)
        return None if value is None else getattr(value, "text", str(value))

    def origin(self, map: Map) -> dict[str, Any]:
        told = {key: self.text(map, key, None) for key in ("source", "date", "commit")}
        if told["date"] is not None and not DATE.match(told["date"]):
            self.wrong(map.lines["date"], "'date' must be a date such as 2024-03-31.")
        return {key: value for key, value in told.items() if value is not None}

    def claims(self, maps: list[Map]) -> tuple[Claim, ...]:
        """All claims. Where nothing says "percent", they are together what `in_percent` finds."""
        numbers = [(map, self.number_of(map)) for map in maps if "from" not in map]
        shares = [n for map, n in numbers if n and not self.own(map)]
        percent = in_percent(shares)
        found: list[Claim] = []
        for map in maps:
            if "from" in map:
                found += self.taken_from(map)
            elif (claim := self.claim(map, percent)) is not None:
                found.append(claim)
        return tuple(found)

    def own(self, map: Map) -> bool:
        metric = map.get("metric") or self.shared.get("metric")
        return own_unit(str(map.get("benchmark")), metric if isinstance(metric, str) else None)

    def number_of(self, map: Map) -> Printed | None:
        number = read_number(map.get("value"))
        if number is None and map.get("value") is not None:
            line = map.lines["value"]
            self.wrong(line, f"'value' must be a number as published, not {map['value']!r}.")
        return number

    def claim(self, map: Map, percent: bool) -> Claim | None:
        self.keys(map, ("model", "benchmark", "value", *SHARED), "a claim")
        told = self.shared | self.protocol(map)
        model, benchmark = self.model(map, "model"), self.text(map, "benchmark")
        number = self.number_of(map)
        if "value" not in map:
            self.wrong(map.line, "'value' is missing.")
        if model is None or benchmark is None or number is None:
            return None
        meaning = names.find(benchmark)
        own = self.own(map)
        percent = not own and (number.percent or told.pop("percent", percent))
        told.pop("percent", None)
        value = number.value / 100 if percent else number.value
        if not own and not 0 <= value <= 1:
            what = f"{number.text} is no {'percentage' if percent else 'share'} of right answers"
            self.wrong(map.lines["value"], f"{what}. Say percent: true or false, or mend it.")
        told = {"metric": meaning.metric, "shots": meaning.shots} | told
        place = f"{self.path}:{map.line}"
        source = told.pop("source", place)
        return Claim(
            model=model,
            benchmark=meaning.benchmark,
            value=value,
            printed=number.text,
            percent=percent,
            source=source,
            published=benchmark,
            **told,
        )

    def model(self, map: Map, key: str) -> str | None:
        """A model of the file, a variant of the study, or a hub id."""
        name: str | None = self.text(map, key)
        if name is not None and name not in self.known and not HUB.match(name):
            hint = nearest(name, self.known)
            listed = ", ".join(self.known) or "none"
            self.wrong(map.lines[key], f"there is no model '{name}'.{hint}\n  Models: {listed}.")
        return name

    def taken_from(self, map: Map) -> list[Claim]:
        """The claims of a card (*.md) or a results file (*.json) that lies beside the file."""
        self.keys(map, ("from", "model"), "an entry with 'from'")
        path = self.inside(map, "from")
        model = self.model(map, "model") if "model" in map else None
        if path is None:
            return []
        try:
            return self.parsed(path, map["from"], model)
        except UserError as error:
            self.wrong(map.lines["from"], str(error))
            return []

    def parsed(self, path: Path, where: str, model: str | None) -> list[Claim]:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES)
        text = data.decode("utf-8", errors="replace")
        if path.suffix == ".json":
            results = read_results(text, where, model)
            self.taken += results.problems
            return list(results.claims)
        if path.suffix != ".md" or model is None:
            raise UserError(
                f"'from' takes a results file (.json), or a card (.md) with 'model', not {where}."
            )
        repo = self.models[model].at if model in self.models else model
        card = read_card(text, repo.partition("@")[0], where=where)
        self.taken += card.problems
        return [replace(claim, model=model) for claim in card.claims]

    def comparison(self, map: Map) -> Comparison:
        self.keys(map, ("model", "than", "benchmark"), "a comparison")
        model, than = self.model(map, "model"), self.model(map, "than")
        benchmark = self.text(map, "benchmark")
        if model is not None and model == than:
            self.wrong(map.line, f"'{model}' is compared with itself.")
        return Comparison(str(model), str(than), names.find(str(benchmark)).benchmark)
