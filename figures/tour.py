"""A tour of the method: one HTML page that shows RegNet and SwAV at work, picture by picture.

    python -m figures.tour                              # runs/tour/index.html, in two minutes
    python -m figures.tour --run runs/demo-regnety_100mf --out runs/my-tour

Papers: RegNet (arXiv 2003.13678) and SwAV (arXiv 2006.09882), whose equations have their numbers.
Everything on the page is computed when it is made, by the project's own code, and beside each
picture stand the lines that made it, or that it shows. The page needs no network. The pictures lie
beside it as PNG, and so does the run that it shows (tour_run.py), unless --run names another: a
folder of train.py, of a RegNet. Needs matplotlib.
"""
import argparse
import copy
import math
import shutil
from pathlib import Path

import torch

from figures import tour_pictures as draw
from figures.curves import read_curve
from figures.page import Album, Code, Section, page
from figures.tour_network import crops, line, space
from figures.tour_run import (
    CONFIG,
    Moment,
    batch,
    learn,
    look,
    nearest,
    read_images,
    read_moments,
    source,
    train_step,
)
from multicrop import parse_crops
from sinkhorn import SAFE_EPSILON, _log_domain, _scaling, sinkhorn
from swav import Queue, SwAV, swav_codes, swav_loss
from weights.atomic import refuse_existing
from weights.terminal import one_sentence

ASK = "the tour's pictures are drawn with matplotlib: pip install matplotlib"
TITLE = "SwAV on RegNets: a tour of the method"
INTRO = """<p>SwAV trains a network on images without labels. It cuts several crops out of each
image, sorts the crops into clusters, and trains the network to predict the cluster of one crop from
another crop of the same image. The network is a RegNet here, as in SEER. Each picture below was
computed when this page was made, and beside it stands the code that it shows.</p>
<p>Equations have the numbers of the papers: RegNet, <a href="https://arxiv.org/abs/2003.13678">
arXiv 2003.13678</a>, sections 1 and 2; SwAV, <a href="https://arxiv.org/abs/2006.09882">arXiv
2006.09882</a>, from section 3 on.</p>"""


