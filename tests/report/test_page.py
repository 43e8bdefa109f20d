"""The page: complete, of itself, and whatever a run is called."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pipeline import cli
from pipeline.report.figures import KEYS
from pipeline.report.making import make_report
from pipeline.report.record import NotARunError
from tests.report.runs import make_run, simple, start, train
from tests.report.test_ledger import write

EVIL = "<script>alert(1)</script> & \"x\" 'y' </style>"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Every element of a page with its attributes, and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def of(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def comparison(tmp_path: Path) -> Path:
    paths = [simple(tmp_path / "inception", 0.7, slowness=2, optimizer={"rate": 0.0015}),
             simple(tmp_path / "bn_baseline", 0.6, optimizer={"rate": 0.0015}),
             simple(tmp_path / "bn_x5", 0.9, optimizer={"rate": 0.0075})]  # fmt: skip
    return make_report(paths, tmp_path / "out")


def test_a_page_asks_for_nothing_outside_of_itself(tmp_path):
    page = Page(comparison(tmp_path))
    assert not page.open
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "image", "use"), tag
        assert not {"src", "href", "xlink:href", "srcset", "action", "data", "background"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(
        r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttp|WebSocket|import\(", _without_comments(page.source)
    )
    policy = next(each["content"] for each in page.of("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def _without_comments(source: str) -> str:
    return re.sub(r"^//.*$", "", source, flags=re.MULTILINE)


def test_names_and_values_of_a_run_are_text_whatever_they_are(tmp_path):
    name = EVIL.replace("/", "∕")
    begun = start(0, until=20, machines=[{"machine": EVIL, "ranks": 1}])
    hostile = make_run(tmp_path / name, [train(10, 10, seconds=5)], [begun], tracking={"group": EVIL})
    other = simple(tmp_path / "other", tracking={"group": "-->"})
    for runs in ([hostile], [hostile, other]):
        page = Page(make_report(runs, tmp_path / "out", command=EVIL))
        assert not page.open
        assert len(page.of("script")) == len(page.of("style")) == 1
        assert EVIL in page.text
        assert all("alert" not in attributes.get("style", "") for _, attributes in page.elements)


def test_a_comparison_of_three_has_all_of_them_everywhere(tmp_path):
    page = Page(comparison(tmp_path))
    rows = re.findall(r"<tr>.*?</tr>", page.source.partition("Steps to target")[2].partition("</table>")[0])
    cells = [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in rows]
    assert cells[0] == ["run", "steps to 70 %", "epochs", "time", "× fewer steps", "max top-1", "at step"]
    assert [row[:2] + row[-3:] for row in cells[1:]] == [
        ["inception", "40", "1", "70 %", "40"],
        ["bn_baseline", "never", "–", "60 %", "20"],
        ["bn_x5", "20", "2", "90 %", "20"],
    ]
    curves = [attributes["data-name"] for attributes in page.of("path") if "data-name" in attributes]
    assert curves.count("inception") == curves.count("bn_baseline") == curves.count("bn_x5") >= 10
    config = page.source.rpartition("<h2>Config</h2>")[2]
    assert re.findall(r"<code>(.*?)</code>", config.partition("</table>")[0]) == ["optimizer.rate"]
    assert re.findall(r'<td class="v">(.*?)</td>', config) == ["0.0015", "0.0015", "0.0075"]


def test_targets_that_are_asked_for_are_columns(tmp_path):
    page = make_report([simple(tmp_path / "a")], targets=[0.4, 0.95])
    assert page == tmp_path / "a" / "report" / "index.html"
    text = page.read_text()
    assert "steps to 40 %" in text
    assert "steps to 95 %" in text
    assert "never" in text


def test_pictures_lie_beside_the_page_and_are_small(tmp_path):
    output = comparison(tmp_path).parent
    for name in ("mfu", "mine"):
        (output / f"{name}.png").write_bytes(b"")
    assert make_report([tmp_path / "bn_x5"], output) == output / "index.html"
    assert not (output / "mfu.png").exists()  # of another report
    assert (output / "mine.png").exists()  # of nobody's
    (output / "mine.png").unlink()
    assert {path.stem for path in output.glob("*.png")} <= {*KEYS, "report"}
    for path in output.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert image.width >= 840
        assert path.stat().st_size < 150_000
    assert {"report.png", "accuracy-steps.png", "starts.png", "time.png"} <= {path.name for path in output.iterdir()}


def test_a_run_without_a_row_is_a_page_that_says_so(tmp_path):
    page = Page(make_report([make_run(tmp_path / "a")]))
    assert "metrics.csv has no row yet" in page.text
    assert "No validation yet." in page.text


def test_a_ledger_tells_whether_every_epoch_has_every_sample_once(tmp_path):
    good, bad = simple(tmp_path / "good"), simple(tmp_path / "bad")
    manifest = '{"splits": {"train": [{"count": 6}, {"count": 3}]}}'
    for directory, last in ((good, "h"), (bad, "a")):
        (directory / "dataset.json").write_text(manifest)
        keys = ["a", "b", "c", "d"], ["e", "f", "g", last]
        write(directory / "ledger", 0, [(0, 1, keys[0]), (0, 2, keys[1]), (1, 3, keys[1][:4])])
    text = Page(make_report([good])).text
    assert "12 samples, none of them twice in an epoch." in text
    assert "exactly once, the epoch is whole" in text
    assert "exactly once, so far" in text
    assert "1 of 12 samples stand twice in an epoch." in Page(make_report([bad])).text
    assert "Samples" not in Page(make_report([bad], with_ledger=False)).text


def test_450_000_steps_are_a_page_below_two_megabytes(tmp_path):
    rows = [train(10 * i, 3.0 * i, seconds=3.0 * i, loss=7 / i**0.1) for i in range(1, 45_001)]
    page = make_report([make_run(tmp_path / "a", rows, [start(0, until=135_001)])])
    assert page.stat().st_size < 500_000
    assert "450,000" in page.read_text()


def test_nine_runs_and_the_same_run_twice_are_refused(tmp_path):
    paths = [simple(tmp_path / str(number)) for number in range(9)]
    with pytest.raises(NotARunError, match="9 runs are too many to be told apart; give 8 at most"):
        make_report(paths)
    with pytest.raises(NotARunError, match="given twice"):
        make_report([paths[0], paths[0]])
    simple(tmp_path / "elsewhere" / "0")
    text = make_report([paths[0], tmp_path / "elsewhere" / "0"]).read_text()
    assert str(tmp_path / "elsewhere" / "0") in text


def test_the_verb_writes_where_it_says_and_refuses_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    simple(Path("runs/a"))
    assert cli.main(["report", "runs/a", "--output", "out"]) == 0
    assert capsys.readouterr().out == "out/index.html, and pictures beside it\n"
    assert "Made by pipeline report runs/a --output out" in Page(Path("out/index.html")).text
    Path("file").touch()
    for words, code, said in (
        (["runs/none"], 2, "runs/none is no run: it holds no config.yaml; give a directory like runs/NAME"),
        (["file"], 2, "file is no run"),
        (["runs/a", "--target", "72"], 2, "72 must lie between 0 and 1"),
        (["runs/a", "--output", "file/below"], 1, "file/below"),
        ([], 2, "RUN"),
    ):
        try:
            status = cli.main(["report", *words])
        except SystemExit as ending:
            status = ending.code
        error = capsys.readouterr().err
        assert status == code, error
        assert said in error.strip().splitlines()[-1]
        assert "Traceback" not in error


def test_a_report_needs_no_torch(tmp_path):
    simple(tmp_path / "a")
    code = f"""import sys
