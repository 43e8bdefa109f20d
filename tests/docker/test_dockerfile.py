"""What the image and the services promise can be read off their files; tests/docker/test_containers.py runs them."""

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


def instructions(text=DOCKERFILE):
    """(stage, instruction, its words as one line), in order; what stands before the first stage belongs to ""."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found, stage = [], ""
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, words = line.partition(" ")
        if name == "FROM":
            stage = words.partition(" AS ")[2] or "last"
        found.append((stage, name, " ".join(words.split())))
    return found


def of(stage, name):
    return [words for where, what, words in instructions() if where == stage and what == name]


def tool(name):
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_the_dockerfile_passes_hadolint():
    done = subprocess.run([tool("hadolint"), DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_scripts_pass_shellcheck():
    scripts = sorted(DOCKER.glob("*.sh"))
    assert len(scripts) == 2
    done = subprocess.run([tool("shellcheck"), *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_stage_begins_from_the_base_that_was_asked_for():
    sources = [words for _, name, words in instructions() if name == "FROM"]
    assert sources == ["${BASE_IMAGE} AS builder", "${BASE_IMAGE} AS runtime", "runtime AS test", "runtime"]
    assert instructions()[0] == ("", "ARG", "BASE_IMAGE=python:3.13-slim-bookworm")


def test_the_image_runs_as_a_user_by_number_that_can_be_chosen():
    for stage in ("runtime", "test"):
        assert of(stage, "USER")[-1] == "${UID}:${GID}"  # by number: Kubernetes' runAsNonRoot cannot tell names
    assert of("runtime", "ARG")[:2] == ["UID=1000", "GID=1000"]


def test_signals_reach_the_training():
    assert of("runtime", "STOPSIGNAL") == ["SIGTERM"]
    assert of("runtime", "ENTRYPOINT") == ['["tini", "--", "pipeline-entrypoint"]']
    commands = [line for line in (DOCKER / "entrypoint.sh").read_text().splitlines() if line and line[0] != "#"]
    assert commands[-1] == 'exec pipeline "$@"'


def test_health_is_the_age_of_the_heartbeat():
    [check] = of("runtime", "HEALTHCHECK")
    assert check.endswith('CMD ["python", "-m", "pipeline.launch.heartbeat"]')
    assert "PIPELINE_HEARTBEAT=/tmp/" in of("runtime", "ENV")[0]


def test_nothing_is_installed_that_was_not_hashed():
    """By pip: Debian's packages are signed."""
    for words in (words for _, name, words in instructions() if name == "RUN"):
        for install in re.findall(r"pip (?:install|wheel)[^&;]*", words):
            assert "--no-deps" in install
            assert "--require-hashes" in install or "--no-index" in install
            assert "--no-build-isolation" in install or "--no-index" in install or "dev.txt" in install


def test_nothing_comes_from_a_url_and_no_secret_is_asked_for():
    for _, name, words in instructions():
        assert name != "ADD"
        if name != "LABEL":
            assert "://" not in words
        if name in ("ARG", "ENV"):
            assert not SECRET.search(words)


def test_what_changes_often_comes_late():
    copies = of("runtime", "COPY")
    assert copies[0] == "--from=builder /opt/venv /opt/venv"  # 5 GB, before every line of ours
    builder = [words for stage, name, words in instructions() if stage == "builder" and name in ("COPY", "RUN")]
    installed = next(i for i, words in enumerate(builder) if "--require-hashes" in words)
    assert not any("pipeline" in words for words in builder[: installed + 1])
    assert "type=bind" not in DOCKERFILE  # whose content buildah leaves out of its cache's key
    assert [name for stage, name, _ in instructions() if stage == "runtime"][-1] == "LABEL"


def test_labels_say_what_the_image_is():
    [labels] = of("runtime", "LABEL")
    for name in ("title", "description", "licenses", "version", "revision", "source"):
        assert f"org.opencontainers.image.{name}=" in labels
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"VERSION={version}" in of("runtime", "ARG")