# ----------------------------------------------------------------------------------- the method
class LoadedRun:
    """A run: its checkpoints, and their outputs for the same images."""

    def __init__(self, folder: Path, count: int = 512):
        self.folder, self.moments = folder, read_moments(folder)
        self.config = self.moments[0].config
        self.epsilon, self.prototypes = self.config["epsilon"], self.config["prototypes"]
        self.source = source(self.config)
        size = min(self.config["batch_size"], 64, len(self.source))
        self.crops = batch(self.source, 10 ** 6, self.config | {"batch_size": size})
        self.images = read_images(self.source, count, parse_crops(self.config["crops"])[0].size)
        self.outputs = [look(moment, self.images) for moment in self.moments]

    def scores(self, images: int = 48, prototypes: int = 24) -> torch.Tensor:
        """Of crop 1 of some images at the first moment, in the order of their clusters."""
        _, scores = in_training(self.moments[0], self.crops)
        scores = scores[:min(images, len(self.crops[0]) // 2), :prototypes]
        return scores[sinkhorn(scores, self.epsilon, 10).argmax(1).argsort(stable=True)]


def scores(album: Album, run: LoadedRun) -> Section:
    cosines = run.scores()
    picture = album.picture(
        "scores", "A table of cosines; above it, how often each prototype is the nearest one.", 4.6,
        draw.scores, cosines, run.prototypes)
    part = "" if cosines.shape[1] == run.prototypes else (
        f" Of the {run.prototypes:,} prototypes the first {cosines.shape[1]} are shown, here and "
        "in sections 5 and 6, as if there were no others.")
    members = torch.bincount(cosines.argmax(1), minlength=cosines.shape[1]).sort(descending=True)[0]
    text = f"""<p>The trunk and a small head, the <em>projection head</em>, map each crop to an
<em>embedding</em> <i>z</i>, a vector of length 1. There are <i>K</i> <em>prototypes</em>
<i>c<sub>k</sub></i>, also of length 1, which are learned with the network. The <em>scores</em> of a
crop are its cosines with them, <i>z</i><sup>⊤</sup><i>c<sub>k</sub></i>. <i>B</i> is the number of
images in a batch.</p>
<p>These scores are from step {run.moments[0].step:,} of the run in section 9. Three prototypes
are the nearest to {members[:3].sum() / members.sum():.0%} of the images.{part} If each
image took its nearest prototype as its cluster, the network could put all images into one cluster:
then it predicts perfectly, and has learned nothing. This is called collapse.</p>"""
    return Section("Scores: crops and prototypes", text, picture, [Code(SwAV.forward)])


def plan(album: Album, run: LoadedRun) -> Section:
    picture = album.picture(
        "sinkhorn", "Codes after 0, 1, 2, 3 and 10 iterations; shares of prototypes become equal.",
        3.4, draw.iterations, run.scores(), run.epsilon)
    text = """<p>So the images of a batch are assigned together, under the constraint that all
prototypes get equal shares. The assignment <i>Q</i> is a table of <i>K</i> rows and <i>B</i>
columns. The columns of <i>Z</i> are the embeddings, those of <i>C</i> the prototypes;
<i>H</i>(<i>Q</i>) is the entropy, −Σ <i>Q<sub>kb</sub></i> log <i>Q<sub>kb</sub></i>; <b>1</b>
is a vector of ones:</p>
<p class="equation">max<sub>Q ∈ 𝒬</sub> Tr(Q<sup>⊤</sup>C<sup>⊤</sup>Z) + ε H(Q)
<small>(3)</small></p>
<p class="equation">𝒬 = { Q ≥ 0 : Q<b>1</b><sub>B</sub> = <b>1</b><sub>K</sub> / K,
Q<sup>⊤</sup><b>1</b><sub>K</sub> = <b>1</b><sub>B</sub> / B } <small>(4)</small></p>
<p>The first term is large where images are assigned to prototypes with large scores. The constraint
says that all rows have equal sums, and all columns too. The solution is the table of
exp(score / ε), with each row and each column multiplied by a number:</p>
<p class="equation">Q* = Diag(u) exp(C<sup>⊤</sup>Z / ε) Diag(v) <small>(5)</small></p>
<p>Sinkhorn-Knopp finds <i>u</i> and <i>v</i>: it divides each prototype's row by its sum, then each
image's column, and repeats. An image's column, scaled to sum 1, is its <em>code</em> <i>q</i>. SwAV
makes 3 iterations, SEER 10.</p>"""
    code, how = Code(_scaling, "columns =", "block *= block.sum"), "takes a block of rows at a time"
    if run.epsilon < SAFE_EPSILON:
        code, how = Code(_log_domain, "logits =", "codes ="), "computes with logarithms"
    below = f"""<p>The scores of section 4, at ε = {run.epsilon:g}. Above: each prototype's share
of the images, times K, and the largest; the dashed line at 1 is an equal share. Below: the
codes, in shades by their square roots. As in the project's code, a row is an image and a column
a prototype; so <i>u</i> is of the images there, and <i>v</i> of the prototypes. The code
{how}.</p>"""
    return Section("Sinkhorn-Knopp: equal shares, step by step", text, picture, [code], below)


def epsilon(album: Album, run: LoadedRun) -> Section:
    picture = album.picture("epsilon", "Codes of the same scores: sharp for small epsilon, flat "
                            "for large epsilon.", 3.0, draw.epsilons, run.scores())
    text = f"""<p>ε is the weight of the entropy in equation 3. With a small ε each image goes to
one prototype. With a large one it is spread over all, and the code, nearly 1/<i>K</i>
everywhere, is the same for all images. The shares of the prototypes become equal for every ε. SwAV
takes 0.05, SEER's largest network 0.03, this run {run.epsilon:g}.</p>
<p>Below {SAFE_EPSILON:g}, exp(score / ε) may overflow; there the project computes with logarithms
(<code>sinkhorn.py</code>).</p>"""
    return Section("Epsilon: how sharp the codes are", text, picture,
                   [Code(draw.epsilons, "for axis", "axis.set_xlabel"), Code(draw.shared)])


def swapped(album: Album, run: LoadedRun) -> Section:
    rows, ln_k = [], math.log(run.prototypes)
    for moment in run.moments:
        outputs, model = in_training(moment, run.crops), moment.model
        codes = model.targets(outputs, step=0)                           # (A, B, K)
        loss = model.loss(outputs, codes).item()
        predicted = (outputs[1] / model.temperature).softmax(1)          # (V*B, K)
        rows.append((f"step {moment.step:,}: loss {loss:.2f} = {loss / ln_k:.2f} ln K", codes[0, 0],
                     predicted[codes.shape[1]]))                         # from crop 2
    picture = album.picture(
        "loss", "The code of a crop as bars, and its prediction as dots, at each moment.",
        1.2 + 1.3 * len(rows), draw.swapped, rows)
    text = f"""<p>The network predicts the code of one crop from another crop of the same image. The
prediction <i>p</i> is a softmax of the scores with temperature <i>τ</i>, and the loss is the
cross-entropy of <i>q</i> and <i>p</i>. For the code of crop <i>s</i>, predicted from crop
<i>t</i>:</p>
<p class="equation">ℓ(z<sub>t</sub>, q<sub>s</sub>) = −Σ<sub>k</sub> q<sub>s</sub><sup>(k)</sup>
log p<sub>t</sub><sup>(k)</sup>, &ensp; p<sub>t</sub><sup>(k)</sup> ∝ exp(z<sub>t</sub><sup>⊤</sup
>c<sub>k</sub> / τ) <small>(2)</small></p>
<p>∝ means in proportion: over <i>k</i> the <i>p</i> sum to 1.</p>
<p>It is <em>swapped</em>: each of the two crops predicts the code of the other.</p>
<p class="equation">L(z<sub>t</sub>, z<sub>s</sub>) = ℓ(z<sub>t</sub>, q<sub>s</sub>) +
ℓ(z<sub>s</sub>, q<sub>t</sub>) <small>(1)</small></p>
<p>With multi-crop the two large crops get codes, and every other crop predicts them (equation
6). No gradient goes through the codes.</p>
<p>A network that knows nothing predicts 1/<i>K</i> for each prototype. Then ℓ = ln <i>K</i>,
whatever the code is: here {ln_k:.2f}. So the loss begins near ln <i>K</i> (above it, where
predictions are sure and wrong), and in a collapse it stays there.</p>"""
    return Section("The swapped loss, and its ln K", text, picture, [Code(swav_loss, "log_p ="),
                                                                     Code(SwAV.targets)],
                   "<p>Two crops of one image at each moment; the loss is of its whole batch.</p>")


@torch.no_grad()
def in_training(moment: Moment, crops: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (V*B, D) and scores (V*B, K), with BatchNorm as in training."""
    return copy.deepcopy(moment.model).train()(crops)


def queue(album: Album, run: LoadedRun, size: int = 8) -> Section:
    kept, rows = Queue(32, 1, crops=1), []
    for number in range(1, 7):
        kept.push(torch.full((1, size, 1), float(number)))
        rows.append(kept.embeddings[0, :, 0])
    order = torch.randperm(len(run.images), generator=torch.Generator().manual_seed(0))
    embeddings = run.outputs[-1][0][order]
    lengths = [0, *(2 ** n * size for n in range(2, 10) if 2 ** n * size < len(order))]
    agreement = {length: overlap(embeddings, run.moments[-1].model, length, size)
                 for length in lengths}
    picture = album.picture(
        "queue", "Left: batches move through a queue. Right: codes become those of a large batch.",
        3.3, draw.queue, torch.stack(rows), agreement, size)
    text = f"""<p>Equal shares make sense if a batch has several images for each prototype. {size}
images cannot be shared out among {run.prototypes:,} prototypes. For small batches SwAV keeps the
embeddings of the last <i>L</i> images in a <em>queue</em> (section 4.1). They take part in the
assignment, and their codes are thrown away. With batches of 256 SwAV keeps 3,840.</p>
<p>The queue is a little out of date, for the network has changed since. So it is not used in the
first epochs, when the network changes quickly.</p>"""
    below = f"""<p>Left: a colour for each batch. Right: codes of batches of {size}, beside those
that the same images get in one batch of {len(order):,}. The overlap is the sum over prototypes
of the smaller of the two; it is 1 where they are the same. The network does not change here.</p>"""
    return Section("The queue: codes for small batches", text, picture,
                   [Code(Queue.push), Code(swav_codes)], below)


def overlap(embeddings: torch.Tensor, model: SwAV, length: int, size: int) -> float:
    """Of the codes of batches, each with other images in the queue, and the codes of one batch."""
    prototypes, found = model.prototypes.weight.detach(), []
    options = dict(num_crops=1, assign=(0,), epsilon=model.partition["epsilon"], iterations=10)
    joint = swav_codes(embeddings @ prototypes.t(), **options)[0]        # (N, K)
    for start in range(0, len(embeddings), size):
        rest = embeddings.roll(-start - size, 0)[:length]
        kept = Queue(length, embeddings.shape[1], crops=1)
        kept.push(rest[None])
        codes = swav_codes(embeddings[start:start + size] @ prototypes.t(), **options,
                           queue_scores=kept.scores(prototypes) if length else None)[0]
        found.append(torch.minimum(codes, joint[start:start + size]).sum(1).mean().item())
    return sum(found) / len(found)


# -------------------------------------------------------------------------------------- the run
def progress(album: Album, run: LoadedRun) -> Section:
    curve = read_curve(run.folder)
    picture = album.picture(
        "curves", "The loss over ln K, and the share of prototypes in use, at each step.",
        4.6, draw.curves, curve, [moment.step for moment in run.moments])
    text = f"""<p>{curve.columns[0][-1]:,} steps in batches of {run.config["batch_size"]:,}
images, with {run.prototypes:,} prototypes and without labels. In training from random weights the
loss begins near ln <i>K</i>, that of uniform predictions. It falls when the codes of images differ,
and those of the crops of an image agree. <em>In use</em> are the prototypes that are the nearest to
some crop of the batch; few in use are a sign of collapse.</p>
<p>A step is what this page has shown: crops to embeddings and scores, scores to codes, codes to the
loss. Then come the optimizer's step (LARC: SGD with a rate for each layer), and the prototypes go
back to length 1. <code>train.py</code> has the loop of a long run.</p>"""
    return Section("A run", text, picture, [Code(train_step)],
                   "<p>Vertical lines: the steps of the other pictures.</p>")


def moments(album: Album, run: LoadedRun) -> Section:
    chosen, found = nearest([scores for _, scores in run.outputs])
    titles = [f"step {moment.step:,}" for moment in run.moments]
    images = read_images(run.source, len(run.images), side=64)
    picture = album.picture(
        "prototypes", f"For each of {len(chosen)} prototypes, the nearest images at each moment.",
        min(8 / len(titles), 4) + 0.4,
        draw.moments, images, dict(zip(titles, found)), list(map(str, chosen)))
    at = titles[0] if len(titles) == 1 else f"{', '.join(titles[:-1])} and {titles[-1]}"
    random = """ At step 0 a prototype is a random direction, and its images have little in common,
or their colours alone.""" * (run.moments[0].step == 0)
    short = """ The tour's own run takes a minute, and some rows mix kinds; with <code>--run</code>
the page shows a longer one.""" * ("kinds" in run.config)
    text = f"""<p>{len(chosen)} prototypes, and the images nearest to each, of {len(images):,}, at
{at}. The rows are the same prototypes at each moment.{random} Where the run has learned it, the
images of a row show similar things: that is what the crops of an image have in common. No label was
used.{short}</p>"""
    return Section("Its prototypes", text, picture, [Code(nearest)],
                   f"<p>The prototypes that are nearest to most images at {titles[-1]}.</p>")


def tour(out: Path, folder: Path | None = None, config: dict = CONFIG) -> Path:
    """Write index.html and the pictures into a new folder, which is removed where that fails.
    folder: of the run to show; None: a new one, as config says. Raises ValueError where out is
    there, and without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(ASK) from None
    refuse_existing(out)
    run = LoadedRun(folder) if folder else None                 # a wrong one is refused before work
    out.mkdir(parents=True)
    try:
        album = Album(out, draw.light(), draw.dark())
        if run is None:
            learn(out / "run", config)
            run = LoadedRun(out / "run")
        sections = [part(album) for part in (line, space, crops)]
        sections += [part(album, run) for part in (scores, plan, epsilon, swapped, queue, progress,
                                                   moments)]
        (out / "index.html").write_text(page(TITLE, INTRO, sections), encoding="utf-8")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return out / "index.html"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m figures.tour", description="A tour of the method.",
                                     allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/tour"), metavar="FOLDER",
                        help="a new folder, for the page and its pictures (runs/tour)")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a run of train.py to show, of "
                        "SwAV and a RegNet; none: a short one, made for this")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    with one_sentence("python -m figures.tour"):
        args = parse_arguments(argv)
        print(tour(args.out, args.run))


if __name__ == "__main__":
    main()
