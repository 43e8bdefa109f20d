"""The code that a start runs: a digest that tells it from any other, its commit, and what differs from that."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.launch.redaction import without_secrets

REVISION = "PIPELINE_REVISION"  # set in our image, whose build names the commit: there is no checkout in it
CODE = "code"  # in a run's directory: what its starts ran that no commit has
PACKAGE = Path(__file__).resolve().parents[1]
MOST = 1_000_000  # bytes of changes that are kept
_SOURCES = ("*.py", "*.c")
_SECONDS = 10.0  # for an answer of git, which may have to look through a slow file system


@dataclass(frozen=True, slots=True)
class CodeState:
    """digest: of the package's sources. commit: "" where none is known. changes: to it, of the package and conf/, as
    `git diff` writes them; where they are more than MOST bytes, a line that says so; None where git did not tell.
    """

    digest: str
    commit: str = ""
    changes: str | None = None
    remote: str = ""  # the address of the repository, without what it holds of names and passwords

    @property
    def origin(self) -> dict[str, object]:
        """Where it comes from, as run.json has it."""
        if not self.commit:
            return {}
        known: dict[str, object] = {"commit": self.commit, "remote": self.remote}
        if self.changes is not None:
            known["changed"] = bool(self.changes)
        return known | ({"changes": self._file} if self.changes else {})

    @property
    def _file(self) -> str:
        """The name of its changes: of what was changed, and in which commit."""
        return hashlib.sha256(f"{self.commit}\n{self.changes}".encode()).hexdigest()[:12] + ".diff"

    def keep(self, directory: Path) -> Path | None:
        """Write the changes into a directory, once for each state; returns where they are, None if there are none."""
        if not self.changes:
            return None
        path = directory / self._file
        if not path.exists():
            directory.mkdir(exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(self.changes, encoding="utf-8")
            temporary.replace(path)
        return path


def code_state(package: Path = PACKAGE, environment: Mapping[str, str] = os.environ) -> CodeState:
    """Of a package, in a checkout of its own or wherever it is installed. Never fails: what git refuses is unknown."""
    digest = _digest(package)
    top = package.parent
    commit = (_git(top, "rev-parse", "--verify", "HEAD") or "").strip()
    if not commit or (_git(top, "rev-parse", "--show-toplevel") or "").strip() != str(top):
        return CodeState(digest, commit=environment.get(REVISION, ""))  # or within somebody else's repository
    remote = without_user((_git(top, "remote", "get-url", "origin") or "").strip())
    return CodeState(digest, commit, _changes(top, package.name), remote)


def _digest(package: Path) -> str:
    """12 hex digits. Sources alone: what they were compiled to differs between machines."""
    whole = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in package.rglob(pattern)):
        with contextlib.suppress(OSError):  # a link that an editor makes, a file that it just takes away
            whole.update(f"{path.relative_to(package)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:12]


def _changes(top: Path, name: str) -> str | None:
    """To the last commit: the diff of what git knows, and the names of what it does not."""
    places = ("--", name, "conf")
    diff = _git(top, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD", *places)
    new = _git(top, "ls-files", "--others", "--exclude-standard", *places)
    if diff is None or new is None:
        return None
    if len(diff) > MOST:
        diff = f"{len(diff)} bytes of changes, more than the {MOST} that are kept\n"
    return without_secrets(diff) + "".join(f"new, and not in git: {path}\n" for path in new.splitlines())


def without_user(url: str) -> str:
    """An address without user name and password: a token may be either. "" for what is no address of a server."""
    if re.fullmatch(r"[\w.-]+@[\w.-]+:[^@\s]*", url):  # git@host:path, of ssh, which has no password in it
        return without_secrets(url)
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return ""
    if parts.scheme not in ("http", "https", "ssh", "git") or not parts.netloc:
        return ""
    return without_secrets(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl())


def _git(top: Path, *words: str) -> str | None:
    """What git answers; None where it refuses, hangs or is not there. What points it elsewhere does not count."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *words], cwd=top, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, check=True, timeout=_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")
