"""The uncurated set, on hand-made packages: what is in, what is out, and the same bytes again."""
import gzip
import io
import zipfile

import numpy
import pytest
from PIL import Image

from tests import real_sets, uncurated


def noise(width, height, seed, mode="RGB"):
    """Coarse: shrinking it leaves its signature."""
    values = numpy.random.default_rng(seed).integers(0, 256, (8, 8, len(mode)), dtype=numpy.uint8)
    return Image.fromarray(values, mode).resize((width, height), Image.Resampling.NEAREST)


def as_held(image, path):
    """As the sets write it: 160 pixels, on white."""
    path.parent.mkdir(parents=True)
    list(real_sets.small([("cat", image)]))[0][3].save(path)


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Two evaluation sets. Of one's files the path is also in the pretraining package, or the
    bytes are, or the image at another size is; the other is of tiles."""
    monkeypatch.setattr(uncurated, "SETS", (real_sets.drawings, real_sets.photographs))
    root = tmp_path / "sets"
    for name, size, seed in (("ours/by_path.png", (64, 64), 8),
                             ("theirs/by_bytes.png", (64, 64), 9),
                             ("theirs/tiles.png", (1200, 1100), 10)):
        path = root / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(*size, seed).save(path)
    noise(438, 438, 0, "RGBA").save(tmp_path / "large.png")
    as_held(tmp_path / "large.png", root / "drawings" / "val" / "cat" / "0.png")
    for name, sources in (("drawings", "ours/by_path.png\ntheirs/by_bytes.png\n"),
                          ("photographs", "theirs/tiles.png\n")):
        (root / name).mkdir(exist_ok=True)
        (root / name / "sources.txt").write_text(sources)
    return root


@pytest.fixture
def package(tmp_path, sets):
    folder = tmp_path / "packages" / "ours"
    folder.mkdir(parents=True)
    noise(32, 20, 2).save(folder / "a.png")
    noise(32, 20, 2).save(folder / "b_same_pixels.bmp")
    noise(32, 20, 3, "RGBA").save(folder / "c_transparent.png")
    noise(15, 90, 4).save(folder / "d_small.png")
    noise(1100, 1200, 5).save(folder / "e_large.jpg")
    noise(900, 600, 6).save(folder / "f_long.png")
    (folder / "g_damaged.png").write_bytes(b"\x89PNG")
    (folder / "h_link.png").symlink_to(folder / "f_long.png")
    noise(40, 40, 1).save(folder / "by_path.png")
    (folder / "i_held.png").write_bytes(
        (sets / "packages" / "theirs" / "by_bytes.png").read_bytes())
    noise(32, 32, 0, "RGBA").save(folder / "j_held_smaller.png")
    noise(438, 438, 0, "RGBA").save(folder / "j_held_larger.png")
    margin = Image.new("RGBA", (400, 300))
    margin.paste(noise(200, 200, 0, "RGBA"), (150, 20))
    margin.save(folder / "j_held_with_margin.png")
    noise(1200, 1100, 10).crop((400, 366, 800, 733)).save(folder / "j_view_of_tiles_source.png")
    large = noise(1200, 1200, 11)                       # one of its views is held, so none is in
    large.paste(real_sets.on_white(noise(400, 400, 0, "RGBA")), (800, 400))
    large.save(folder / "j_view_is_held.png")
    (folder / "deeper").mkdir()
    noise(40, 40, 12).save(folder / "deeper" / "by_path.png")       # the name of one that is held
    file = io.BytesIO()
    noise(24, 24, 7).save(file, "TGA")
    with zipfile.ZipFile(folder / "k.pk3", "w") as archive:
        archive.writestr("textures/wall.tga", file.getvalue())
        archive.writestr("sound.ogg", b"no picture")
    return folder


def gathered(package, out, sets):
    return uncurated.gather(package, out, set(), uncurated.held(sets), 2)


def test_what_is_in_and_what_is_out(package, sets, tmp_path):
    kept = gathered(package, tmp_path / "out", sets)
    views = [path for _, path in kept].count("e_large.jpg")
    assert [path for _, path in kept if path != "e_large.jpg"] == [
        "a.png", "c_transparent.png", "f_long.png", "k.pk3/textures/wall.tga"]
    assert views == 10                                  # itself, and 3 x 3 views
    written = {path: tmp_path / "out" / "ours" / name for name, path in kept}
    assert len(list((tmp_path / "out" / "ours").iterdir())) == len(kept) == 14
    for path in ("a.png", "c_transparent.png"):         # as they are
        assert written[path].read_bytes() == (package / path).read_bytes()
    assert Image.open(written["f_long.png"]).size == (512, 341)
    assert Image.open(written["k.pk3/textures/wall.tga"]).format == "PNG"


def test_names_of_a_set_that_the_package_is_akin_to_are_out(sets, tmp_path, monkeypatch):
    folder = tmp_path / "packages" / "ours"
    folder.mkdir(parents=True)
    noise(40, 40, 13).save(folder / "by_bytes.png")     # the name in the set's package `theirs`
    assert len(gathered(folder, tmp_path / "one", sets)) == 1
    monkeypatch.setitem(uncurated.AKIN, "ours", "theirs")
    assert len(gathered(folder, tmp_path / "two", sets)) == 0


def test_views_are_the_grid(package):
    large = Image.open(package / "e_large.jpg")
    _, first, *_, last = [Image.open(io.BytesIO(data)) for data, *_ in uncurated.pictures(
        (package / "e_large.jpg").read_bytes())]
    assert (first.size, last.size) == ((234, 256), (235, 256))      # 366 and 367 x 400, shrunk
    for view, box in ((first, (0, 0, 366, 400)), (last, (733, 800, 1100, 1200))):
        expected = numpy.asarray(large.crop(box).resize((30, 30)), float)
        assert abs(numpy.asarray(view.resize((30, 30)), float) - expected).mean() < 8


@pytest.mark.long
def test_the_same_bytes_again(package, sets, tmp_path):
    written = []
    for run in ("one", "two"):
        gathered(package, tmp_path / run, sets)
        paths = uncurated.pack(uncurated.open_images(tmp_path / run), tmp_path / f"{run}.shards")
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]


def test_alike_is_by_root_mean_square_and_contrast():
    flat, steps = numpy.zeros((1, 192), numpy.float32), numpy.zeros((1, 64, 3), numpy.float32)
    steps[:, ::2] = 200                                 # its contrast is 100
    for other, limit in ((flat, 4), (steps.reshape(1, 192), 35)):
        rows = numpy.concatenate([other + limit + apart for apart in (-0.1, 0.1)])
        assert uncurated.alike(rows, other).tolist() == [True, False]


def test_fonts_are_read_as_glyphs_alone(tmp_path):
    (tmp_path / "a.ttf").touch()
    (tmp_path / "a.png").touch()
    assert uncurated.members(tmp_path) == [("a.png", "")]
    assert uncurated.members(tmp_path, fonts=True) == [("a.ttf", "")]


def test_licences_are_the_lines_of_the_copyright_file(tmp_path):
    doc = tmp_path / "usr" / "share" / "doc" / "ours"
    doc.mkdir(parents=True)
    (doc / "copyright").write_text("Files: *\nLicense: CC-BY-SA-3.0\n text\nLicense:  GPL-2+ \n")
    assert uncurated.licences(tmp_path)[1] == ["CC-BY-SA-3.0", "GPL-2+"]


def test_the_version_is_that_of_the_changelog(tmp_path):
    assert uncurated.version(tmp_path) == "of an unknown version"
    doc = tmp_path / "usr" / "share" / "doc" / "ours"
    doc.mkdir(parents=True)
    with gzip.open(doc / "changelog.Debian.gz", "wt") as file:
        file.write("theirs (1:0.9-2) unstable; urgency=low\n\n  * (none)\n")
    assert uncurated.version(tmp_path) == "1:0.9-2"


def test_sets_that_are_not_whole_are_an_error(sets):
    (sets / "packages" / "theirs" / "by_bytes.png").unlink()
    with pytest.raises(ValueError, match="by_bytes.png: python tests/real_sets.py"):
        uncurated.held(sets)
    (sets / "drawings" / "sources.txt").unlink()
    with pytest.raises(ValueError, match="no whole set"):
        uncurated.held(sets)


def test_a_folder_with_shards_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "000000.tar").touch()
    with pytest.raises(ValueError, match="shards already"):
        uncurated.main(tmp_path, tmp_path)
