"""figures/tour.py: code that stands on the page is the project's; pictures show what they say."""
import copy
import html
import json
import re
import sys
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch.nn import functional as F

import train
from data.demo import DemoImages
from figures import tour_pictures as draw
from figures.page import Album, Code, Picture, highlight, page
from figures.tour import (
    LoadedRun,
    epsilon,
    main,
    moments,
    overlap,
    plan,
    progress,
    queue,
    scores,
    swapped,
    tour,
)
from figures.tour_network import clock, crops, line, rank_correlation, space
from figures.tour_run import (
    CONFIG,
    batch,
    build,
    learn,
    nearest,
    read_images,
    read_moments,
    source,
    train_step,
)
from larc import LARC
from multicrop import MultiCrop, decode, parse_crops
from regnet import ARCHS, complexity
from sinkhorn import SAFE_EPSILON, sinkhorn
from swav import Queue, swav_loss
from tests.helpers import ROOT
from training.run import Run

TINY = CONFIG | {"steps": 4, "batch_size": 4, "crops": "2x24@0.25-1+1x20@0.08-0.25", "head": "16-8",
                 "prototypes": 6, "arch": "3,16,16,2.5,8", "count": 48}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tour") / "run"
    learn(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def loaded(run):
    return LoadedRun(run, count=32)


class Blank(Album):
    """Draws nothing."""

    def __init__(self):
        pass

    def picture(self, name, alt, height, draw, *given):
        return Picture(name, b"", b"", alt)


def on_page(sections, text):
    """The page's text without its tags, where it has each section's code."""
    plain = html.unescape(re.sub("<[^>]*>", "", text))
    for section in sections:
        for code in section.codes:
            assert code.text().strip() and code.text() in plain and code.name in plain
    return plain


def test_code_is_the_files_without_its_docstring():
    code = Code(swav_loss, "scores =", "loss =")
    assert code.name == "swav.py: swav_loss"
    assert all(f"    {row}" in (ROOT / "swav.py").read_text() for row in code.text().splitlines())
    assert code.text().startswith("scores = scores.to(") and code.text().endswith("loss = 0.0")
    assert Code(Queue.push).name == "swav.py: Queue.push"           # decorated
    whole = Code(sinkhorn).text()
    assert whole.startswith("@torch.no_grad()\ndef sinkhorn(") and '"""' not in whole


@pytest.mark.parametrize("first, last", [("no such line", ""), ("codes =", "scores = scores.to")])
def test_lines_that_are_gone_are_missed(first, last):
    with pytest.raises(ValueError, match="swav.py: swav_loss has no line that begins with"):
        Code(swav_loss, first, last).text()


def test_highlighting_changes_no_letter():
    text = Code(build).text() + '\nx = f"<b>" if 3 < 4 else None  # a "comment"\n'
    marked = highlight(text)
    assert html.unescape(re.sub("</?span[^>]*>", "", marked)) == text
    for kind, token in (("keyword", "def"), ("string", 'f&quot;&lt;b&gt;&quot;'), ("number", "3"),
                        ("comment", "# a &quot;comment&quot;")):
        assert f'<span class="{kind}">{token}</span>' in marked


def test_all_code_of_the_sections_is_on_the_page(loaded):
    album = Blank()
    sections = [line(album), space(album, count=4, clocked=2, resolution=32), crops(album)]
    sections += [part(album, loaded)
                 for part in (scores, plan, epsilon, swapped, progress, moments)]
    sections.append(queue(album, loaded, size=2))
    plain = on_page(sections, page("Title", "<p>Intro</p>", sections))
    assert "self.w_0 + self.w_a * j" in plain and "model.targets(outputs, step)" in plain
    assert all(len(code.text().splitlines()) <= 20 for s in sections for code in s.codes)


@pytest.mark.parametrize("epsilon, used, how", [
    (SAFE_EPSILON, "sinkhorn.py: _scaling", "a block of rows"),
    (SAFE_EPSILON / 2, "sinkhorn.py: _log_domain", "logarithms")])
def test_the_code_of_the_codes_is_that_which_is_run(loaded, monkeypatch, epsilon, used, how):
    ran, run = [], copy.copy(loaded)
    run.epsilon = epsilon
    for name in ("_scaling", "_log_domain"):
        monkeypatch.setattr(f"sinkhorn.{name}",
                            lambda scores, *given, name=name: ran.append(name) or scores)
    section = plan(Blank(), run)                        # it asks for the scores in order
    code, = section.codes
    assert code.name == used == f"sinkhorn.py: {ran[0]}" and how in section.below


def test_the_boxes_are_those_that_are_cut():
    data, specs = DemoImages("train", size=96)[3], parse_crops("2x48+3x24")
    cut, _ = MultiCrop(specs)(data, 11)
    image = torch.from_numpy(numpy.array(decode(data))).permute(2, 0, 1)
    for spec, boxes, images in zip(specs, draw.boxes_of((96, 96), specs, 11), cut):
        assert len(boxes) == spec.count
        for (left, upper, right, lower), crop in zip(boxes, images):
            part = image[None, :, upper:lower, left:right].contiguous()
            whole = F.interpolate(part, (spec.size, spec.size), mode="bilinear", antialias=True)
            assert (whole[0].int() - crop.int()).abs().max() <= 1


def test_plans_become_equal_partitions():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    cosines = F.normalize(torch.randn(24, 8) + 1, dim=1) @ F.normalize(torch.randn(6, 8), dim=1).t()
    draw.iterations(figure, cosines, 0.1, (0, 1, 30))
    shares = [torch.tensor([float(bar.get_height()) for bar in axis.patches]).float()
              for axis in figure.axes[:3]]
    assert [share.mean().item() for share in shares] == pytest.approx([1, 1, 1], abs=1e-5)
    off = [(share - 1).abs().max().item() for share in shares]
    assert off[0] > off[1] > off[2] and off[2] < 1e-3
    assert torch.allclose(shares[0], (cosines / 0.1).softmax(1).sum(0) / 4)


def test_shared_counts_prototypes():
    assert draw.shared(torch.eye(5)) == 1
    assert draw.shared(torch.full((3, 4), 0.25)) == pytest.approx(4)


def test_a_queue_of_all_other_images_gives_the_codes_of_the_whole_batch():
    embeddings, prototypes = (F.normalize(torch.randn(n, 8), dim=1) for n in (32, 6))
    model = SimpleNamespace(prototypes=SimpleNamespace(weight=prototypes),
                            partition={"epsilon": 0.05})
    found = [overlap(embeddings, model, length, 4) for length in (0, 8, 28)]
    assert found[0] < found[1] < found[2] == pytest.approx(1, abs=1e-5)


def test_counts_are_pytorchs():
    counted, seconds = clock(ARCHS["regnety_200mf"], 32)
    cost = complexity(ARCHS["regnety_200mf"], 32, num_classes=0)
    assert counted == pytest.approx(cost.flops, rel=0.01) and seconds > 0
    assert rank_correlation([1, 5, 9], [2, 3, 50]) == pytest.approx(1)
    assert rank_correlation([1, 5, 9], [7, 3, -5]) == pytest.approx(-1)


def test_time_that_others_take_is_not_the_networks(monkeypatch):
    class Waits(torch.nn.Module):
        def __init__(self, params):
            super().__init__()
            self.last = torch.nn.Linear(32, 1)

        def forward(self, image):
            time.sleep(0.05)
            return self.last(image)

    monkeypatch.setattr("figures.tour_network.RegNet", Waits)
    assert 0 < clock(None, 32)[1] < 0.03


def test_nearest_are_those_of_the_fullest_prototypes():
    end = torch.tensor([[.9, .1, .2], [.8, .1, .4], [.1, .2, .7], [.6, .1, .3]])
    chosen, (first, last) = nearest([-end, end], rows=2, count=2)
    assert chosen == [0, 2]
    assert first.tolist() == [[2, 3], [0, 3]] and last.tolist() == [[0, 1], [2, 1]]


def test_the_tours_step_is_that_of_train():
    torch.manual_seed(0)
    one, other = build(TINY), build(TINY)
    other.load_state_dict(one.state_dict())
    micro_batch = batch(source(TINY), 0, TINY)
    loss, _ = train_step(one, LARC(one.parameters(), 0.0), micro_batch, 0)
    cpu = torch.device("cpu")
    expected, _ = train.step_gradients(
        Run(other, other, cpu, torch.float32, torch.amp.GradScaler("cpu", enabled=False)), 0,
        [micro_batch])
    assert torch.equal(loss, expected)
    for p, q in zip(one.parameters(), other.parameters()):
        assert torch.equal(p.grad, q.grad)


def test_a_run_has_three_moments(run):
    found = read_moments(run)
    assert [moment.step for moment in found] == [0, 1, 4]
    torch.manual_seed(TINY["seed"])
    assert torch.equal(found[0].model.head[0].weight, build(TINY).head[0].weight)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]


