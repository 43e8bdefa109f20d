"""Part of a requirement file, its pins and hashes as they stand.

python requirements/pins.py requirements/runtime.txt --without-torch            # where an image brings its own
python requirements/pins.py requirements/dev.txt --less requirements/runtime.txt
python requirements/pins.py requirements/runtime.txt --only setuptools
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# What comes with a build of torch, and must come from the same hands.
_TORCH = re.compile(r"(torch|torchvision|triton|(nvidia|cuda)-.+)")
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


class Pin(NamedTuple):
    """name==version and its marker, hashes and comments, as text of several lines."""

    name: str
    text: str

    @property
    def version(self) -> str:
        return re.split(r"[\s;\\]", self.text.partition("==")[2], maxsplit=1)[0]

    @property
    def is_hashed(self) -> bool:
        return re.search(r"--hash=sha256:[0-9a-f]{64}", self.text) is not None

    @property
    def is_torch(self) -> bool:
        return _TORCH.fullmatch(self.name) is not None


def pins(path: Path) -> list[Pin]:
    """Every requirement of a file by `uv pip compile`. Raises ValueError for a line that it would not write."""
    return list(_pins(path))


def _pins(path: Path) -> Iterator[Pin]:
    block: list[str] = []
    for line in [*path.read_text().splitlines(), ""]:
        if block and not line.startswith(" "):
            name = _NAME.match(block[0])
            if name is None or not block[0][name.end() :].startswith("=="):
                raise ValueError(f"{path}: {block[0]!r} is no pin; write name==version, as `make requirements` does")
            yield Pin(name[0], "\n".join(block) + "\n")
            block = []
        if line and not line.startswith("#"):
            block.append(line)


def main() -> int:
    parser = argparse.ArgumentParser(description="Print part of a requirement file, pins and hashes as they stand.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--without-torch", action="store_true", help="leave out torch and what comes with its build")
    parser.add_argument("--less", type=Path, metavar="FILE", help="leave out what this file pins, too")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone")
    options = parser.parse_args()
    try:
        found, known = pins(options.file), {pin.name for pin in pins(options.less)} if options.less else set()
    except (OSError, ValueError) as error:
        print(f"pins: {error}", file=sys.stderr)
        return 2
    missing = sorted(set(options.only or ()) - {pin.name for pin in found})
    if missing:
        print(f"pins: {options.file} does not pin {', '.join(missing)}", file=sys.stderr)
        return 2
    chosen = [
        pin for pin in found
        if pin.name not in known and not (options.without_torch and pin.is_torch)
        and (options.only is None or pin.name in options.only)
    ]  # fmt: skip
    print("".join(pin.text for pin in chosen), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
