"""Downloads from a hub that fails half-way: resumed, repeated, verified, or explained."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from loopback_hub import LoopbackHub
from safetensors.numpy import save

from mergelab import hub, hub_errors, models
from mergelab.errors import UserError
from mergelab.study_file import load_study

WEIGHTS = "model.safetensors"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"version": "1.0"}',
    WEIGHTS: save({"w": np.random.default_rng(0).normal(size=500_000).astype(np.float32)}),
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    from huggingface_hub import constants

    with LoopbackHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(hub_errors, "WAITS", (0.05, 0.05, 0.05, 0.05))
        monkeypatch.setattr("time.sleep", lambda seconds: waits.append(seconds))
        monkeypatch.chdir(tmp_path)
        waits.clear()
        yield server


waits: list[float] = []


def study_of(commit: str, name: str = "x") -> Path:
    folder = Path("recipes") / name
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(f"title: T\nmodels:\n  m: {{hub: acme/m@{commit}}}\n")
    return folder


def fetch(folder: Path) -> Path:
    out = Path("results") / folder.name / "models/m"
    models.fetch(load_study(folder), "m", out)
    return out


def whole(out: Path) -> bool:
    return {path.name for path in out.iterdir()} == {*FILES, "source.json"} and all(
        (out / name).read_bytes() == data for name, data in FILES.items()
    )


@pytest.mark.parametrize("seed", range(10))
def test_a_cut_connection_is_resumed_at_any_offset(server: LoopbackHub, seed: int) -> None:
    draw = random.Random(seed)
    folder = study_of(server.publish("acme/m", FILES))
    server.cuts[WEIGHTS] = [draw.randrange(1, 1_000_000) for _ in range(2)]
    assert whole(fetch(folder))
    assert server.cuts[WEIGHTS] == []


def test_a_busy_hub_is_asked_again_after_the_time_it_names(server: LoopbackHub) -> None:
    folder = study_of(server.publish("acme/m", FILES))
    server.answers = [(429, {"Retry-After": "7"})]
    assert whole(fetch(folder))
    assert any(7 <= wait <= 8 for wait in waits)


def test_bursts_of_server_errors_are_waited_out(server: LoopbackHub) -> None:
    folder = study_of(server.publish("acme/m", FILES))
    server.answers = [(500, {}), (503, {}), (502, {})]
    assert whole(fetch(folder))


def test_a_burst_within_the_files_keeps_what_has_arrived(server: LoopbackHub) -> None:
    folder = study_of(server.publish("acme/m", FILES))
    server.cuts[WEIGHTS] = [100_000] * 3
    server.sizeless = {"config.json"}
    assert whole(fetch(folder))


def test_a_hub_that_stays_broken_is_explained_and_nothing_is_left(server: LoopbackHub) -> None:
    folder = study_of(server.publish("acme/m", FILES))
    server.status = 500
    with pytest.raises(UserError, match=r"HTTP 500.*run the command again later"):
        fetch(folder)
    assert not Path("results/x/models/m").exists()


def test_files_may_come_from_another_host_which_sees_no_token(server: LoopbackHub) -> None:
    commit = server.publish("acme/m", FILES)
    with LoopbackHub() as other:
        other.repos = server.repos
        server.elsewhere = other.url.replace("127.0.0.1", "localhost")
        os.environ["HF_TOKEN"] = server.token
        try:
            assert whole(fetch(study_of(commit)))
        finally:
            del os.environ["HF_TOKEN"]
        assert any(WEIGHTS in request for request in other.requests)
        assert any(WEIGHTS in request for request in server.authorized)
        assert other.authorized == []  # the token is the hub's alone


def test_a_file_of_unannounced_length_is_verified(server: LoopbackHub) -> None:
    folder = study_of(server.publish("acme/m", FILES))
    server.sizeless = set(FILES)
    assert whole(fetch(folder))


def test_a_slow_link_is_waited_for(server: LoopbackHub) -> None:
    folder = study_of(server.publish("acme/m", FILES))
    server.pause = 0.02
    assert whole(fetch(folder))


def test_two_studies_share_one_copy_of_a_model(server: LoopbackHub) -> None:
    commit = server.publish("acme/m", FILES)
    one = fetch(study_of(commit, "one"))
    server.requests.clear()
    two = fetch(study_of(commit, "two"))
    assert whole(two)
    assert os.path.samefile(one / WEIGHTS, two / WEIGHTS)
    assert not any("resolve" in request for request in server.requests)


def test_a_damaged_copy_of_another_study_is_not_taken(server: LoopbackHub) -> None:
    commit = server.publish("acme/m", FILES)
    one = fetch(study_of(commit, "one"))
    data = (one / WEIGHTS).read_bytes()
    (one / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert whole(fetch(study_of(commit, "two")))


def test_check_verifies_every_byte_without_a_hub(server: LoopbackHub) -> None:
    folder = study_of(server.publish("acme/m", FILES))
    out = fetch(folder)
    study = load_study(folder)
    server.requests.clear()
    assert models.check(study, "m", Path("results/x")) == []
    data = (out / WEIGHTS).read_bytes()
    (out / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (out / "config.json").unlink()
    found = models.check(study, "m", Path("results/x"))
    assert found == ["config.json is missing", f"{WEIGHTS} has another sha256 than was pinned"]
    assert server.requests == []


def test_check_looks_at_hub_models_that_only_recipes_name(
    server: LoopbackHub, mergelab: Run
) -> None:
    folder = study_of(server.publish("acme/m", FILES))
    other = f"acme/other@{server.publish('acme/other', FILES)}"
    entry = f"{{model: {other}, parameters: {{weight: 1}}}}"
    (folder / "one.yaml").write_text(f"merge_method: linear\nmodels: [{entry}]\n")
    fetch(folder)
    assert mergelab("fetch", folder, "one").returncode == 0
    server.stop()
    said = mergelab("fetch", folder, "--check")
    assert (said.returncode, f"as pinned: m, {other}" in said.stderr) == (0, True), said.stderr
    (out,) = Path("results/x/models").glob("acme--other--*")
    (out / "config.json").unlink()
    said = mergelab("fetch", folder, "--check")
    assert (said.returncode, f"{out}: config.json is missing" in said.stderr) == (2, True)
    assert mergelab("fetch", folder, "m", "--check").returncode == 0


def test_check_of_a_model_that_was_never_fetched_says_so(server: LoopbackHub) -> None:
    study = load_study(study_of(server.publish("acme/m", FILES)))
    with pytest.raises(UserError, match="Fetch it first"):
        models.check(study, "m", Path("results/x"))


def test_the_source_note_names_repository_and_commit(server: LoopbackHub) -> None:
    commit = server.publish("acme/m", FILES)
    note = json.loads((fetch(study_of(commit)) / hub.SOURCE).read_text())
    assert (note["hub"], note["commit"]) == ("acme/m", commit)
