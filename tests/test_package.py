import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_room_is_in_the_wheel():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    rooms = {"pipeline." + path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert listed == rooms | {"pipeline", "pipeline.conf", "pipeline.slurm"}


def test_requirements_are_exact_hashed_and_name_no_host():
    for path in (ROOT / "requirements").glob("*.txt"):
        blocks = path.read_text().replace("\\\n", " ").splitlines()
        pins = [line for line in blocks if line and not line.lstrip().startswith("#")]
        assert len(pins) > (20 if path.name == "audit.txt" else 50)
        assert all("==" in pin and "--hash=sha256:" in pin for pin in pins)
        assert "://" not in path.read_text()