def test_what_is_said_of_a_run_with_one_checkpoint_is_true_of_it(loaded):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    draw.swapped(figure, [("step 4", torch.full((6,), 1 / 6), torch.full((6,), 1 / 6))])
    last = copy.copy(loaded)
    last.moments, last.outputs, last.prototypes = loaded.moments[-1:], loaded.outputs[-1:], 30
    text = moments(Blank(), last).text
    assert "at\nstep 4." in text and "random direction" not in text
    assert "at\nstep 0, step 1 and step 4." in moments(Blank(), loaded).text
    assert "random direction" in moments(Blank(), loaded).text
    assert "Of the 30 prototypes the first 6 are shown" in scores(Blank(), last).text
    assert "are shown" not in scores(Blank(), loaded).text
    figure.clear()
    draw.scores(figure, torch.rand(3, 6), 30)
    assert figure.axes[1].get_xlabel() == "prototypes, K = 30, the first 6"
    assert all(tick == int(tick) for tick in figure.axes[0].get_yticks())


def test_broken_images_are_skipped_and_few_images_are_enough(run):
    images = [b"no", *source(TINY)[:2], b"no"]
    crops_of = batch(images, 0, TINY)           # all four: two of them are those after
    assert [len(part) for part in crops_of] == [8, 4]
    shown = read_images(images, 4, 16)
    assert torch.equal(shown[0], shown[1]) and torch.equal(shown[3], shown[0])
    assert not torch.equal(shown[1], shown[2])
    with pytest.raises(ValueError, match="no image can be read"):
        read_images([b"no"], 1, 16)
    assert nearest([torch.rand(3, 4)], rows=2)[1][0].shape == (2, 3)


