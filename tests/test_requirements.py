"""Requirement files are cut by their names and hashes, and what must not be in one is found."""

import json
import subprocess
import sys
import threading
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "requirements"))

import audit
from pins import pins

HERE = Path(__file__).parents[1] / "requirements"
HASH = "    --hash=sha256:" + "0" * 64


def file(tmp_path, *lines):
    path = tmp_path / "these.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def cut(*words):
    done = subprocess.run([sys.executable, HERE / "pins.py", *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr.strip()


def test_a_part_of_a_file_keeps_every_byte_of_its_pins():
    code, out, _ = cut(HERE / "runtime.txt", "--only", "numpy", "torch")
    assert code == 0
    assert out.count("numpy==") == 2  # one for each range of Pythons
    whole = (HERE / "runtime.txt").read_text()
    kept = [pin for pin in pins(HERE / "runtime.txt") if pin.text in out]
    assert {pin.name for pin in kept} == {"numpy", "torch"}
    assert out == "".join(pin.text for pin in kept)
    assert all(pin.text in whole for pin in kept)


def test_without_torch_nothing_is_left_that_comes_with_its_build_and_nothing_else_goes(tmp_path):
    everything = {pin.name for pin in pins(HERE / "runtime.txt")}
    _, out, _ = cut(HERE / "runtime.txt", "--without-torch")
    left = {pin.name for pin in pins(file(tmp_path, out))}
    gone = everything - left
    assert {"torch", "torchvision", "triton"} < gone
    assert all(name.startswith(("nvidia-", "cuda-")) for name in gone - {"torch", "torchvision", "triton"})
    assert {"lightning", "pytorch-lightning", "torchmetrics", "wandb", "numpy", "setuptools"} < left


def test_less_leaves_what_the_other_file_does_not_pin(tmp_path):
    _, out, _ = cut(HERE / "dev.txt", "--less", HERE / "runtime.txt")
    left = {pin.name for pin in pins(file(tmp_path, out))}
    assert {"pytest", "hypothesis"} < left
    assert not left & {pin.name for pin in pins(HERE / "runtime.txt")}


def test_what_cannot_be_cut_is_named(tmp_path):
    assert cut(HERE / "runtime.txt", "--only", "nosuch")[::2] == (
        2,
        f"pins: {HERE / 'runtime.txt'} does not pin nosuch",
    )
    code, _, err = cut(file(tmp_path, "torch>=2"))
    assert code == 2
    assert "'torch>=2' is no pin" in err
    assert cut(tmp_path / "absent.txt")[0] == 2


# --- audit ---


@pytest.mark.parametrize("path", sorted(HERE.glob("*.txt")), ids=lambda path: path.name)
def test_our_own_files_have_no_fault(path):
    assert list(audit.faults(path.name, pins(path))) == []


def test_a_malicious_release_and_a_pin_without_a_hash_are_faults(tmp_path):
    path = file(tmp_path, "lightning==2.6.3 \\", HASH, "pytorch-lightning==2.6.2 \\", HASH, "numpy==2.4.6")
    found = list(audit.faults("these.txt", pins(path)))
    assert [line.split(":")[1].split()[0] for line in found] == ["lightning", "pytorch-lightning", "numpy"]
    assert "is malicious" in found[0]
    assert "has no sha256" in found[2]
    assert list(audit.faults("these.txt", [])) == ["these.txt: no pin at all; `make requirements` writes it"]


def test_everything_that_is_installed_states_a_licence_that_allows_to_ship_it():
    table = audit.licences(pins(HERE / "runtime.txt"))
    assert len(table) > 60
    assert list(audit.licence_faults(table)) == []


@pytest.mark.parametrize(
    ("text", "refused"),
    [("GPL-3.0-only", True), ("GNU Affero General Public License v3", True), ("AGPL-3.0", True), ("", True),
     ("GNU General Public License v2 (GPLv2)", True), ("CC-BY-NC-4.0", True), ("LGPL-2.1-or-later", False),
     ("GNU Lesser General Public License v3 (LGPLv3)", False), ("MIT", False), ("Apache-2.0 AND MIT", False)],
)  # fmt: skip
def test_a_licence_that_reaches_what_it_is_shipped_with_is_a_fault(text, refused):
    assert bool(list(audit.licence_faults([("package", "1", text)]))) is refused


def test_a_licence_is_found_wherever_a_package_states_it():
    def stated(*headers):
        package = Message()
        for name, value in headers:
            package[name] = value
        return audit.licence(package)

    osi = ("Classifier", "License :: OSI Approved")
    assert stated(("License-Expression", "MIT"), osi) == "MIT"
    assert stated(osi, ("Classifier", "License :: OSI Approved :: MIT License"), ("License", "x")) == "MIT License"
    assert stated(osi, ("License", "BSD\n\nRedistribution and use")) == "BSD"
    assert stated(osi, ("License", "UNKNOWN")) == ""


# --- known vulnerabilities, by the real pip-audit ---


@pytest.fixture
def service():
    """A service that speaks OSV's language and knows one fault, of numpy."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
            affected = {
                "package": {"name": "numpy", "ecosystem": "PyPI"},
                "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99"}]}],
                "versions": ["2.4.6"],
            }
            fault = {"id": "PLANTED-1", "summary": "planted", "details": "planted", "affected": [affected]}
            body = json.dumps({"vulns": [fault]} if name == "numpy" else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def pip_audit():
    if not audit.pip_audit():
        pytest.skip("pip-audit is not installed: `make audit` does")


def test_a_known_vulnerability_is_a_fault(tmp_path, service, pip_audit, capsys):
    bad = file(tmp_path, "numpy==2.4.6 \\", HASH, "rich==15.0.0 \\", HASH)
    assert audit.main([str(bad), "--osv-url", service]) == 1
    assert "these.txt: numpy 2.4.6: PLANTED-1; fixed in 99" in capsys.readouterr().err
    good = file(tmp_path, "rich==15.0.0 \\", HASH)
    assert audit.main([str(good), "--osv-url", service]) == 0


def test_a_service_that_cannot_be_asked_has_a_code_of_its_own(tmp_path, pip_audit, capsys):
    good = file(tmp_path, "rich==15.0.0 \\", HASH)
    assert audit.main([str(good), "--osv-url", "http://127.0.0.1:9/v1/query"]) == 4
    assert "vulnerabilities were not looked up: 127.0.0.1: ConnectionError" in capsys.readouterr().err
    bad = file(tmp_path, "lightning==2.6.2 \\", HASH)
    assert audit.main([str(bad), "--osv-url", "http://127.0.0.1:9/v1/query"]) == 1  # a fault outweighs it


def test_bad_usage_is_a_line(tmp_path, capsys):
    assert audit.main([str(tmp_path / "absent.txt")]) == 2
    assert capsys.readouterr().err.startswith("audit: ")
