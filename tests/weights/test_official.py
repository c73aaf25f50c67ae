"""weights/official.py: the list of official files, and their downloads, without a network."""
from pathlib import Path

import pytest
import torch
import torchvision

import evaluate
from evaluation.features import Depths
from evaluation.knn import knn_top1
from evaluation.task import load_trunk, open_task
from methods.build import RESNETS
from multicrop import IMAGENET_MEAN
from regnet import ARCHS, RegNet
from swav import SwAV
from training.checkpoint import init_weights
from weights import official
from weights.files import read
from weights.load import describe, load_weights
from weights.names import from_ours, part_of
from weights.official import LICENCES, OFFICIAL, official_names
from weights.preprocessing import config_of, preprocessing_of


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's cache in a folder of its own; nothing is ever downloaded."""
    def refuse(url, *_, **__):
        raise OSError("no network here")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(official, "_licences_printed", set())
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def test_official_files_come_from_the_cache(hub, capsys, monkeypatch):
    trunk = RegNet(ARCHS["regnety_400mf"])
    theirs = torchvision.models.regnet_y_400mf().state_dict()
    torch.save(theirs, hub / "regnet_y_400mf-c65dace8.pth")
    for _ in range(2):
        assert load_weights(trunk, "torchvision_regnety_400mf_v1").unused == ("fc",)
    assert capsys.readouterr().err.count("BSD-3-Clause") == 1
    # SEER's of a size that fits into a test, under the name of a real one
    entry = OFFICIAL["seer_regnety_128gf"]._replace(arch="regnety_200mf")
    monkeypatch.setitem(OFFICIAL, "seer_regnety_128gf", entry)
    model = SwAV(RegNet(ARCHS["regnety_200mf"]), (16, 8), 4)
    tensors = {key.removeprefix("trunk."): value for key, value in model.state_dict().items()}
    torch.save(from_ours(tensors, "vissl"), hub / "seer_regnety_128gf.torch")
    assert load_weights(model, "seer_regnety_128gf").layout == "vissl"
    assert "non-commercial research only" in capsys.readouterr().err


def test_the_arch_is_checked_before_a_download(hub):
    with pytest.raises(ValueError, match="is of regnety_128gf, and the model is regnety_400mf"):
        load_weights(RegNet(ARCHS["regnety_400mf"]), "seer_regnety_128gf")
    with pytest.raises(ValueError, match="is of regnety_800mf with rounding='torchvision', and "
                                         "the model is regnety_800mf$"):
        load_weights(RegNet(ARCHS["regnety_800mf"]), "torchvision_regnety_800mf_v1")
    with pytest.raises(ValueError, match="https.*could not be downloaded: no network.*put"):
        load_weights(RegNet(ARCHS["regnety_400mf"]), "torchvision_regnety_400mf_v2")
    with pytest.raises(ValueError, match="could not be downloaded"):
        read("https://example.org/model.pt")


def test_an_official_download_of_another_arch_is_not_begun(hub):
    with pytest.raises(ValueError, match="seer_regnety_10b is of regnety_10b, not regnety_400mf"):
        load_trunk("seer_regnety_10b", "regnety_400mf")


