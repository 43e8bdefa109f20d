"""The model card beside an exported network: README.md, with a snippet that runs as it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.export.description import KEPT, PIXELS, Description, Preprocessing
from pipeline.export.parity import Parity
from pipeline.export.speed import Speed

_LOADING = {
    "safetensors": """from pipeline.export import load

network, description = load("model.safetensors")
logits = network(torch.from_numpy(images))""",
    "torch-export": """network = torch.export.load("model.pt2").module()
logits = network(torch.from_numpy(images))""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
logits = torch.from_numpy(session.run(["logits"], {"images": images})[0])""",
    "cadene": """from safetensors.torch import load_file

weights = load_file("model.safetensors")
# their class, or any other with these names:
# network = pretrainedmodels.bninception(num_classes={classes}, pretrained=None)
# network.load_state_dict(weights)
# logits = network(torch.from_numpy(images))""",
}
_NEEDS = {
    "safetensors": "this package", "torch-export": "PyTorch alone", "onnx": "any ONNX runtime, opset 18",
    "cadene": "the layout of Cadene's and yjxiong's BN-Inception",
}  # fmt: skip


def card(
    form: str,
    description: Description,
    facts: Mapping[str, str],
    parity: Parity,
    speeds: Sequence[Speed],
    machine: str,
) -> str:
    """Markdown. facts: of the file, the run and its data, a line each. machine: what speeds were measured on."""
    shown = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    run = str(description.facts.get("run", description.name))
    parts = [
        f"# {run}: {description.name}, {description.num_classes} classes",
        f"Written by `pipeline export --format {form}`; loads with {_NEEDS[form]}.",
        f"| | |\n|---|---|\n{shown}",
        "## Use",
        f"```python\n{snippet(form, description)}\n```",
        _input(form, description),
        "## Parity\nThe file was loaded anew and compared before it was kept: " + str(parity) + ".",
    ]
    if speeds:
        parts += ["## Speed", _speeds(speeds, machine)]
    parts += ["## Licence", _LICENCE, "model.json holds all of this for programs: preprocessing, classes, versions."]
    return "\n\n".join(parts) + "\n"


def snippet(form: str, description: Description) -> str:
    """Python that classifies photo.jpg beside the file."""
    preprocessing = description.preprocessing
    loading = _LOADING[form].format(classes=description.num_classes) if form == "cadene" else _LOADING[form]
    ending = "" if form == "cadene" else "\nprint(logits.softmax(1).topk(1))"
    return (
        f"import numpy as np\nimport torch\nfrom PIL import Image\n\n{_reading(preprocessing)}\n"
        f"{_values(form, description)}\n\n{loading}{ending}"
    )


def _reading(p: Preprocessing) -> str:
    return f"""image = Image.open("photo.jpg").convert("RGB")
side = max(1, round(min(image.size) * {p.crop}))
left, top = (image.width - side) // 2, (image.height - side) // 2
box = (left, top, left + side, top + side)
image = image.resize(({p.size}, {p.size}), Image.Resampling.BILINEAR, box)
images = np.asarray(image).transpose(2, 0, 1)[None].copy()  # (1, 3, {p.size}, {p.size}), uint8, RGB"""


def _values(form: str, description: Description) -> str:
    p = description.preprocessing
    if form == "cadene":
        mean = [round(255 * value, 4) for value in reversed(p.mean)]
        return (f"mean = np.array({mean}, dtype=np.float32)\n"
                "images = images[:, ::-1].astype(np.float32) - mean[:, None, None]  # BGR, 0..255, std 1")  # fmt: skip
    if description.takes == PIXELS:
        return ""
    return (f"mean, std = np.array({p.mean}), np.array({p.std})\n"
            "images = ((images / 255 - mean[:, None, None]) / std[:, None, None]).astype(np.float32)")  # fmt: skip


def _input(form: str, description: Description) -> str:
    p = description.preprocessing
    takes = "uint8 pixels in RGB; it normalizes them itself" if description.takes == PIXELS else "normalized float32"
    if form == "cadene":
        takes = "float32 in BGR, 0..255, less the mean above"
    norms = "kept, and can be trained on" if description.norms == KEPT else "folded into the layers before them"
    return (
        f"It takes any number of images of {p.size}x{p.size} as {takes}, and gives logits. An image is its central "
        f"square of {p.crop:g} of the shorter side, resized with {p.interpolation}; in training pixels in 0..1 were "
        f"normalized by mean {p.mean} and std {p.std}. Batch norms are {norms}."
    )


def _speeds(speeds: Sequence[Speed], machine: str) -> str:
    rows = "\n".join(
        f"| {s.form} | {s.batch} | {s.median:,.1f} | {s.low:,.1f} to {s.high:,.1f} | {s.rounds} |" for s in speeds
    )
    return (f"Images a second, in turn, {machine}.\n\n| form | batch | median | slowest to fastest | rounds |\n"
            f"|---|---|---|---|---|\n{rows}")  # fmt: skip


_LICENCE = (
    "The code that trained and wrote it is under Apache-2.0. The weights belong to whoever trained them. What may be "
    "done with them may depend on the terms of the data, too, which no manifest holds: look them up before you share "
    "them. ImageNet's allow non-commercial research and education."
)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
