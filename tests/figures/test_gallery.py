"""figures/gallery.py: order, numbers, axes, sprites, escaping; the page in a real browser.

The browser's test needs playwright and a Chromium, of CHROMIUM or on the path: docs/gallery.md.
"""
import io
import json
import os
import re
import shutil

import numpy
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from figures.gallery import (
    LEADING,
    SPRITES,
    TEMPLATE,
    Images,
    arrange,
    clusters_of,
    principal_axes,
    write,
)

HOSTILE = ['</script><img src=x onerror="window.hacked=1">.png', "<!--<script>.png",
           "ü&amp;'\".png", "\udcff.png", "__proto__", "a b/c#d?e%41.png", "a--><b>.png"]


def images_of(count=40, hostile=()):
    """Three clusters and two classes; an image's neighbours are those after it."""
    rng = torch.Generator().manual_seed(0)
    names = [*hostile, *(f"red/{i:03}.png" for i in range(count - len(hostile)))]
    prototype = torch.arange(count) % 5 // 2 * 7
    return Images(names, prototype, torch.rand(count, generator=rng),
                  torch.rand(count, generator=rng), torch.randn(count, 6, generator=rng),
                  (torch.arange(count)[:, None] + torch.arange(1, 4)) % count,
                  torch.rand(count, 3, generator=rng), torch.arange(count) % 3 % 2,
                  ["<i>red</i>", "blue"])


def data_of(page):
    """As a browser takes it: up to the first </script>."""
    return json.loads(re.search(r'id="data">(.*?)</script', page, re.S)[1])


def test_the_leading_images_come_first_and_large_clusters_before_small_ones():
    prototype = torch.tensor([4] * 3 + [2] * 12 + [9] * 3)[torch.randperm(18)]
    cosine = torch.rand(18)
    size = {k: int((prototype == k).sum()) for k in (2, 4, 9)}
    rank = {i: sum(1 for j in range(18) if prototype[j] == prototype[i] and cosine[j] > cosine[i])
            for i in range(18)}
    expected = sorted(range(18), key=lambda i: (rank[i] >= LEADING, -size[int(prototype[i])],
                                                int(prototype[i]), -float(cosine[i])))
    assert arrange(prototype, cosine).tolist() == expected


def test_size_purity_and_tightness_by_hand():
    images = images_of(6)._replace(
        prototype=torch.tensor([3, 3, 3, 8, 8, 3]), labels=torch.tensor([1, 1, 0, 0, 0, 1]),
        cosine=torch.tensor([0.9, 0.5, 0.3, 0.25, 0.75, 0.1]))
    large, small = clusters_of(images)
    assert (large["number"], large["count"], large["class"]) == (3, 4, 1)
    assert (large["purity"], large["tightness"]) == pytest.approx((0.75, 0.45))
    assert small == {"number": 8, "count": 2, "class": 0, "purity": 1, "tightness": 0.5}
    assert clusters_of(images._replace(labels=None))[1] == {
        "number": 8, "count": 2, "tightness": 0.5}


def test_the_axes_are_those_of_the_largest_variance():
    features = torch.randn(200, 30, dtype=torch.float64) * torch.linspace(3, 0.2, 30) + 1
    points, shares = principal_axes(features)
    unit = F.normalize(features, dim=1).numpy()
    values, vectors = numpy.linalg.eigh(numpy.cov(unit.T))
    assert shares == pytest.approx((values[::-1][:2] / values.sum()).tolist(), rel=1e-3)
    for axis in range(2):
        vector = vectors[:, -1 - axis]
        vector = vector * numpy.sign(vector[numpy.abs(vector).argmax()])
        expected = (unit - unit.mean(0)) @ vector
        numpy.testing.assert_allclose(points[:, axis], expected, atol=2e-3)
    before = torch.get_rng_state()
    assert torch.equal(principal_axes(features)[0], points)
    assert torch.equal(torch.get_rng_state(), before)
    for shape in ((1, 5), (2, 5), (4, 1)):
        points, shares = principal_axes(torch.ones(shape))
        assert points.abs().max() < 1e-6 and points.shape == (shape[0], 2) and len(shares) == 2


