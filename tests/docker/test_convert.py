"""docker/convert.sh, with stand-ins of the engine and of what makes the file, which write down what they were told."""

import subprocess
from pathlib import Path

import pytest

CONVERT = Path(__file__).parents[2] / "docker" / "convert.sh"
STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
[ "$1 $2 $3" != "image inspect absent" ] || exit 1
[ "$1" != import ] || echo made >"$3"
[ "$1" != build ] || echo made >"$4"
exit "${CODE:-0}"
"""


@pytest.fixture
def convert(tmp_path):
    """Runs it; returns exit code, what it says, and the calls of other programs with its own directory left out."""
    bin_, calls = tmp_path / "bin", tmp_path / "calls"
    bin_.mkdir()

    def run(*words, programs=("docker", "podman", "apptainer", "enroot"), **environment):
        for program in programs:
            (bin_ / program).write_text(STAND_IN)
            (bin_ / program).chmod(0o755)
        calls.write_text("")
        own = {"PATH": f"{bin_}:/usr/bin:/bin", "CALLS": str(calls), **environment}
        done = subprocess.run([CONVERT, *words], env=own, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert not list(tmp_path.glob(".convert-*"))
        return done.returncode, done.stderr.strip() or done.stdout.strip(), calls.read_text().splitlines()

    return run


def test_a_sif_is_built_from_an_archive_of_the_image(convert, tmp_path):
    code, said, calls = convert("sif", "pipeline", "out.sif")
    assert (code, said) == (0, "out.sif")
    assert (tmp_path / "out.sif").read_text() == "made\n"
    assert calls[:1] == ["docker image inspect pipeline"]
    assert calls[1].startswith("docker save --output ./.convert-")
    archive = calls[1].split()[3]
    assert calls[2].startswith(f"apptainer build --build-arg archive={archive} ")
    assert calls[2].endswith("/docker/apptainer.def")


@pytest.mark.parametrize(("engine", "scheme"), [("docker", "dockerd"), ("podman", "podman")])
def test_a_sqsh_is_imported_from_the_engine_that_has_the_image(convert, tmp_path, engine, scheme):
    code, _, calls = convert("sqsh", "pipeline:1", "out.sqsh", ENGINE=engine)
    assert code == 0
    assert (tmp_path / "out.sqsh").read_text() == "made\n"
    assert calls[0] == f"{engine} image inspect pipeline:1"
    assert calls[1].startswith("enroot import --output ./.convert-")
    assert calls[1].endswith(f" {scheme}://pipeline:1")


def test_a_conversion_that_fails_leaves_no_file(convert, tmp_path):
    (tmp_path / "bin" / "enroot").write_text("#!/bin/bash\necho part >$3\nexit 7\n")
    (tmp_path / "bin" / "enroot").chmod(0o755)
    assert convert("sqsh", "pipeline", "out.sqsh", programs=("docker",))[0] == 7
    assert not (tmp_path / "out.sqsh").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [(("sif", "pipeline"), "docker/convert.sh sif  pipeline /shared/pipeline.sif"),
     (("zip", "pipeline", "out"), "docker/convert.sh sif  pipeline /shared/pipeline.sif"),
     (("sif", "absent", "out"), "convert: docker has no image absent; build it: docker build -f docker/Dockerfile"),
     (("sif", "pipeline", "calls"), "convert: calls is there already; remove it, or choose another name")],
)  # fmt: skip
def test_wrong_use_is_a_line_with_the_way_out(convert, words, said):
    code, line, _ = convert(*words)
    assert code == 2
    assert line.startswith(said)


def test_a_tool_that_is_not_here_is_named(convert):
    assert convert("sif", "pipeline", "out", programs=("docker",))[:2] == (
        2, "convert: apptainer is not found; install it here, or convert where it is")  # fmt: skip
    code, line, _ = convert("sqsh", "pipeline", "out", ENGINE="lxc")
    assert (code, line) == (2, "convert: ENGINE = lxc is not known; choose docker or podman")
