"""shards.py: reading in place, the index, packing, and tar files that are not as they should be."""
import gzip
import io
import json
import multiprocessing
import os
import pickle
import tarfile
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from data import images, shards
from data.images import open_images
from data.stream import Positions, Stream, collate
from multicrop import MultiCrop, parse_crops
from tests.data.conftest import resident_mb
from tests.helpers import write_pictures


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """members: (name, bytes), or a TarInfo of no content."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))


@pytest.fixture
def three(tmp_path):
    """Three shards of 3, 0 and 2 images, in WebDataset's layout."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "000.tar", [(f"{i}.{kind}", f"{kind}{i}".encode()) for i in range(3)
                                   for kind in ("jpg", "cls", "json")])
    write_tar(folder / "001.tar", [("readme.txt", b"no picture"), ("._a.jpg", b"macOS's note")])
    write_tar(folder / "002.tar", [("deep/er/3.PNG", b"png3"), ("4.jpeg", b"")])
    return folder


def contents(images):
    return [images[i] for i in range(len(images))]


@pytest.mark.parametrize("spec", ["{000..002}.tar", "*.tar", "00[0-2].tar"])
def test_pictures_are_read_in_place_from_any_way_to_write_the_shards(three, spec):
    found = open_images(three / spec)
    assert contents(found) == [b"jpg0", b"jpg1", b"jpg2", b"png3", b""] and found.labels is None
    assert [found.name(i) for i in (0, 3)] == [
        f"{three}/000.tar/0.jpg", f"{three}/002.tar/deep/er/3.PNG"]
    assert contents(pickle.loads(pickle.dumps(found))) == contents(found)
    beside = [path.name for path in three.glob(".*.index")]
    assert beside == [found.index.name]                             # one file
    with pytest.raises(IndexError):
        found[5]


