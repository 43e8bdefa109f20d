"""Processes that share out tasks: all results come, and none of them outlives the process it works for."""

import subprocess
import sys
import time
from pathlib import Path

from pipeline.data.pool import completed

ENDLESS = """
import os, sys, time
from pathlib import Path
from pipeline.data.pool import completed

def work(directory):
    Path(directory, str(os.getpid())).touch()
    time.sleep(120)

if __name__ == "__main__":
    list(completed(work, [sys.argv[1]] * 2, workers=2))
"""


def square(number: int) -> int:
    return number * number


def test_every_task_is_done_once_whatever_the_number_of_processes():
    for workers in (1, 2):
        assert sorted(completed(square, range(7), workers)) == [0, 1, 4, 9, 16, 25, 36]


def test_no_process_outlives_the_one_it_works_for(tmp_path):
    script, begun = tmp_path / "endless.py", tmp_path / "begun"
    script.write_text(ENDLESS)
    begun.mkdir()
    parent = subprocess.Popen([sys.executable, str(script), str(begun)], cwd=Path(__file__).parents[2])
    try:
        until(lambda: len(list(begun.iterdir())) == 2)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not any(alive(int(path.name)) for path in begun.iterdir()))


LOADING = """
import sys
from pipeline.data.loader import Workers

class Items:
    def __getitem__(self, place):
        return place.number, []

if __name__ == "__main__":
    workers = Workers(Items(), 1)
    list(workers.load(0, range(3)))
    cycle = [workers]
    cycle.append(cycle)  # which nobody breaks before the end
    print("loaded")
"""


def test_a_process_with_workers_ends_when_it_is_done(tmp_path):
    script = tmp_path / "loading.py"
    script.write_text(LOADING)
    ended = subprocess.run([sys.executable, str(script)], cwd=Path(__file__).parents[2], timeout=60,
                           capture_output=True, text=True, check=False)  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "loaded\n"), ended.stderr


def until(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(process: int) -> bool:
    """A zombie that nobody has waited for has no command line left."""
    command = Path(f"/proc/{process}/cmdline")
    try:
        return bool(command.read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False