def test_urls_that_end_alike_are_kept_apart(hub, monkeypatch):
    networks = {f"https://example.org/{name}/model.pth?download=1": RegNet(ARCHS[name]).state_dict()
                for name in ("regnety_200mf", "regnetx_200mf")}
    asked = []

    def download(url, path, digest=None):
        asked.append(url)
        torch.save(networks[url], path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        for url in networks:
            loaded = read(url)
            assert describe(loaded.tensors) in url and loaded.path.suffix == ".pth"
    assert asked == list(networks)

    def broken(*_):
        raise RuntimeError("invalid hash value")
    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    with pytest.raises(ValueError, match="invalid hash value"):
        read(OFFICIAL["torchvision_regnety_400mf_v1"].url)


def test_torchvisions_addresses_are_torchvisions():
    for name in torchvision.models.list_models():
        if name.startswith("regnet_"):
            for entry in torchvision.models.get_model_weights(name):
                assert any(known.url == entry.url for known in OFFICIAL.values()), entry


def test_each_official_file_has_a_known_arch_licence_and_place():
    assert len(OFFICIAL) == 1 + 10 + 2 + 7 + 28 + 6 + 8 + 18 + 9
    assert {entry.licence for entry in OFFICIAL.values()} == set(LICENCES)
    assert {entry.arch for entry in OFFICIAL.values()} <= {*ARCHS, *RESNETS}
    assert len({entry.url for entry in OFFICIAL.values()}) == len(OFFICIAL)


def test_an_official_file_is_known_by_its_name():
    for name, entry in OFFICIAL.items():
        assert official_names(Path("anywhere", f"{name}.torch")) == [name]
        last = entry.url.rpartition("/")[2]
        told = not last.startswith(("resnet50.", "checkpoint.", "epoch"))   # or of any run
        assert official_names(Path(last)) == [] if not told else name in official_names(Path(last))
    assert official_names(Path("model_final_checkpoint_phase0.torch")) == [
        "seer_regnety_128gf", "seer_regnety_256gf"]
    assert {official.fetch_path(name).name for name in (
        "barlow_twins_resnet50_1000ep", "dino_resnet50", "simclr_resnet50_200ep")} == {
        "barlow_twins_resnet50_1000ep.torch", "dino_resnet50_pretrain.pth",
        "simclr_resnet50_200ep.torch"}
    assert official_names(Path("seer_ft_regnety_32gf", "model.torch")) == []


def test_the_trunk_that_is_shipped_loads_by_its_name(monkeypatch, capsys):
    def none(*_):
        raise AssertionError("a download")
    monkeypatch.setattr(torch.hub, "download_url_to_file", none)
    monkeypatch.setattr(official, "_licences_printed", set())
    model = SwAV(RegNet(ARCHS["regnety_100mf"]), (256, 64), prototypes=128, head_bn=True)
    loaded = load_weights(model, "miniature_regnety_100mf")
    assert loaded.loaded == ("head", "trunk") and loaded.untouched == ("prototypes",)
    assert "MIT" in capsys.readouterr().err and loaded.path.stat().st_size < 4e6
    known = preprocessing_of(config_of(loaded), loaded.path)
    assert known["size"] == 64 and known["mean"] != IMAGENET_MEAN
    assert official_names(loaded.path) == ["miniature_regnety_100mf"]


def test_another_method_takes_the_trunk_alone_of_the_one_that_is_shipped():
    parts = {method: {part_of(name) for name in init_weights("miniature_regnety_100mf", method,
                                                             quiet=True).tensors}
             for method in ("swav", "simclr")}
    assert parts == {"swav": {"trunk", "head", "prototypes"}, "simclr": {"trunk"}}


def test_a_shipped_file_that_is_gone_is_named(monkeypatch):
    entry = OFFICIAL["miniature_regnety_100mf"]._replace(url="weights/gone.pt")
    monkeypatch.setitem(OFFICIAL, "miniature_regnety_100mf", entry)
    with pytest.raises(ValueError, match="gone.pt is not there: it comes with this project"):
        read("miniature_regnety_100mf")


def test_the_trunk_that_is_shipped_tells_the_demos_shapes_apart_better_than_an_untrained_one():
    top1 = {}
    for source in ("random", "miniature_regnety_100mf"):
        task = open_task(evaluate.parse(["knn", source, "--size=64", "--workers=0"]
                               + ["--arch=regnety_100mf"] * (source == "random")))
        train, val = (task.extract(Depths(task.trunk, ["avgpool"]), part.subset(range(n)))
                      for part, n in zip(task.splits(), (120, 60)))
        top1[source] = knn_top1(*train.outputs, train.labelled.labels, *val.outputs,
                                val.labelled.labels)
    assert top1["miniature_regnety_100mf"] > top1["random"] + 10
