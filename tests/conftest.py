"""What several test files share. One thread a process, told before numpy and torch are imported: tests then neither
wait for spinning threads, nor differ by the load of the machine."""
import csv
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
DATABASE = SHARED / "acdc" / "database"
STUDENT = ROOT / "results" / "student_acdc7.pt"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_acdc = pytest.mark.skipif(not DATABASE.is_dir(), reason="no ACDC files in ../shared/acdc")


def python(*args, **options):
    """A process of this Python, waited for; what it says comes back as text."""
    command = [sys.executable, *(a if isinstance(a, bytes) else str(a) for a in args)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=280, **options)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def files(root):
    """{path below the folder: bytes}, hidden files too."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def one_line(text, *words):
    """A user's error: one line, which holds the words."""
    assert text, "nothing was said"
    assert "\n" not in text.removesuffix("\n"), text
    assert "Traceback" not in text
    for word in words:
        assert str(word) in text, (word, text)


def no_room(*_):
    """In place of what writes."""
    raise OSError(errno.ENOSPC, "No space left on device")


class Bomb:
    """What executes when it is unpickled, and leaves a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k))
    return figures


@pytest.fixture
def no_pictures(monkeypatch):
    """Most of an evaluation's or a prediction's time here; drawn in the tests that look at them."""
    import evaluate
    import predict
    for owner, name in ((evaluate, "draw_overlay"), (evaluate, "draw_agreement"), (predict, "draw_volumes")):
        monkeypatch.setattr(owner, name, lambda path, *_: path.write_text("drawn"))
