import signal

import pytest

from tests.helpers import write_pictures


@pytest.fixture
def photos(tmp_path):
    """30 images at two depths, three of them broken."""
    folder = tmp_path / "photos"
    write_pictures(folder, 14, ".jpg", (40, 60))
    write_pictures(folder / "more" / "deep", 13, ".png", (50, 34))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "more" / "text.png").write_text("this is no picture")
    (folder / "truncated.jpg").write_bytes((folder / "0000.jpg").read_bytes()[:400])
    return folder


@pytest.fixture(scope="session")
def few_photos(tmp_path_factory):
    """11 images and a broken one."""
    folder = tmp_path_factory.mktemp("photos")
    write_pictures(folder, 11)
    (folder / "broken.jpg").write_bytes(b"no")
    return folder


@pytest.fixture(autouse=True)
def as_at_a_terminal():
    """The tests may run under nohup, where SIGHUP is ignored, and processes inherit that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
