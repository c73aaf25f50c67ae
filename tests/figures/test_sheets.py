"""figures/sheets.py: what lies where, the pixels of small sheets, and what is said."""
import pytest
import torch
from PIL import Image

from figures.sheets import (
    COLOURS,
    FRAME,
    GROUP,
    LINE,
    MARGIN,
    Row,
    Tile,
    crop_names,
    fit,
    layout,
    plain,
    prototype_name,
    prototypes,
    prototypes_caption,
    sheet,
    views,
    views_caption,
    width_of,
    wrap,
)
from multicrop import IMAGENET_MEAN, IMAGENET_STD, parse_crops


def shade(value, side=20):
    return torch.full((3, side, side), value, dtype=torch.uint8)


def dark(page, left, upper, right, lower):
    """Number of black pixels: of text."""
    return sum(count for count, colour in page.crop((left, upper, right, lower)).getcolors(10 ** 6)
               if max(colour) < 100)


@pytest.mark.parametrize("columns", [1, 2])
def test_nothing_overlaps_and_all_lies_on_the_page(columns):
    rows = [Row(f"prototype {r}\nits count", [Tile(shade(0), ["rose", "0.93"], True)] * 3)
            for r in range(5)]
    heads = ["query", "neighbour 1", "neighbour 2"]
    place = layout("A caption. " * 30, rows, heads, columns)
    boxes = [(MARGIN, MARGIN + LINE * i, MARGIN + width_of(line), MARGIN + LINE * (i + 1))
             for i, line in enumerate(place.caption)]
    assert len(place.caption) > 1 and len(place.heads) == columns
    boxes += [(x, y, x + width_of(head), y + LINE) for group in place.heads
              for (x, y), head in zip(group, heads)]
    boxes += [(x, y, x + width_of(row.name), y + 2 * LINE)
              for (x, y), row in zip(place.names, rows)]
    for corners in place.images:
        for x, y in corners:
            boxes.append((x - FRAME, y - FRAME, x + 20 + FRAME, y + 20 + FRAME + 2 * LINE))
    for i, a in enumerate(boxes):
        assert a[0] >= MARGIN and a[1] >= MARGIN
        assert a[2] <= place.size[0] - MARGIN and a[3] <= place.size[1] - MARGIN
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    down = -(-5 // columns)             # the rows run down a group, then down the next
    for r, corners in enumerate(place.images):
        assert corners[0][1] == place.images[r % down][0][1]
        assert corners[0][0] == place.images[r // down * down][0][0]
    if columns == 2:
        gap = place.names[3][0] - (place.images[0][2][0] + place.cell)
        assert gap >= GROUP - FRAME


def test_images_lie_where_the_layout_says_and_marks_differ_in_form(tmp_path):
    rows = [Row("first", [Tile(shade(120), ["a", "0.5"]), Tile(shade(130), ["b", "0.4"], True),
                          None, Tile(shade(140), ["c", "0.3"], False)]),
            Row("", [Tile(shade(150))])]
    said = "What it shows.", rows, ["left"]
    sheet(tmp_path / "new" / "sheet.png", *said)
    page, place = Image.open(tmp_path / "new" / "sheet.png"), layout(*said)
    assert page.size == place.size
    for row, corners in zip(rows, place.images):
        for tile, (x, y) in zip(row.tiles, corners):
            if tile:
                value = int(tile.image[0, 0, 0])
                assert page.crop((x, y, x + 20, y + 20)).getcolors() == [(400, (value,) * 3)]
    none, right, empty, wrong = place.images[0]

    def border(x, y):                   # a pixel outside of the image, all around
        return [page.getpixel(at) for i in range(-1, 21)
                for at in ((x + i, y - 1), (x + i, y + 20), (x - 1, y + i), (x + 20, y + i))]

    assert {*border(*none)} == {*border(*empty)} == {(255, 255, 255)}
    assert {*border(*right)} == {COLOURS[True]}
    assert {*border(*wrong)} == {COLOURS[False], (255, 255, 255)}
    x, y = empty
    assert page.crop((x, y, x + 20, y + 20)).getcolors() == [(400, (255, 255, 255))]
    # the marks are of the frame's colour, and no two are the same; then comes the text
    marks = {}
    for tile, (x, y) in zip(rows[0].tiles, place.images[0]):
        if tile:
            upper = y + 20 + FRAME
            marks[tile.right] = {
                (dx, dy) for dx in range(-1, 11) for dy in range(LINE)
                if page.getpixel((x + dx, upper + dy)) == COLOURS.get(tile.right)}
            for line in (0, 1):
                assert dark(page, x, upper + LINE * line, x + place.cell, upper + LINE * (line + 1))
    assert not marks[None] and min(len(marks[True]), len(marks[False])) > 15
    assert marks[True] != marks[False]
    # the caption, the heads and the names
    assert dark(page, MARGIN, MARGIN, 300, MARGIN + LINE)
    assert dark(page, *place.heads[0][0], place.heads[0][0][0] + 30, place.heads[0][0][1] + LINE)
    assert dark(page, *place.names[0], none[0] - 4, place.names[0][1] + LINE)
    assert not dark(page, place.names[1][0], place.names[1][1], place.images[1][0][0], page.height)


def test_a_place_is_as_wide_as_its_text_needs_up_to_a_limit():
    def cell(*text):
        return layout("", [Row("", [Tile(shade(0, 96), text, True)])]).cell

    assert cell() == cell("0.93") == 96 + 2 * FRAME
    assert width_of("vote: n01440764") < cell("vote: n01440764") < cell("long " * 20) == 144


def test_text_keeps_to_its_place_whatever_it_holds():
    assert plain("  caf\u00e9\n \u00fcber\t") == "cafe uber" and plain("\u4e2d") == "\\u4e2d"
    assert plain("a\udce9b") == "a\\udce9b"                 # of a file name that is not UTF-8
    assert width_of("") == 0 and width_of("a\nwide line") == width_of("wide line")
    assert fit("short", 100) == "short"
    for text in ("great_white_shark_of_the_sea", "\u4e2d" * 20):
        cut = fit(text, 96)
        assert width_of(cut) <= 96 and cut.startswith("...") and plain(text).endswith(cut[3:])
    words = "some words that are too many for one line"
    assert " ".join(wrap(words, 100)) == words and len(wrap(words, 100)) > 2
    assert max(map(width_of, wrap(words, 100))) <= 100
    assert wrap("a\nb", 100) == ["a", "b"] and wrap("unbreakable_", 5) == ["unbreakable_"]


def test_the_sheet_shows_the_nearest_images_of_each_prototype(tmp_path):
    # 12 images, each of one shade; prototype k likes image k best, then k + 1, k + 2
    images = torch.stack([shade(20 * i, 8) for i in range(12)])
    scores = torch.zeros(12, 5)
    for k in range(5):
        scores[k:k + 3, k] = torch.tensor([1.0, 0.5, 0.25])
    prototypes(tmp_path / "sheet.png", scores, images, nearest=3, columns=2)
    page = Image.open(tmp_path / "sheet.png").convert("L")
    # rows run down the columns, the prototype with most images first: 0 has 6 of them, 4 has 3
    order, counts = (0, 4, 1, 2, 3), (6, 3, 1, 1, 1)
    rows = [Row(prototype_name(k, n), [Tile(images[0])] * 3) for k, n in zip(order, counts)]
    place = layout(prototypes_caption(12, 5, 5, 3), rows, columns=2)
    assert page.size == place.size
    for k, corners in zip(order, place.images):
        seen = [page.getpixel((x + 4, y + 4)) for x, y in corners]
        assert seen == [20 * (k + i) for i in range(3)]
    prototypes(tmp_path / "one.png", scores[:, :1], images)         # nothing to arrange
    prototypes(tmp_path / "few.png", scores[:2], images[:2], most=3)


def test_large_images_are_shown_smaller(tmp_path):
    prototypes(tmp_path / "sheet.png", torch.randn(4, 3), torch.zeros(4, 3, 224, 224).byte())
    assert Image.open(tmp_path / "sheet.png").width < 3 * (100 + 4 * 102 + GROUP)


def test_what_is_said_of_prototypes():
    assert prototype_name(17, 31) == "prototype 17\n31 images"
    assert prototype_name(3, 1) == "prototype 3\n1 image"
    every, some = prototypes_caption(2048, 64, 64, 8), prototypes_caption(2048, 3000, 64, 8)
    assert every.startswith("The 64 prototypes: a row each, with the 8 images nearest to it among "
                            "2,048, the nearest first.")
    assert some.startswith("Of 3,000 prototypes the 64 with most images: a row each")
    assert "The count is of the images to which this prototype is the nearest one." in every


def test_a_batch_is_shown_a_row_an_image(tmp_path):
    # 10 images, of which 8 are shown; crop c of image i has shade 20 i + 5 c
    specs = parse_crops("2x12+1x8")
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    crops = [torch.stack([((20 * i + 5 * c) / 255 - mean) / std * torch.ones(3, size, size)
                          for c in crops for i in range(10)])
             for crops, size in (((0, 1), 12), ((2,), 8))]
    views(tmp_path / "views.png", crops, specs, IMAGENET_MEAN, IMAGENET_STD)
    page = Image.open(tmp_path / "views.png").convert("L")
    rows = [Row(f"image {i + 1}", [Tile(shade(0, 12))] * 3) for i in range(8)]
    place = layout(views_caption(8), rows, crop_names(specs))
    assert page.size == place.size
    for i, corners in enumerate(place.images):
        assert [page.getpixel((x + 6, y + 6)) for x, y in corners] == [
            20 * i + 5 * c for c in range(3)]
        x, y = corners[2]               # a small crop: below its name, 8 pixels of 12
        assert [page.getpixel((x, y + dy)) for dy in (1, 2, 9, 10)] == [255, 20 * i + 10,
                                                                        20 * i + 10, 255]
        assert page.getpixel((x + 8, y + 6)) == 255


def test_what_is_said_of_a_batch():
    assert crop_names(parse_crops("2x64+1x32")) == [
        "crop 1\n64 px\nassigned", "crop 2\n64 px\nassigned", "crop 3\n32 px\nsmall"]
    assert crop_names(parse_crops("3x48"))[2] == "crop 3\n48 px\n"
    assert views_caption(8).startswith("The first 8 images of the first batch: augmented crops")
    assert "Assigned crops get codes by Sinkhorn-Knopp" in views_caption(8)