for name in ("torch", "lightning", "wandb", "hydra", "matplotlib"): sys.modules[name] = None
from pipeline import cli
sys.exit(cli.main(["report", {str(tmp_path / "a")!r}]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_it_without_a_complaint_on_a_desk_and_on_a_phone(tmp_path):
    source = comparison(tmp_path).read_text()
    asks = """<script>
const seen = [...document.querySelectorAll("svg")].map((s) => s.getBoundingClientRect().width);
const svg = document.querySelector("svg"), box = svg.getBoundingClientRect();
const first = Number(svg.querySelector("path[data-name]").getAttribute("d").slice(1).split(",")[0]);
const at = {clientX: box.left + first / 420 * box.width, clientY: box.top + 50};
svg.dispatchEvent(new PointerEvent("pointermove", at));
parent.postMessage([innerWidth, document.documentElement.scrollWidth, Math.min(...seen), Math.max(...seen),
  document.querySelector(".tip").textContent].join("|"), "*");</script>"""
    (tmp_path / "page.html").write_text(source.replace("</body>", asks + "</body>"))
    frames = "".join(f'<iframe src="page.html" width="{width}" height="900"></iframe>' for width in (1280, 390))
    hears = 'addEventListener("message", (e) => { document.body.append("[" + e.data + "]"); })'
    (tmp_path / "frames.html").write_text(f"<body><script>{hears}</script>{frames}</body>")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               "--window-size=1400,2000", f"--user-data-dir={tmp_path / 'profile'}",
               "--virtual-time-budget=3000", "--dump-dom", (tmp_path / "frames.html").as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    found = {int(each.split("|")[0]): each.split("|")[1:] for each in re.findall(r"\[(\d+\|.*?)\]", done.stdout)}
    assert set(found) == {1280, 390}
    for width, (scrolled, least, most, tip) in found.items():
        assert int(scrolled) <= width  # nothing hangs out at the side
        assert 320 <= float(least) <= float(most) <= 480  # one column or three: text is as large as it was drawn
        assert tip == "optimizer steps 10inception 17.5 %bn_baseline 30.0 %bn_x5 45.0 %"
