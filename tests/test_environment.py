"""Which commit a number is of."""

import subprocess
from pathlib import Path

import pytest

from running import environment


def git(folder: Path, *args: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=n@example.org")
    command = ["git", *identity, *args]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def repository(folder: Path) -> str:
    """Makes a repository with one commit, and returns that."""
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "--quiet")
    (folder / "file").write_text("content")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    return git(folder, "rev-parse", "HEAD").strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lets the project lie in a folder inside of another repository."""
    repository(tmp_path)
    project = tmp_path / "project"
    (project / "running").mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(project / "running/environment.py"))
    return project


def test_commit_of_another_repository_is_not_recorded(project: Path) -> None:
    assert environment.environment()["git_commit"] is None
    assert not environment.environment()["git_changes"]


def test_own_commit_is_recorded_and_no_program_is_run(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = repository(project)
    monitor = project / "monitor"
    monitor.write_text(f"#!/bin/sh\ntouch {project / 'ran'}\n")
    monitor.chmod(0o755)
    git(project, "config", "core.fsmonitor", str(monitor))
    # As in a hook of another repository, from which a run may be started.
    monkeypatch.setenv("GIT_DIR", str(project.parent / ".git"))
    assert environment.environment()["git_commit"] == commit
    assert not environment.environment()["git_changes"]
    (project / "notes.txt").write_text("of no commit, and no code")
    assert not environment.environment()["git_changes"]
    (project / "method.py").write_text("of no commit")
    assert environment.environment()["git_changes"]
    (project / "method.py").unlink()
    (project / "file").write_text("changed")
    assert environment.environment()["git_changes"]
    assert not (project / "ran").exists()