def test_names_cannot_leave_the_data_and_sprites_hold_the_tiles(tmp_path):
    images = images_of(70, HOSTILE)
    tiles = torch.arange(70, dtype=torch.uint8).mul(3).view(-1, 1, 1, 1).expand(-1, 3, 96, 96)
    write(tmp_path, images, tiles, "</title><b>", "About", "../a%20b/")
    page = (tmp_path / "index.html").read_text()
    assert page.count("<") == TEMPLATE.read_text().count("<")           # no tag more
    assert page.count("__proto__") == 1                                # and the data once
    data = data_of(page)
    assert data["names"] == [*HOSTILE[:3], "\ufffd.png", *images.names[4:]]
    assert (data["title"], data["originals"]) == ("</title><b>", "../a%20b/")
    assert data["near"] == images.near.tolist() and data["labels"] == images.labels.tolist()
    assert data["cosine"] == pytest.approx(images.cosine.tolist(), abs=5e-4)
    points = torch.tensor(data["points"])
    torch.testing.assert_close(points.amax(0) + points.amin(0), torch.zeros(2), atol=2e-4, rtol=0)
    assert points.abs().max() == 1
    for kind, (side, across) in SPRITES.items():
        sheets = [numpy.asarray(Image.open(tmp_path / kind / f"{n}.jpg").convert("L"))
                  for n in range(-(-70 // across ** 2))]
        for i in range(70):
            number, place = divmod(i, across ** 2)
            row, column = divmod(place, across)
            tile = sheets[number][row * side:(row + 1) * side, column * side:(column + 1) * side]
            assert numpy.abs(tile - 3.0 * i).max() <= 2
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", *SPRITES}


def test_nothing_is_left_of_a_larger_gallery(tmp_path):
    for count in (70, 3):
        write(tmp_path, images_of(count), torch.zeros(count, 3, 96, 96, dtype=torch.uint8), "", "")
        (tmp_path / "thumbs" / "mine.jpg").touch()
    assert {path.name for path in tmp_path.glob("*/*")} == {"0.jpg", "mine.jpg"}


def test_the_page_writes_text_alone_and_asks_no_network():
    page = TEMPLATE.read_text()
    assert page.count("DATA_AS_JSON") == 1
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?:", page)
    assert "default-src 'none'" in page and max(map(len, page.splitlines())) <= 100


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    found = [*filter(None, [os.environ.get("CHROMIUM"), shutil.which("chromium"),
                            shutil.which("google-chrome")])]
    if not found:
        pytest.skip("no Chromium: name it in CHROMIUM")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, tmp_path):
    """A gallery of 700 images with hostile names, opened from disk; no error, no request but of
    its own files."""
    folder = tmp_path / "a gallery"
    images, colours = images_of(700, HOSTILE), torch.randint(0, 256, (700, 3, 1, 1))
    write(folder, images, colours.to(torch.uint8).expand(-1, 3, 96, 96), "Clusters of <b>one</b>",
          "700 images", "../photos/")
    (folder / "clusters.csv").write_text("name,prototype,confidence\n")
    path = tmp_path / "photos" / "red" / "000.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (300, 200), "red").save(path)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    faults, asked = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{folder.as_uri()}/index.html")
    yield page
    assert not faults and page.evaluate("window.hacked") is None
    assert asked and all(url.startswith(tmp_path.as_uri()) for url in asked)
    page.close()


def heard(page):
    """What has the focus: its text, or its label."""
    return page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent")


def shown(page):
    page.wait_for_timeout(400)          # two frames and the sprites
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


@pytest.mark.measured
def test_the_clusters_in_a_browser(page):
    assert page.title() == "Clusters of <b>one</b>" == page.text_content("h1")
    titles = page.locator(".cards h3")
    assert titles.all_text_contents() == ["Prototype 0", "Prototype 7", "Prototype 14"]
    assert page.locator(".cards p").first.text_content().startswith("280 images · tightness 0.")
    assert "% <i>red</i>" in page.locator(".cards p").first.text_content()
    page.check("#reversed")
    assert titles.first.text_content() == "Prototype 14"
    page.focus(".cards a")
    page.keyboard.press("Enter")
    page.wait_for_selector("#images:not([hidden])")
    assert heard(page) == "Prototype 14" and page.locator("#images .tiles li").count() == 140
    page.get_by_role("img", name=HOSTILE[4], exact=True).wait_for()
    first = page.locator("#images .tiles a").first
    first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    assert heard(page) == HOSTILE[4] and page.locator("dialog .tiles a").count() == 3
    page.locator("dialog .tiles a").nth(2).click()                      # 4 + 3
    page.wait_for_function("document.querySelector('#name').textContent === 'red/000.png'")
    page.wait_for_function("document.querySelector('#picture img')?.naturalWidth === 300")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="hidden")
    assert page.evaluate("document.activeElement") and "image" not in page.url
    page.keyboard.press("Escape")
    page.wait_for_selector("#clusters:not([hidden])")
    assert heard(page).startswith("Prototype 14")                       # where it was left
    page.fill("#words", "<SCRIPT")
    page.wait_for_selector("#images:not([hidden])")
    assert page.text_content("#found") == "1 image with “<SCRIPT” in the name"
    page.evaluate("one('#images small bdi').textContent = 'a long name '.repeat(9) + '1.png'")
    text, place = (page.locator(f"#images small{of}").bounding_box() for of in (" bdi", ""))
    assert text["x"] < place["x"]                                       # cut in front
    assert text["x"] + text["width"] <= place["x"] + place["width"] + 1
    page.locator("#images .tiles a").click()                            # none on disk: its sprite
    page.wait_for_selector("#picture .thumb")
    assert page.get_attribute("#picture .thumb", "aria-label") == HOSTILE[1]


