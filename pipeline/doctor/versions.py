"""What is installed, against what is required. Reads the packages' metadata and imports none of them."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

from pipeline.doctor.findings import Finding, fault, ok, warning

# On 2026-04-30 these stole credentials as soon as they were imported.
MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
ADVISORY = "GHSA-w37p-236h-pfx3"
SHOWN = ("torch", "torchvision", "lightning", "wandb")
_REQUIREMENT = re.compile(r"^([\w.-]+)\s*(?:\[[^]]*\])?\s*\(?([^;()]*)\)?\s*(?:;(.*))?$")
_RULE = re.compile(r"(>=|<=|==|!=|<|>)\s*([\w.+]+)")
Installed = Callable[[str], str | None]


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements(package: str = "pipeline") -> list[str]:
    """What a package says it requires; nothing where it is run from its sources without being installed."""
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def malicious(installed: Installed = installed_version) -> list[Finding]:
    """Releases that must not be imported, not even to be looked at."""
    return [
        fault(package, f"{package} {installed(package)} is malicious ({ADVISORY}): it steals credentials when it is "
              "imported", f"uninstall it, install {package}>=2.6.6, and replace every key that this account could read")
        for package, versions in MALICIOUS.items() if installed(package) in versions
    ]  # fmt: skip


def check_versions(required: Sequence[str], installed: Installed = installed_version) -> Iterator[Finding]:
    """Every package that ours requires is there, in a version that it can use."""
    broken = False
    for package, rules in _rules(required):
        version = installed(package)
        if version is None:
            broken = True
            yield fault(package, f"{package} is not installed, {package}{rules} is required",
                        f"pip install '{package}{rules}'")  # fmt: skip
        elif not satisfies(version, rules):
            broken = True
            yield fault(package, f"{package} {version} is installed, {package}{rules} is required",
                        f"pip install '{package}{rules}'")  # fmt: skip
    if not broken:
        known = [f"{package} {version}" for package in SHOWN if (version := installed(package))]
        yield ok("packages", f"Python {platform.python_version()}, {', '.join(known)}")


def check_decoder(wanted: str, there: bool) -> Iterator[Finding]:
    """The extension that decodes regions of JPEGs. wanted: data.decoder, "" = what is there."""
    how = "install gcc, python3-dev and libjpeg62-turbo-dev, and then pipeline again"
    if wanted == "regions" and not there:
        yield fault("JPEG extension", "data.decoder = regions, which is not installed here",
                    f"{how}, or start a new run with data.decoder=whole")  # fmt: skip
    elif there:
        yield ok("JPEG extension", "crops are cut while decoding" if wanted != "whole"
                 else "installed, and not used: data.decoder = whole")  # fmt: skip
    else:
        yield warning("JPEG extension", "not installed: each JPEG is decoded whole before it is cropped, which takes "
                      "a quarter more time for photographs", how)  # fmt: skip


def satisfies(version: str, rules: str) -> bool:
    """Whether a version fulfils rules like `>=2.6.6,!=2.6.2,<2.7`, by its release numbers."""
    tests = {
        ">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b, "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b, "<": lambda a, b: a < b, ">": lambda a, b: a > b,
    }  # fmt: skip
    return all(tests[sign](_release(version), _release(bound)) for sign, bound in _RULE.findall(rules))


def _release(version: str) -> tuple[int, ...]:
    """2.6, 2.6.0 and 2.6.0+cu130 are one release."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    return tuple([*numbers, 0, 0, 0, 0][:4])


def _rules(required: Sequence[str]) -> Iterator[tuple[str, str]]:
    for line in required:
        match = _REQUIREMENT.match(line)
        if match and "extra" not in (match[3] or ""):
            yield match[1], match[2].strip()
