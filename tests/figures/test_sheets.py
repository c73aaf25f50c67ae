"""figures/sheets.py: the pixels of small sheets."""
import torch
from PIL import Image

from figures.sheets import FRAME, prototypes, sheet, views
from multicrop import IMAGENET_MEAN, IMAGENET_STD, parse_crops


def test_the_sheet_shows_the_nearest_images_of_each_prototype(tmp_path):
    # 12 images, each of one shade; prototype k likes image k best, then k + 1, k + 2
    shades = torch.arange(12) * 20
    images = shades.view(-1, 1, 1, 1).expand(12, 3, 8, 8).to(torch.uint8)
    scores = torch.zeros(12, 5)
    for k in range(5):
        scores[k:k + 3, k] = torch.tensor([1.0, 0.5, 0.25])
    prototypes(tmp_path / "sheet.png", scores, images, nearest=3, columns=2)
    page = Image.open(tmp_path / "sheet.png").convert("L")
    side, gap = 8 + 2 * FRAME, 2 * FRAME
    width, height = 3 * side, side
    assert page.size == (2 * (width + gap) + gap, 3 * (height + gap) + gap)
    # rows run down the columns, the prototype with most images first: 0 has 6 of them, 4 has 3
    for row, k in enumerate((0, 4, 1, 2, 3)):
        x, y = gap + row // 3 * (width + gap), gap + row % 3 * (height + gap)
        seen = [page.getpixel((x + side * i + 6, y + 6)) for i in range(3)]
        assert seen == [20 * (k + i) for i in range(3)]
    prototypes(tmp_path / "one.png", scores[:, :1], images)         # nothing to arrange
    prototypes(tmp_path / "few.png", scores[:2], images[:2], most=3)


def test_right_and_wrong_images_are_framed(tmp_path):
    gray = torch.full((3, 6, 6), 128, dtype=torch.uint8)
    rows = [[(gray, None), (gray, True), (gray, False)], [(gray, None)]]
    sheet(tmp_path / "new" / "sheet.png", rows)
    page, side, gap = Image.open(tmp_path / "new" / "sheet.png"), 6 + 2 * FRAME, 2 * FRAME
    assert page.size == (3 * side + 2 * gap, 2 * side + 3 * gap)
    frames = [page.getpixel((gap + i * side, gap)) for i in range(3)]
    assert frames == [(255, 255, 255), (0, 170, 0), (220, 0, 0)]
    middles = [page.getpixel((gap + i * side + 5, gap + 5)) for i in range(3)]
    assert middles == [(128, 128, 128)] * 3


def test_a_batch_is_shown_a_row_an_image(tmp_path):
    # 10 images, of which 8 are shown; crop c of image i has shade 20 i + 5 c
    specs = parse_crops("2x12+1x8")
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    crops = [torch.stack([((20 * i + 5 * c) / 255 - mean) / std * torch.ones(3, size, size)
                          for c in crops for i in range(10)])
             for crops, size in (((0, 1), 12), ((2,), 8))]
    views(tmp_path / "views.png", crops, specs, IMAGENET_MEAN, IMAGENET_STD)
    page = Image.open(tmp_path / "views.png").convert("L")
    side, gap = 12, 2                                               # the gap is save_image's
    assert page.size == (3 * (side + gap) + gap, 8 * (side + gap) + gap)
    for i in range(8):
        y = gap + i * (side + gap)
        seen = [page.getpixel((gap + c * (side + gap) + 6, y + 6)) for c in range(3)]
        assert seen == [20 * i + 5 * c for c in range(3)]
        assert page.getpixel((gap + 2 * (side + gap) + 1, y + 1)) == 255    # beside a small crop