def test_braces_keep_their_digits():
    assert shards.expand("a{08..11}-{0..1}.tar") == [
        f"a{i}-{j}.tar" for i in ("08", "09", "10", "11") for j in (0, 1)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar(tmp_path, format, capsys):
    """Long and odd names, links, folders and devices among the pictures."""
    long = "ä" * 40 if format == tarfile.USTAR_FORMAT else "long/" * 60 + "ä"
    folder, link = tarfile.TarInfo("folder.jpg"), tarfile.TarInfo("link.jpg")
    folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "/etc/passwd"
    members = [(f"{long}.jpg", b"one"), folder, link, ("../../up.jpg", b"two" * 1000),
               ("/root.png", b"three")]
    write_tar(tmp_path / "a.tar", members, format)
    found = open_images(tmp_path / "a.tar")
    assert contents(found) == [b"one", b"two" * 1000, b"three"]
    assert [found.name(i) for i in range(3)] == [
        f"{tmp_path}/a.tar/{name}" for name in (f"{long}.jpg", "../../up.jpg", "/root.png")]
    assert "1 links, sparse or too large" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.tar", found.index.name, f"{found.index.name}.lock"}


def test_archives_in_a_row_are_all_read(three):
    (three / "all.tar").write_bytes(b"".join((three / f"00{i}.tar").read_bytes() for i in range(3)))
    assert contents(open_images(three / "all.tar")) == [b"jpg0", b"jpg1", b"jpg2", b"png3", b""]


@pytest.mark.parametrize("header", [
    {"size": "-5"}, {"size": "9" * 40}, {"GNU.sparse.map": "x,y"}, {"GNU.sparse.size": "x"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"path": ""}])
def test_an_odd_header_costs_no_more_than_its_file(tmp_path, header):
    with tarfile.open(tmp_path / "odd.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in (("0.jpg", {}), ("odd.jpg", header), ("1.jpg", {})):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 4, headers
            tar.addfile(info, io.BytesIO(b"data"))
    write_tar(tmp_path / "good.tar", [("2.jpg", b"good")])
    found = open_images(tmp_path / "*.tar")
    if len(found) == 1:
        assert found[0] == b"good"
    else:
        assert {found[0], found[len(found) - 1]} == {b"good", b"data"}
    assert all(found.name(i) for i in range(len(found)))


def test_what_has_changed_is_scanned_anew_and_only_that(three, monkeypatch):
    spec = three / "*.tar"
    open_images(spec)
    scanned, scan = [], shards.scan
    monkeypatch.setattr(shards, "scan", lambda path: scanned.append(Path(path).name) or scan(path))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)     # in this process
    open_images(spec)
    assert scanned == []
    write_tar(three / "001.tar", [("new.jpg", b"new")])
    assert contents(open_images(spec)) == [b"jpg0", b"jpg1", b"jpg2", b"new", b"png3", b""]
    assert scanned == ["001.tar"]
    time.sleep(0.01)
    os.utime(three / "000.tar")                         # another time, the same size
    open_images(spec)
    assert scanned == ["001.tar", "000.tar"]
    scanned.clear()
    write_tar(three / "003.tar", [("more.jpg", b"more")])
    assert len(open_images(spec)) == 7 and scanned == ["003.tar"]       # another set, mostly known
    (three / "003.tar").unlink()
    index = open_images(spec).index
    for other in three.glob(".*.index"):
        other.unlink() if other != index else None
    for damage in (lambda data: data[:-1], lambda data: b"", lambda data: data[:5] + data,
                   lambda data: b"x" * 50):
        scanned.clear()
        index.write_bytes(damage(index.read_bytes()))
        assert len(open_images(spec)) == 6 and len(scanned) == 3


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(three, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    beside = open_images(three / "*.tar").index
    beside.unlink()
    make = shards.make_index

    def read_only(index, *rest):
        if index.parent == three:
            raise PermissionError(13, "Permission denied")
        make(index, *rest)

    monkeypatch.setattr(shards, "make_index", read_only)
    found = open_images(three / "*.tar")
    assert found.index.parent == tmp_path / "cache" / "seer-in-the-open" and len(found) == 5
    assert open_images(three / "*.tar").index == found.index
    monkeypatch.setattr(shards, "make_index", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    found.index.unlink()
    with pytest.raises(ValueError, match="cannot be written: .*full; .*full"):
        open_images(three / "*.tar")


@pytest.fixture
def good(tmp_path):
    """A tar file of four images, in 1536 bytes each: a header of 512, and 1000 of content."""
    write_tar(tmp_path / "good.tar", [(f"{i}.jpg", bytes([i]) * 1000) for i in range(4)])
    return (tmp_path / "good.tar").read_bytes()


@pytest.mark.parametrize("cut, words", [
    (lambda good: good[:3 * 1536 + 600], "cut short; 4 images"),
    (lambda good: good[:3 * 1536 + 100], "cut short; 3 images"),
    (lambda good: good[:3 * 1536] + b"x" * 512 + good[3 * 1536 + 512:], "damaged at byte 4608"),
], ids=["in an image", "in a header", "damaged"])
def test_damaged_tar_files_give_what_they_hold(tmp_path, capsys, good, cut, words):
    (tmp_path / "bad.tar").write_bytes(cut(good))
    found = open_images(tmp_path / "bad.tar")
    assert words in capsys.readouterr().err
    assert [found[i] for i in range(3)] == [bytes([i]) * 1000 for i in range(3)]


def test_what_is_behind_the_damage_is_found(tmp_path, capsys, good):
    (tmp_path / "hole.tar").write_bytes(good[:1536] + b"x" * 200 + good[1536 + 200:])
    found = open_images(tmp_path / "hole.tar")
    assert contents(found) == [bytes([i]) * 1000 for i in (0, 2, 3)]
    assert "damaged at byte 1536" in capsys.readouterr().err


def test_a_picture_that_is_cut_short_is_a_fault(tmp_path, good):
    (tmp_path / "cut.tar").write_bytes(good[:3 * 1536 + 600])
    stream = Stream(open_images(tmp_path / "cut.tar"), lambda data, *_: ([], data[:1]), 0)
    faults = [fault for position in range(4) for fault in stream[position][2]]
    assert [(fault.name[-5:], fault.cause, fault.detail) for fault in faults] == [
        ("3.jpg", "truncated", "88 of 1000 bytes are there")]


def test_what_are_no_shards_is_named(tmp_path, capsys, good):
    for name, data in (("none", b""), ("text", b"no tar" * 500), ("packed", gzip.compress(good))):
        (tmp_path / f"{name}.tar").write_bytes(data)
        with pytest.raises(ValueError, match="no images in"):
            open_images(tmp_path / f"{name}.tar")
    assert "a compressed one, which cannot be read at random" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no shards match"):
        open_images(tmp_path / "x*.tar")
    with pytest.raises(ValueError, match="shard .*7.tar of .*No such file"):
        open_images(tmp_path / "{7..9}.tar")
    for braces in ("{5..3}", "{0..99999999999}"):
        with pytest.raises(ValueError, match="needs FIRST..LAST, at most 10,000,000"):
            open_images(tmp_path / f"{braces}.tar")


def test_a_shard_that_vanishes_or_changes_is_a_fault(three):
    found = open_images(three / "*.tar")
    (three / "002.tar").unlink()
    stream = Stream(found, lambda data, *_: ([], []), 0)
    faults = [fault for position in range(5) for fault in stream[position][2]]
    assert {fault.cause for fault in faults} == {"vanished"} and "002.tar/at byte" in faults[0].name
    write_tar(three / "002.tar", [("secret.txt", b"no picture" * 99)])
    faults = [fault for position in range(5) for fault in stream[position][2]]
    assert {fault.cause for fault in faults} == {"changed"}


def test_shards_of_the_same_name_are_told_apart(tmp_path):
    for folder in "xyz":
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", [(f"{folder}.jpg", folder.encode() * 5)])
        os.utime(tmp_path / folder / "0.tar", (10 ** 9, 10 ** 9))       # size and time the same too
    assert contents(open_images(tmp_path / "[xy]" / "0.tar")) == [b"xxxxx", b"yyyyy"]
    assert contents(open_images(tmp_path / "[xz]" / "0.tar")) == [b"xxxxx", b"zzzzz"]


def test_packed_pictures_are_the_folders(tmp_path, capsys):
    write_pictures(tmp_path / "photos" / "deep", 20)
    write_pictures(tmp_path / "photos", 3, ".webp")
    (tmp_path / "photos" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    images.main(["pack", str(tmp_path / "photos"), str(tmp_path / "out"), "--shard-size=8k"])
    spec = capsys.readouterr().out.strip()
    assert spec.startswith("--data '") and spec.endswith(".tar'")
    spec = spec.removeprefix("--data '").removesuffix("'")
    folder, packed = open_images(tmp_path / "photos"), open_images(spec)
    kept = [i for i in range(len(folder)) if folder.name(i) != "gone.jpg"]
    assert contents(packed) == [folder[i] for i in kept] and len(kept) == 23
    names = [packed.name(i).split(".tar/")[1] for i in range(len(packed))]
    assert names == [folder.name(i) for i in kept]
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(sizes) > 3 and max(sizes) < 8000 + 10240
    with pytest.raises(SystemExit):
        images.main(["pack", str(tmp_path / "photos"), str(tmp_path / "out")])
    assert "holds tar files already" in capsys.readouterr().err
    (tmp_path / "list.txt").write_text("photos/nothing.jpg\nlist.txt\n")
    with pytest.raises(SystemExit):
        images.main(["pack", str(tmp_path / "list.txt"), str(tmp_path / "none")])
    error = capsys.readouterr().err
    assert "left out list.txt: its name does not end" in error and "nothing is written" in error
    images.main(["pack", str(tmp_path / "photos"), str(tmp_path / "again"), "--shard-size=8k"])
    assert all((tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
               for path in (tmp_path / "out").glob("*.tar"))


def test_a_size_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        images.main(["pack", "a", "b", "--shard-size=1X"])
    assert "'1X' is not a size" in capsys.readouterr().err
    sizes = [images.parse_size(text) for text in ("1G", "500M", "1.5k", "7")]
    assert sizes == [10 ** 9, 5 * 10 ** 8, 1500, 7]


def count_pictures(spec, report, slow):
    """As a rank does. slow: and does not come to an end."""
    if slow:                            # in this process alone, so that all of it can be killed
        os.cpu_count, shards.scan = lambda: 1, lambda path: time.sleep(60)
    report.send("ready")
    report.send(len(open_images(spec)))


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_several_processes_make_one_index_also_when_one_is_killed(three, start):
    """As the ranks of a machine do: each gets the whole, and none waits for one that has died."""
    context = multiprocessing.get_context(start)

    def begin(slow=False):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=count_pictures, args=(three / "*.tar", send, slow))
        process.start()
        assert receive.recv() == "ready"
        return process, receive

    killed, _ = begin(slow=True)
    deadline = time.monotonic() + 60
    while not list(three.glob(".*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.01)
    others = [begin() for _ in range(3)]
    assert not any(receive.poll(0.2) for _, receive in others)          # they wait for the lock
    killed.kill()
    killed.join()
    counts = [receive.recv() if receive.poll(60) else None for _, receive in others]
    for process, _ in others:
        process.join(60)
        process.kill()
    assert counts == [5] * 3
    left = [path.suffix for path in three.iterdir() if path.suffix not in (".tar", ".lock")]
    assert left == [".index"]


@pytest.mark.parametrize("context", [
    "fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_worker_processes_read_the_same(tmp_path, context):
    write_pictures(tmp_path / "photos", 12)
    shards.pack(open_images(tmp_path / "photos"), tmp_path / "out", 9000)
    streams = [Stream(open_images(spec), MultiCrop(parse_crops("2x16")), 3)
               for spec in (tmp_path / "photos", tmp_path / "out" / "*.tar")]
    plain = list(DataLoader(streams[0], batch_sampler=Positions(0, 3, 6), collate_fn=collate))
    packed = list(DataLoader(streams[1], batch_sampler=Positions(0, 3, 6), collate_fn=collate,
                             num_workers=2, multiprocessing_context=context))
    for one, other in zip(plain, packed, strict=True):
        assert torch.equal(one[0][0], other[0][0]) and torch.equal(one[1][0], other[1][0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory in /proc")
def test_a_billion_pictures_cost_a_memory_map(tmp_path):
    """An index of a billion rows, which the file system does not store for they are zeros."""
    count = 1_000_000_000
    footer = json.dumps([["a.tar", 1, 1, count // 2], ["b.tar", 1, 1, count // 2]]).encode()
    with open(tmp_path / "index", "wb") as file:
        file.truncate(12 * count)
        file.seek(0, os.SEEK_END)
        file.write(footer + len(footer).to_bytes(8, "little") + shards.MAGIC)

    before = resident_mb()
    found = shards.Shards([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], tmp_path / "index")
    stream = Stream(found, None, 0)
    places = {found.place(stream.index(position))[0] for position in range(500)}
    assert len(found) == count and places == {0, 1}
    assert resident_mb() - before < 50
