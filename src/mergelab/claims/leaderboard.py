"""Result files of leaderboards: Open LLM Leaderboard v1 (lighteval), v2 and other lm-eval JSON.

Raw scores only: what a leaderboard rescales or averages afterwards is not in these files. They
are untrusted: read within limits, and what cannot be read is a problem, told by its key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mergelab.claims import names
from mergelab.claims.base import Claim
from mergelab.claims.entries import MOST_CLAIMS, first_items, own_unit, shots_of
from mergelab.claims.numbers import Digits, Printed, read_number
from mergelab.errors import UserError
from mergelab.yamlfile import MAX_DEPTH

LONGEST = 20_000_000  # characters of a file
SUBJECTS = 57  # of MMLU; the leaderboard shows the mean of their scores, not of their items
_V1 = re.compile(
    r"(?:harness|leaderboard|lighteval|original)\|([\w:.-]{1,100})\|(\d{1,3})(?:\|\d)?\Z"
)
_SUBJECT = re.compile(r"(?:hendrycksTest-|mmlu:)(\w+)\Z")
_DTYPE = re.compile(r"(?:torch\.)?(float32|float16|bfloat16|float64|8bit|4bit|GPTQ)\Z")
_ARGS = re.compile(r"(?:^|,)\s*(\w+)=([^,]*)")


@dataclass(frozen=True)
class Results:
    """The claims of one results file, and what of it could not be read."""

    claims: tuple[Claim, ...]
    problems: tuple[str, ...]


def read_results(text: str, where: str, model: str | None = None) -> Results:
    """Read a results JSON; `where` names the file, `model` overrides the name in it.

    Raises UserError if it is no JSON, too large, nested too deep, or holds no results."""
    top = _load(text, where)
    results = top.get("results")
    if not isinstance(results, dict) or not results:
        raise UserError(
            f"{where}: holds no 'results'. Give a results_*.json of lm-eval or of the Open LLM "
            "Leaderboard."
        )
    first = isinstance(top.get("config_general"), dict) or any(_V1.match(key) for key in results)
    reader = (_First if first else _Second)(top, where, model)
    claims: list[Claim] = []
    for claim in reader.claims():
        if len(claims) == MOST_CLAIMS:
            reader.problems.append(f"{where}: only the first {MOST_CLAIMS:,} scores were read.")
            break
        claims.append(claim)
    return Results(tuple(claims), tuple(dict.fromkeys(reader.problems))[:100])


def _load(text: str, where: str) -> dict[str, Any]:
    if len(text) > LONGEST:
        raise UserError(f"{where}: larger than {LONGEST:,} characters, too large for results.")
    try:
        top = json.loads(text, parse_float=Digits, parse_int=_integer, parse_constant=str)
    except RecursionError:
        raise UserError(f"{where}: nested deeper than {MAX_DEPTH} levels.") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}.") from None
    if not isinstance(top, dict):
        raise UserError(f"{where}: the top level must be a JSON object.")
    return top


def _integer(text: str) -> int | str:
    return int(text) if len(text) < 20 else text


class _Reader:
    """What both kinds of file have in common."""

    def __init__(self, top: Mapping[str, Any], where: str, model: str | None) -> None:
        self.top, self.where, self.problems = top, where, list[str]()
        self.general = self.map(top, "config_general") or self.map(top, "config")
        self.args = self.arguments()
        self.model = model or self.named() or "unknown"
        if self.model == "unknown":
            self.problems.append(f"{where}: does not say which model was scored.")

    def map(self, map: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        value = map.get(key)
        return value if isinstance(value, dict) else {}

    def text(self, value: Any, longest: int = 200) -> str | None:
        return value.strip()[:longest] or None if isinstance(value, str) else None

    def arguments(self) -> dict[str, Any]:
        """lm-eval's model_args: "pretrained=org/name,dtype=bfloat16", or a mapping."""
        given = self.general.get("model_args")
        if isinstance(given, str):
            return dict(_ARGS.findall(given[:5_000]))
        return dict(given) if isinstance(given, dict) else {}

    def named(self) -> str | None:
        known = (self.general.get("model_name"), self.top.get("model_name"))
        named = (*known, self.args.get("pretrained"), self.args.get("peft"))
        return next((text for text in map(self.text, named) if text), None)

    def dtype(self) -> str | None:
        told = (self.general.get("model_dtype"), self.args.get("dtype"))
        texts = (self.text(value) for value in told)
        return next((m[1] for text in texts if text and (m := _DTYPE.match(text))), None)

    def commit(self) -> str | None:
        told = (self.general.get("model_sha"), self.args.get("revision"))
        texts = (self.text(value) for value in told)
        return next((t for t in texts if t and re.fullmatch(r"[0-9a-f]{7,40}", t)), None)

    def claim(self, key: str, benchmark: str, metric: str, value: Any, **more: Any) -> Claim | None:
        """A claim, or a problem where the value is no number or no share of right answers."""
        number = read_number(value)
        place = f"{self.where}: results.{key[:80]}.{metric[:40]}"
        own = own_unit(benchmark, metric)
        if number is None or (not own and not 0 <= number.value <= 1):
            self.problems.append(f"{place}: {str(value)[:40]!r} is no score: not taken.")
            return None
        common = {"model": self.model, "dtype": self.dtype(), "commit": self.commit()}
        return Claim(
            benchmark=benchmark,
            value=number.value,
            printed=number.text,
            percent=False,
            source=self.where,
            published=key[: names.LONGEST],
            metric=metric[:80],
            **common | more,
        )


