"""figures/detections.py: what is drawn where, what is left out, and the sheet."""
import pytest
import torch
from PIL import Image

from figures.detections import COLOURS, OPACITY, SIDE, Shown, draw, sheet
from figures.sheets import MARGIN

CLASSES = ["disc", "ring", "caf\u00e9"]
GREY = torch.full((3, 120, 200), 100, dtype=torch.uint8)


def found(boxes, labels, scores=None, masks=None):
    result = {"boxes": torch.tensor(boxes).float().view(-1, 4), "labels": torch.tensor(labels)}
    if scores is not None:
        result["scores"] = torch.tensor(scores)
    return result if masks is None else result | {"masks": masks}


def pixel(image, x, y):
    return tuple(image[:, y, x].tolist())


def test_a_box_has_the_colour_of_its_class_and_its_name_over_it():
    image = draw(GREY, found([[20, 40, 80, 90], [120, 40, 160, 90]], [1, 2]), CLASSES)
    assert image.shape == GREY.shape and image.dtype == torch.uint8
    for left, right, colour in ((20, 80, COLOURS[0]), (120, 160, COLOURS[1])):
        assert pixel(image, left, 70) == pixel(image, right, 70) == colour
        assert pixel(image, (left + right) // 2, 90) == colour
        assert pixel(image, (left + right) // 2, 65) == (100, 100, 100)
        name = image[:, 28:40, left:left + 20].flatten(1).t().tolist()
        assert list(colour) in name and any(max(x) < 60 for x in name)       # on it, black text
    assert (image[:, 95:] == 100).all()


def test_a_mask_is_translucent():
    mask = torch.zeros(1, 120, 200)
    mask[0, 60:80, 30:60] = 1
    grey, colour = 100, torch.tensor(COLOURS[2])
    mixed = (grey * (1 - OPACITY) + colour * OPACITY).int().tolist()
    for masks in (mask.byte(), mask[:, None] * 0.8):     # a truth's, and torchvision's
        image = draw(GREY, found([[20, 40, 80, 90]], [3], [0.9], masks), CLASSES)
        assert image[:, 60:80, 30:60].flatten(1).unique(dim=1).flatten().tolist() == pytest.approx(
            mixed, abs=1)
        assert pixel(image, 28, 70) == pixel(image, 61, 70) == (100, 100, 100)
    image = draw(GREY, found([[20, 40, 80, 90]], [3], [0.9], mask[:, None] * 0.4), CLASSES)
    assert pixel(image, 40, 70) == (100, 100, 100)


def test_detections_of_low_scores_are_left_out():
    boxes, labels = [[20, 40, 80, 90], [120, 40, 160, 90]], [1, 2]
    both = draw(GREY, found(boxes, labels, [0.7, 0.6]), CLASSES)
    one = draw(GREY, found(boxes, labels, [0.4, 0.6]), CLASSES)
    assert pixel(both, 20, 70) == COLOURS[0] and pixel(one, 20, 70) == (100, 100, 100)
    assert torch.equal(one[:, :, 110:], both[:, :, 110:])
    assert torch.equal(draw(GREY, found(boxes, labels, [0.4, 0.6]), CLASSES, least=0.3)[:, 45:],
                       both[:, 45:])                     # but for the scores in the names
    masks = torch.zeros(0, 1, 120, 200)
    assert torch.equal(draw(GREY, found([], [], torch.zeros(0).tolist(), masks), CLASSES), GREY)


def test_a_small_thing_is_drawn_over_a_large_one_in_any_order():
    boxes, labels = [[20, 50, 60, 80], [20, 30, 180, 110]], [1, 2]
    image = draw(GREY, found(boxes, labels), CLASSES)
    assert torch.equal(image, draw(GREY, found(boxes[::-1], labels[::-1]), CLASSES))
    assert pixel(image, 20, 70) == COLOURS[0] and pixel(image, 20, 100) == COLOURS[1]


def test_boxes_and_masks_are_resized_with_the_image():
    mask = torch.zeros(1, 120, 200, dtype=torch.uint8)
    mask[0, 40:90, 20:80] = 1
    image = draw(GREY, found([[20, 40, 80, 90]], [1], masks=mask), CLASSES, side=400)
    assert image.shape == (3, 240, 400)
    assert pixel(image, 40, 140) == pixel(image, 160, 140) == COLOURS[0]
    assert pixel(image, 100, 140) != (100, 100, 100) == pixel(image, 200, 140)


def test_a_name_stays_on_the_page():
    whole = draw(GREY, found([[60, 40, 80, 60]], [2], [0.95]), CLASSES)[:, 27:40, 60:]
    width = int((whole != 100).any(0).any(0).nonzero().max()) + 1
    corner = draw(GREY, found([[190, 0, 200, 30]], [2], [0.95]), CLASSES)
    assert torch.equal(corner[:, 0:13, 200 - width:], whole[:, :, :width])


def test_the_sheet_shows_truth_and_found_side_by_side(tmp_path):
    image, tall = GREY, GREY.transpose(1, 2)
    truth, guess = found([[20, 40, 80, 90]], [1]), found([[100, 40, 160, 90]], [2], [0.9])
    sheet(tmp_path / "sheet.png", [Shown("a", image, truth, guess),
                                   Shown("b", tall, found([], []), guess)], CLASSES)
    page = Image.open(tmp_path / "sheet.png")
    assert page.width >= 2 * SIDE + 2 * MARGIN and page.height >= 2 * SIDE
    pixels = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).view(
        page.height, page.width, 3)
    first = (pixels == torch.tensor(COLOURS[0])).all(2).nonzero()
    second = (pixels == torch.tensor(COLOURS[1])).all(2).nonzero()
    middle = page.width - MARGIN - SIDE
    assert len(first) and first[:, 1].max() < middle <= second[:, 1].min()