def kept(path):
    """Whether a file is in the build context, by the rules of .dockerignore: the last one that matches it decides."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    inside = True
    places = [path, *map(str, Path(path).parents)]
    for rule in rules:
        pattern = rule.removeprefix("!").removeprefix("**/")
        names = [Path(place).name for place in places] if "**/" in rule else places
        if any(fnmatch(name, pattern) for name in names if name not in ("", ".")):
            inside = rule.startswith("!")
    return inside


@pytest.mark.parametrize(
    "path", [".git/config", "runs/first/config.yaml", "runs/first/wandb/x.wandb", "shards/a.tar", ".venv/bin/python",
             ".env", "docker/secrets.env", "pipeline/.env.local", "pipeline/__pycache__/x.pyc", "wandb/x", "id_rsa",
             "pipeline/data/jpeg_region.so", "model.ckpt", ".netrc", "benchmarks.md"],
)  # fmt: skip
def test_the_build_context_holds_nothing_of_a_users(path):
    assert not kept(path)


@pytest.mark.parametrize("path", ["pipeline/run/__init__.py", "conf/config.yaml", "slurm/job.sbatch", "pyproject.toml",
                                  "requirements/runtime.txt", "docker/entrypoint.sh"])  # fmt: skip
def test_the_build_context_holds_what_is_built(path):
    assert (ROOT / path).is_file()
    assert kept(path)


def test_every_file_that_is_copied_is_in_the_build_context():
    for _, name, words in instructions():
        if name == "COPY" and "--from=" not in words:
            for source in [word for word in words.split() if not word.startswith("--")][:-1]:
                assert (ROOT / source).exists()
                assert kept(source)


# --- compose ---

TEXT = (DOCKER / "compose.yaml").read_text()


def services(text=TEXT):
    """With what stands behind :- in a variable."""
    read = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return read["services"]


def test_every_service_is_locked_down_and_has_time_for_its_last_checkpoint():
    from pipeline.config.schema import ClusterConfig

    for service in services().values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["user"] == "1000:1000"
        assert any(place.startswith("/tmp") for place in service["tmpfs"])  # of temporary files, and the heartbeat
        assert int(service["stop_grace_period"].removesuffix("s")) > ClusterConfig.lead_seconds


def test_secrets_come_from_a_file_that_no_image_and_no_commit_holds():
    for name, service in services().items():
        assert service["env_file"] == [{"path": "secrets.env", "required": False}]
        assert not any(SECRET.search(key) for key in service.get("environment", {})), name
    assert not kept("docker/secrets.env")
    if (ROOT / ".gitignore").exists():  # not where an image tests itself
        assert "*.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_gpu_service_has_gpus_and_shared_memory():
    gpu = services()["gpu"]
    assert gpu["shm_size"] == "8g"
    assert gpu["ulimits"] == {"memlock": -1, "stack": 67108864}
    [device] = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "profiles" not in gpu


def test_the_smoke_test_is_a_world_of_two_nodes():
    from pipeline.world import World

    nodes = [services()[name] for name in ("node0", "node1")]
    worlds = [World.from_environment(node["environment"]) for node in nodes]
    assert worlds == [World(rank, 2, 0, 1, node=rank) for rank in (0, 1)]
    assert {node["environment"]["MASTER_ADDR"] for node in nodes} == {"node0"}
    for node in nodes:
        assert node["profiles"] == ["smoke"]
        assert node["command"] == ["train", "runs/smoke/config.yaml"]
        assert node["depends_on"] == {"plan": {"condition": "service_completed_successfully"}}
    assert "cluster.nodes=2" in services()["plan"]["command"][0]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("", ""), ("stop_grace_period", "stop_grace_perod"), ("on-failure", "sometimes"),
     ("service_completed_successfully", "done"), ("capabilities", "capabilitis")],
)  # fmt: skip
def test_the_services_pass_the_parser_of_the_specification_and_mistakes_do_not(right, wrong):
    parser = pytest.importorskip("compose_spec", reason="compose-spec, a parser of the specification, is not installed")
    text = TEXT.replace("on-failure:5", "on-failure")  # whose number it does not know
    content = yaml.safe_dump({"services": services(text.replace(right, wrong) if right else text)})
    if right:
        with pytest.raises(ValueError, match=r".+"):
            parser.PyCompose.from_yaml(content).validate()
    else:
        parser.PyCompose.from_yaml(content).validate()
