"""What the project is made of besides itself: pins, hashes, known faults, licences. `make audit` runs it.

    python requirements/audit.py [FILE...]     # default: every requirement file beside this one
    python requirements/audit.py --licences    # the licence of everything that is installed of runtime.txt

Exit codes: 0 = nothing found; 1 = a fault, each in a line; 2 = usage; 4 = no fault, but the service of vulnerabilities
could not be asked. Licences are read from what is installed and written nowhere: a list in the repository would be of
another platform, and old with the next `make requirements`. An image holds that of its own packages.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from pins import Pin, pins

from pipeline.doctor.versions import ADVISORY, MALICIOUS

HERE = Path(__file__).parent
FAULT, USAGE, NOT_ASKED = 1, 2, 4
# What is known where a package does not state it.
KNOWN = {"cuda-toolkit": "none of its own: it holds no file, and only requires NVIDIA's packages"}
# Of terms that would reach what is trained or shipped with it. The LGPL does not.
_COPYLEFT = re.compile(r"\b(A?GPL|Affero|(?<!Lesser )General Public|SSPL|Non-?Commercial|CC-BY-NC)\b", re.IGNORECASE)
SECONDS = 300.0


def faults(name: str, found: Sequence[Pin]) -> Iterator[str]:
    """What a requirement file holds that it must not. name: of the file."""
    if not found:
        yield f"{name}: no pin at all; `make requirements` writes it"
    for pin in found:
        if not pin.is_hashed:
            yield f"{name}: {pin.name} {pin.version} has no sha256; `make requirements` writes them"
        if pin.version in MALICIOUS.get(pin.name, ()):
            yield f"{name}: {pin.name} {pin.version} is malicious ({ADVISORY}); pin a later one"


def pip_audit() -> str | None:
    """Where the program is: in the environment that `make audit` makes inside ours, or on the path."""
    inside = Path(sys.prefix) / "audit" / "bin" / "pip-audit"
    return str(inside) if inside.exists() else shutil.which("pip-audit")


def vulnerabilities(path: Path, options: Sequence[str]) -> tuple[list[str], str]:
    """Known ones of a file by pip-audit, a line each; and why it could not ask, or "". options: more of its own."""
    program = pip_audit()
    if program is None:
        return [], "pip-audit is not installed; `make audit` installs it"
    # osv: one service for PyPI's advisories and GitHub's. --disable-pip: the files are complete, nothing is resolved.
    command = [program, "--vulnerability-service", "osv", "--requirement", str(path), "--disable-pip",
               "--require-hashes", "--format", "json", "--progress-spinner", "off", *options]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        report = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return [], f"no answer within {SECONDS:g} s"
    except ValueError:
        return [], _reason(done.stderr)
    return [
        f"{path.name}: {package['name']} {package['version']}: {fault['id']}; "
        f"{'fixed in ' + ', '.join(fault['fix_versions']) if fault['fix_versions'] else 'no release mends it yet'}"
        for package in report["dependencies"] for fault in package.get("vulns", ())
    ], ""  # fmt: skip


def _reason(said: str) -> str:
    """Why pip-audit gave no report, out of its traceback: the last line, and the host that it names."""
    last = (said.strip().splitlines() or ["pip-audit said nothing"])[-1]
    host = re.search(r"host='([^']+)'", last)
    return f"{host[1]}: {last.partition(':')[0].rpartition('.')[2]}" if host else last[:200]


def licence(package: metadata.PackageMetadata) -> str:
    """As the package states it: an expression, a classifier, or the first line of its text; "" where it does not."""
    if expression := package.get("License-Expression"):
        return expression
    classifiers = [line.rpartition(" :: ")[2] for line in package.get_all("Classifier") or ()
                   if line.startswith("License :: ") and line != "License :: OSI Approved"]  # fmt: skip
    text = (package.get("License") or "").strip()
    return "; ".join(classifiers) or (text.splitlines()[0][:80] if text and text != "UNKNOWN" else "")


def licences(found: Sequence[Pin]) -> list[tuple[str, str, str]]:
    """Name, version and licence of each that is installed. A file for all platforms pins some that are not."""
    table = []
    for name in dict.fromkeys(pin.name for pin in found):
        try:
            package = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        table.append((name, package["Version"], licence(package) or KNOWN.get(name, "")))
    return table


def licence_faults(table: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    for name, version, text in table:
        if not text:
            yield f"licence: {name} {version} states none; look for it, and do without the package if there is none"
        elif _COPYLEFT.search(text):
            yield f"licence: {name} {version} is under {text}, which reaches what it is shipped with; do without it"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check pins, hashes, known vulnerabilities and licences.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: requirements/*.txt")
    parser.add_argument("--licences", action="store_true", help="list those of what is installed, and stop")
    parser.add_argument("--osv-url", metavar="URL", help="another service that speaks OSV's language, as a mirror")
    options = parser.parse_args(arguments)
    try:
        table = licences(pins(HERE / "runtime.txt"))
        if options.licences:
            width = max(len(f"{name} {version}") for name, version, _ in table)
            print("\n".join(f"{f'{name} {version}':{width}}  {text or 'not stated'}" for name, version, text in table))
            return 0
        files = options.files or sorted(HERE.glob("*.txt"))
        read = {path: pins(path) for path in files}
    except (OSError, ValueError) as error:
        print(f"audit: {error}", file=sys.stderr)
        return USAGE
    wrong = [line for path, found in read.items() for line in faults(path.name, found)]
    wrong += licence_faults(table)
    print(f"{len({pin.name for found in read.values() for pin in found})} packages in {len(read)} files: pins, hashes, "
          f"malicious releases; licences of {len(table)} that are installed")  # fmt: skip
    unasked = ""
    for path in read:
        known, unasked = vulnerabilities(path, ["--osv-url", options.osv_url] if options.osv_url else [])
        wrong += known
        if unasked:
            break
    for line in wrong:
        print(f"audit: {line}", file=sys.stderr)
    if unasked:
        print(f"audit: vulnerabilities were not looked up: {unasked}", file=sys.stderr)
    return FAULT if wrong else NOT_ASKED if unasked else 0


if __name__ == "__main__":
    sys.exit(main())
