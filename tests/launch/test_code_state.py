import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.launch.code_state import MOST, PACKAGE, code_state, without_user

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(place: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *words], cwd=place, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def package(tmp_path) -> Path:
    """A package of one module in a checkout of its own, committed."""
    package = tmp_path / "top" / "pipeline"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("a = 1\n")
    (package.parent / "README.md").write_text("read me\n")
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-qm", "first")
    return package


def test_a_clean_checkout_is_its_commit(package, tmp_path):
    code = code_state(package)
    assert code.commit == git(package, "rev-parse", "HEAD").strip()
    assert code.changes == ""
    assert code.keep(tmp_path / "code") is None
    assert not (tmp_path / "code").exists()


def test_the_digest_is_of_the_sources_and_of_nothing_else(package):
    before = code_state(package)
    (package.parent / "README.md").write_text("another\n")
    (package / "data" / "built.so").write_bytes(b"machine code")
    git(package.parent, "commit", "-qam", "second")
    assert code_state(package).digest == before.digest
    assert code_state(package).commit != before.commit
    (package / "data" / "more.py").write_text("")
    assert code_state(package).digest != before.digest


def test_changes_are_kept_once_for_each_state_and_new_files_are_named(package, tmp_path):
    (package / "__init__.py").write_text("a = 2\n")
    (package / "new.py").write_text("")
    code = code_state(package)
    path = code.keep(tmp_path / "code")
    text = path.read_text()
    assert "-a = 1\n+a = 2\n" in text
    assert "new, and not in git: pipeline/new.py\n" in text
    assert code.keep(tmp_path / "code") == path
    assert code.origin == {"commit": code.commit, "changed": True, "changes": path.name, "remote": ""}
    git(package.parent, "checkout", "-q", "pipeline/__init__.py")
    patch = text.partition("new, and")[0]
    subprocess.run(["git", "apply", "-"], cwd=package.parent, input=patch, text=True, check=True)
    assert (package / "__init__.py").read_text() == "a = 2\n"


def test_a_secret_of_the_environment_is_not_in_the_changes(package, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2hunter2")
    (package / "__init__.py").write_text("login('hunter2hunter2')\n")
    assert "login('***')" in code_state(package).changes


def test_another_change_of_the_configs_is_another_file(package, tmp_path):
    conf = package.parent / "conf"
    conf.mkdir()
    paths = set()
    for value in (1, 2):
        (conf / "a.yaml").write_text(f"x: {value}\n")
        git(package, "add", "-N", str(conf))
        paths.add(path := code_state(package).keep(tmp_path / "code"))
        assert f"+x: {value}" in path.read_text()
    assert len(paths) == 2


def test_what_git_does_not_tell_is_unknown_and_not_unchanged(package, monkeypatch):
    monkeypatch.setattr("pipeline.launch.code_state._changes", lambda top, name: None)
    assert "changed" not in code_state(package).origin


def test_an_editors_dangling_link_ends_no_start(package):
    known = code_state(package).digest
    (package / ".#a.py").symlink_to("me@host.1:2")
    (package / "directory.py").mkdir()
    assert code_state(package).digest == known


def test_changes_without_measure_are_counted_and_not_kept(package):
    (package / "__init__.py").write_text("# long\n" * MOST)
    changes = code_state(package).changes
    assert len(changes) < 100
    assert "bytes of changes, more than" in changes


def test_a_package_within_somebody_elses_repository_has_none_of_its_commits(package):
    inner = package / "site-packages" / "pipeline"
    inner.mkdir(parents=True)
    (inner / "__init__.py").write_text("")
    assert code_state(inner, {}).origin == {}
    assert code_state(inner, {"PIPELINE_REVISION": "1a2b"}).origin == {"commit": "1a2b", "remote": ""}


def test_without_git_the_code_is_known_by_its_digest(package, monkeypatch):
    known = code_state(package).digest
    monkeypatch.setenv("PATH", "")
    assert code_state(package, {}) == type(code_state(package))(digest=known)


def test_a_variable_that_points_git_elsewhere_does_not_count(package, monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert code_state(package).commit


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://token:x@host.example/a/b.git", "https://host.example/a/b.git"),
        ("https://token@host.example:8443/a?key=secret#x", "https://host.example:8443/a"),
        ("git@host.example:a/b.git", "git@host.example:a/b.git"),
        ("ssh://me@host.example/a", "ssh://host.example/a"),
        ("https::https://token@host.example/x", ""), ("user:pass@host.example:a", ""), ("https://[bad/x", ""),
        ("/home/me/a", ""), ("../a", ""), ("file:///home/me/a", ""), ("", ""),
    ],
)  # fmt: skip
def test_an_address_keeps_neither_token_nor_directory(url, kept):
    assert without_user(url) == kept


def test_this_package_has_a_digest():
    assert len(code_state(PACKAGE).digest) == 12
