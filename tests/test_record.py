"""Records: atomic, and only one key of a name at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergelab.record import file_sha256, write_bytes, write_json, write_record

OLD, NEW = "0" * 12, "f" * 12


def test_a_record_replaces_those_of_its_name_under_other_keys_only(tmp_path: Path) -> None:
    others = ["merge-a.b.json", f"merge-a.b.{OLD}.json", "lock.json", f"merge-ab.{OLD}.json"]
    for name in (*others, f"merge-a.{OLD}.json"):
        (tmp_path / name).write_text("{}")
    write_record(tmp_path / f"merge-a.{NEW}.json", {"x": 1})
    assert {path.name for path in tmp_path.iterdir()} == {*others, f"merge-a.{NEW}.json"}


def test_a_record_without_a_key_touches_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text("{}")
    write_record(tmp_path / "x.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"lock.json", "x.json"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "r.json", {"a": float("nan")})
    with pytest.raises(TypeError):
        write_bytes(tmp_path / "r.json", "text")  # type: ignore[arg-type]
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_file_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "f") == known