def test_a_try_that_failed_does_not_refuse_the_next(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("figures.tour.line", lambda album: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tour(tmp_path / "out", run)
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_of_swav_is_refused(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "byol").mkdir()
    (tmp_path / "byol/config.json").write_text(json.dumps({"config": TINY | {"method": "byol"}}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text('{"config": {}}')
    for name, words in (("none", "not the folder of a run"), ("byol", "of SwAV, and the run is"),
                        ("empty", "not the folder of a run")):
        with pytest.raises(SystemExit):
            main(["--run", str(tmp_path / name), "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_stays(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "index.html").read_text() == "mine"


def test_matplotlib_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "out")])
    assert "pip install matplotlib" in capsys.readouterr().err and not list(tmp_path.iterdir())


class Balanced(HTMLParser):
    """Every tag is closed, and nothing is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.images = [], 0

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "srcset"):
            assert values.get(name, "data:").startswith("data:")
        if tag == "img":
            self.images += 1
            assert len(values["alt"]) > 20

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.long
def test_the_whole_page(tmp_path):
    pytest.importorskip("matplotlib")
    path = tour(tmp_path / "tour", config=TINY)
    text, parser = path.read_text(), Balanced()
    parser.feed(text)
    pictures = sorted(path.parent.glob("*.png"))
    assert parser.open == [] and parser.images == 10 and len(pictures) == 20
    assert "url(" not in text and "@import" not in text
    assert "nan" not in re.sub("base64,[^\"]*", "", text)
