"""Folders that appear whole or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mergelab.errors import UserError
from mergelab.folders import alone, move_into_place, partial_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_folder_takes_the_place_of_the_old_one(tmp_path):
    out = tmp_path / "m"
    for text in ("old", "new"):
        partial = partial_folder(out, text)
        (partial / text).write_text(text)
        move_into_place(partial, out)
        assert names(tmp_path) == ["m"]
        assert names(out) == [text]


def test_leftovers_of_the_same_key_are_kept_and_of_another_are_removed(tmp_path):
    (partial_folder(tmp_path / "m", "one") / "half").write_text("half")
    assert names(partial_folder(tmp_path / "m", "one")) == ["half"]
    assert names(partial_folder(tmp_path / "m", "two")) == []
    assert names(tmp_path) == [".m.two.partial"]


def test_leftovers_of_a_model_with_a_longer_name_are_not_touched(tmp_path):
    partial_folder(tmp_path / "m.v2", "one")
    partial_folder(tmp_path / "m", "two")
    assert names(tmp_path) == [".m.two.partial", ".m.v2.one.partial"]


def test_only_one_builds_a_folder_at_a_time_and_the_lock_leaves_no_file(tmp_path):
    inside, most = [], []

    def build() -> None:
        for _ in range(50):
            with alone(tmp_path / "m"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 200
    assert names(tmp_path) == []


def test_a_lock_that_cannot_be_opened_is_told(tmp_path):
    (tmp_path / ".m.lock").mkdir()  # as that of another user
    with pytest.raises(UserError, match=r"\.m\.lock: cannot be locked"), alone(tmp_path / "m"):
        pass