@pytest.mark.measured
def test_the_map_in_a_browser(page):
    page.get_by_role("link", name="Map").click()
    page.wait_for_selector("canvas")
    whole = shown(page)
    assert len(whole.getcolors(1 << 24)) > 20
    page.focus("canvas")
    page.keyboard.press("+")
    assert page.text_content("#centre").startswith("Nearest to the centre: ")
    near = page.evaluate("""() => { const {x, y} = view;
        const far = ([px, py]) => Math.hypot(px - x, py - y);
        return data.names[data.points.indexOf([...data.points].sort((a, b) => far(a) - far(b))[0])]
    }""")
    assert page.text_content("#centre") == f"Nearest to the centre: {near}"
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    assert page.text_content("#name") == near
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="hidden")
    for _ in range(8):
        page.keyboard.press("+")
    assert len(shown(page).getcolors(1 << 24)) > 20                         # thumbnails
    box = page.locator("canvas").bounding_box()
    x, y = page.evaluate("() => { const {unit, left, top} = frame(), [x, y] = data.points[hovered];"
                         " return [left + x * unit, top - y * unit]; }")
    page.mouse.move(box["x"] + x, box["y"] + y)
    assert page.locator("#hover figcaption").text_content()
    page.mouse.click(box["x"] + x, box["y"] + y)
    page.wait_for_selector("dialog[open]")


@pytest.mark.measured
def test_light_dark_and_narrow(page):
    light = shown(page).getpixel((5, 5))
    page.emulate_media(color_scheme="dark")
    dark = shown(page).getpixel((5, 5))
    assert min(light) > 230 and max(dark) < 50
    page.set_viewport_size({"width": 360, "height": 740})
    for view in ("#view=clusters", "#view=cluster&id=7", "#view=map", "#view=clusters&image=6"):
        page.evaluate(f"location.hash = '{view}'")
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
