"""The house: which room may use which, and where a library may appear. design.md gives the reasons."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pipeline"

FLOORS = {
    "__main__": 7,
    "cli": 6,
    "benchmarks": 5, "doctor": 5,  # which asks of a run what `run` would make of it
    "dashboards": 5,  # what W&B shows of runs, by what a report says of them; needs no torch
    "run": 4,
    "experiments": 5,  # they train runs and draw them with what a report is made of
    "report": 4,  # reads the files of a run as the callbacks and the launcher write them; needs no torch
    "callbacks": 3,
    "training": 2, "data": 2, "export": 2, "launch": 2,
    "evaluation": 1, "world": 1, "norm": 1, "models": 1, "config": 1, "scaling": 1,
    "": 0,
}  # fmt: skip

# library -> where it may be imported; a room ends with a slash
WALLS = {
    "lightning": ("run/", "data/datamodule", "training/classifier", "training/checkpoint", "training/checkpoint_io",
                  "launch/environment",
                  "callbacks/", "benchmarks/"),
    "wandb": ("callbacks/artifacts", "callbacks/wandb_server", "callbacks/wandb_reporter", "callbacks/segments"),
    "wandb_workspaces": ("dashboards/views",),
    "onnx": ("export/onnx_file",),
    "onnxruntime": ("export/onnx_file",),
    "safetensors": ("export/weights",),
    "webdataset": ("data/", "benchmarks/"),  # as a peer
    "obstore": ("data/remote",),
    "triton": ("norm/kernels",),
    "timm": ("training/optimizer", "benchmarks/"),  # as a peer
    "hydra": ("config/composition",),
    "omegaconf": ("config/composition",),
}  # fmt: skip
# launch/targets is the seam between an experiment and where it runs: cli submits what doctor has asked about.
READERS_OF_CONFIG = ("cli/", "run/", "launch/plan", "launch/targets", "launch/sweep", "doctor/")
APART = {"norm", "models"}  # they import no other room, nor each other

MODULES = sorted(PACKAGE.rglob("*.py"))
DOTTED = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES}


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def room(name: str) -> str:
    return "" if name == "__init__" else name.split("/", maxsplit=1)[0]


def within(name: str, places: tuple[str, ...]) -> bool:
    """Whether it is one of the places; one that ends with a slash is a whole room."""
    return any(name == a or (a.endswith("/") and name.startswith(a)) for a in places)


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every module that a file imports, with whether it is for type checking alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = [f"{module}.{a.name}" if f"{module}.{a.name}" in DOTTED else module for a in node.names]
            found += [(name, id(node) in typing_only) for name in names]
    return found


def rooms_used(path: Path) -> set[str]:
    names = [name for name, _ in imports(path) if name.split(".")[0] == "pipeline"]
    return {name.split(".")[1] if "." in name else "" for name in names}


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_imports_run_downward(path):
    own = room(place(path))
    assert own in FLOORS, f"{own} is a room without a floor"
    for other in rooms_used(path) - {own}:
        assert FLOORS[other] < FLOORS[own], f"{place(path)} imports {other}, which is not below it"


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_libraries_stay_behind_their_walls(path):
    for name, _ in imports(path):
        allowed = WALLS.get(name.split(".")[0])
        if allowed is not None:
            assert within(place(path), allowed), f"{place(path)}: {name}"


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_config_stays_at_the_door(path):
    if "config" in rooms_used(path) and room(place(path)) != "config":
        assert within(place(path), READERS_OF_CONFIG)


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_norm_and_models_know_no_other_room(path):
    own = room(place(path))
    if own in APART:
        assert rooms_used(path) <= {own}


def test_launch_starts_run_and_never_imports_it():
    for path in (PACKAGE / "launch").glob("*.py"):
        assert "run" not in rooms_used(path)


def test_modules_form_no_circle():
    arrows: dict[str, set[str]] = {}
    known = {place(path) for path in MODULES}
    for path in MODULES:
        names = [
            name.split(".")[1:]
            for name, typing_only in imports(path)
            if name.startswith("pipeline.") and not typing_only
        ]
        arrows[place(path)] = {
            candidate
            for parts in names
            for candidate in ("/".join(parts), "/".join([*parts, "__init__"]))
            if candidate in known and candidate != place(path)
        }
    done: set[str] = set()

    def visit(node: str, trail: tuple[str, ...]) -> None:
        assert node not in trail, " -> ".join([*trail, node])
        if node not in done:
            for target in arrows[node]:
                visit(target, (*trail, node))
            done.add(node)

    for node in arrows:
        visit(node, ())


def test_imports_inside_a_function_are_heavy_and_few():
    """A deferred import hides an arrow. Only the verbs of cli may have them, and what takes seconds to load."""
    heavy = {"torchvision", "sklearn", "scipy", "PIL", "pipeline.data.writer"}
    heavy |= {"pyarrow"}  # an extra: without it every source but parquet files still works
    heavy |= {"timm"}  # 2.4 s, which only lars and lamb need
    heavy |= {"cv2", "nvidia", "webdataset"}  # peers, which may be missing, each in its process
    for path in MODULES:
        if room(place(path)) in ("cli", "run"):
            continue
        functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
        for node in (inner for function in functions for inner in ast.walk(function)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert {name, (name or "").split(".")[0]} & heavy, (
                    f"{place(path)}: {name} is imported inside a function"
                )


def test_no_drawers():
    for path in MODULES:
        assert path.stem.strip("_") not in ("utils", "util", "common", "helpers", "misc")


def test_weights_are_loaded_without_running_code_and_nothing_is_pickled():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert name not in ("pickle", "dill", "cloudpickle"), place(path)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), place(
                    path
                )
            if isinstance(node, ast.Call):
                assert not any(k.arg == "shell" for k in node.keywords), place(path)


def test_every_module_says_what_it_is():
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), place(path)
