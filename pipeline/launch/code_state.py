"""The code that a start runs: a digest that tells it from any other, its commit, and what differs from that."""

from __future__ import annotations

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
    `git diff` writes them; where they are more than MOST bytes, a line that says so.
    """

    digest: str
    commit: str = ""
    changes: str = ""
    remote: str = ""  # the address of the repository, without what it holds of names and passwords

    @property
    def origin(self) -> dict[str, object]:
        """Where it comes from, as run.json has it."""
        return {"commit": self.commit, "changed": bool(self.changes), "remote": self.remote} if self.commit else {}

    def keep(self, directory: Path) -> Path | None:
        """Write the changes into a directory, once for each state; returns where they are, None if there are none."""
        if not self.changes:
            return None
        path = directory / f"{self.digest}.diff"
        if not path.exists():
            directory.mkdir(exist_ok=True)
            path.write_text(self.changes)
        return path


def code_state(package: Path = PACKAGE, environment: Mapping[str, str] = os.environ) -> CodeState:
    """Of a package, in a checkout of its own or wherever it is installed. Never fails: what git refuses is unknown."""
    digest = _digest(package)
    top = package.parent
    if _git(top, "rev-parse", "--show-toplevel").strip() != str(top):  # a package within somebody else's repository
        return CodeState(digest, commit=environment.get(REVISION, ""))
    return CodeState(
        digest,
        commit=_git(top, "rev-parse", "--verify", "HEAD").strip(),
        changes=_changes(top, package.name),
        remote=without_user(_git(top, "remote", "get-url", "origin").strip()),
    )


def _digest(package: Path) -> str:
    """12 hex digits. Sources alone: what they were compiled to differs between machines."""
    whole = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in package.rglob(pattern)):
        whole.update(f"{path.relative_to(package)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:12]


def _changes(top: Path, name: str) -> str:
    """To the last commit: the diff of what git knows, and the names of what it does not."""
    places = ("--", name, "conf")
    diff = _git(top, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD", *places)
    new = _git(top, "ls-files", "--others", "--exclude-standard", *places).splitlines()
    if len(diff) > MOST:
        diff = f"{len(diff)} bytes of changes, more than the {MOST} that are kept\n"
    return without_secrets(diff) + "".join(f"new, and not in git: {path}\n" for path in new)


def without_user(url: str) -> str:
    """An address without user name and password: a token may be either. "" for a directory of this machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in ("", "file"):
        return url if re.match(r"[\w.-]+@[\w.-]+:", url) else ""  # git@host:path, of ssh, which has no password in it
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _git(top: Path, *words: str) -> str:
    """What git answers, "" where it refuses, hangs or is not there. Variables that point it elsewhere do not count."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *words], cwd=top, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, check=True, timeout=_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace")