class _First(_Reader):
    """Open LLM Leaderboard v1: keys such as harness|arc:challenge|25."""

    def claims(self) -> Iterator[Claim]:
        subjects: dict[str, Printed] = {}
        shots = None
        for key, scores in self.top["results"].items():
            match = _V1.match(key)
            if match is None or not isinstance(scores, dict):
                continue
            subject, number = _SUBJECT.match(match[1]), read_number(scores.get("acc"))
            if subject and number and 0 <= number.value <= 1:
                subjects[subject[1]], shots = number, int(match[2])
            elif not subject:
                yield from self.task(key, match, scores)
        yield from self.mmlu(subjects, shots)

    def task(self, key: str, match: re.Match[str], scores: Mapping[str, Any]) -> Iterator[Claim]:
        """Every metric of a task; GSM8K's accuracy is today's exact_match of strict-match."""
        for metric, value in scores.items():
            if "stderr" in metric:
                continue
            board = names.find(key, names.BOARDS[0], metric)
            told = names.metric_of(metric) or metric
            if board.metric == "exact_match" and told == "acc":
                told = board.metric
            more = {"shots": int(match[2]), "filter": board.filter, "split": self.part()}
            claim = self.claim(key, board.benchmark, told, value, **more)
            if claim is not None:
                yield claim

    def mmlu(self, subjects: Mapping[str, Printed], shots: int | None) -> Iterator[Claim]:
        """The leaderboard's MMLU: the unweighted mean of its 57 subjects."""
        if not subjects:
            return
        if len(subjects) != SUBJECTS:
            what = f"has {len(subjects)} subjects of MMLU, not {SUBJECTS}"
            self.problems.append(f"{self.where}: {what}: no score of MMLU was taken.")
            return
        mean = sum(number.value for _, number in sorted(subjects.items())) / SUBJECTS
        more = {"shots": shots, "split": self.part()}
        claim = self.claim("harness|hendrycksTest|5", "mmlu", "acc", mean, **more)
        if claim is not None:
            yield claim

    def part(self) -> str | None:
        """The items of each task of a run that was told to leave some out: the first after a
        shuffle, so not those of lm-eval's `limit`."""
        limit = read_number(self.general.get("max_samples"))
        part = None if limit is None else first_items(limit.value)
        return part and f"[shuffled{part[1:]}"


class _Second(_Reader):
    """lm-eval, and so Open LLM Leaderboard v2: metric keys such as "acc_norm,none"."""

    def claims(self) -> Iterator[Claim]:
        for task, scores in self.top["results"].items():
            if not isinstance(scores, dict):
                self.problems.append(f"{self.where}: results.{task[:80]} is no mapping: not read.")
                continue
            more = self.protocol(task)
            for key, value in scores.items():
                metric, _, kind = key.partition(",")
                if "stderr" in metric or metric in ("alias", "name", "sample_len", "samples", ""):
                    continue
                kind = kind if kind != "none" else ""
                claim = self.claim(task, task[:200], metric, value, filter=kind or None, **more)
                if claim is not None:
                    yield claim

    def protocol(self, task: str) -> dict[str, Any]:
        shots = self.map(self.top, "n-shot").get(task)
        version = self.map(self.top, "versions").get(task)
        template = self.top.get("chat_template") or self.top.get("chat_template_sha")
        known = "chat_template" in self.top or "chat_template_sha" in self.top
        return {
            "split": self.part(task),
            "shots": shots_of(shots),
            "task_version": _version(version),
            "chat_template": bool(template) if known else None,
            "date": _day(self.top.get("date")),
        }

    def part(self, task: str) -> str | None:
        """The items of a run that was told to leave some out: "test[:100]"; of a group "[:100]"."""
        counted = self.map(self.map(self.top, "n-samples"), task)
        if not counted:
            limit = read_number(self.general.get("limit"))
            return None if limit is None else first_items(limit.value)
        seen, whole = counted.get("effective"), counted.get("original")
        if type(seen) is not int or type(whole) is not int or seen >= whole:
            return None
        part = first_items(seen)
        settings = self.map(self.map(self.top, "configs"), task)
        told = settings.get("test_split") or settings.get("validation_split")
        return f"{self.text(told, 40) or ''}{part}" if part else None


def _version(value: Any) -> str | None:
    if isinstance(value, Digits):
        return value.text
    return str(value)[:40] if isinstance(value, int | str) and str(value) != "N/A" else None


def _day(value: Any) -> str | None:
    """lm-eval's time, in seconds, as a date (UTC)."""
    number = read_number(value)
    if number is None or not 0 < number.value < 1e11:
        return None
    return datetime.fromtimestamp(number.value, UTC).date().isoformat()
