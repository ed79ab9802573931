"""run.json: what a run was made with."""

from __future__ import annotations

import json
import subprocess

from llmtrain.tracking.facts import git_state, package_versions, record_start


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    subprocess.run(command, check=True, capture_output=True)


def test_every_start_is_kept_with_its_command_line(tmp_path):
    record_start(
        tmp_path, attempt=1, command_line=["llmtrain", "train", "run.name=a b"], extra={"world_size": 2}
    )
    record_start(tmp_path, attempt=2, command_line=["llmtrain", "train"])
    first, second = json.loads((tmp_path / "run.json").read_text())["attempts"]
    assert first["command_line"] == "llmtrain train 'run.name=a b'"
    assert first["world_size"] == 2
    assert (first["attempt"], second["attempt"]) == (1, 2)
    for fact in ("git_commit", "git_dirty", "versions", "python", "platform", "host", "cpu", "num_cpus"):
        assert fact in second
    assert first["started"] <= second["started"]
    assert second["memory_bytes"] > 2**27


def test_versions_name_only_what_is_installed():
    versions = package_versions()
    assert versions["numpy"]
    assert all(versions.values())


def test_the_commit_is_that_of_the_tree_that_tracks_the_folder(tmp_path):
    assert git_state(tmp_path) == (None, None)
    git(tmp_path, "init", "-q")
    (tmp_path / "__init__.py").write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "m")
    commit, is_dirty = git_state(tmp_path)
    assert len(commit) == 40
    assert is_dirty is False
    (tmp_path / "__init__.py").write_text("changed")
    assert git_state(tmp_path) == (commit, True)


def test_a_package_inside_a_repository_that_does_not_track_it_has_no_commit(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "m")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "__init__.py").write_text("")
    assert git_state(tmp_path / "site") == (None, None)


def test_a_git_that_hangs_or_is_missing_is_no_error(tmp_path, monkeypatch):
    def hang(*arguments, **settings):
        raise subprocess.TimeoutExpired("git", settings["timeout"])

    monkeypatch.setattr("llmtrain.tracking.facts.subprocess.run", hang)
    assert git_state(tmp_path) == (None, None)
