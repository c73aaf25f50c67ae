"""python -m weights: what is in a file, and the same file with another library's names."""
import pytest
import torch

from methods.deepcluster_v2 import DeepCluster
from recipes.config import Config
from regnet import ARCHS, RegNet
from swav import SwAV
from tests.helpers import ORACLES
from weights.__main__ import main
from weights.atomic import load, save
from weights.files import read
from weights.load import load_weights
from weights.names import part_of
from weights.official import OFFICIAL
from weights.preprocessing import config_of, preprocessing_of

TINY = torch.load(ORACLES / "regnet_tiny.pt", weights_only=True)


def test_the_command_says_what_a_file_is_and_converts_it(tmp_path, put, capsys):
    path = put(TINY["regnet_y"]["vissl"])
    main([str(path), "--to", "timm", str(tmp_path / "timm.pt")])
    printed = capsys.readouterr().out
    assert "named as in vissl" in printed and "head: 50-48-48-32\n" in printed
    assert "prototypes: 24" in printed and "licence: the file does not say" in printed
    assert set(torch.load(tmp_path / "timm.pt")) == {
        key for key in TINY["regnet_y"]["timm"] if not key.startswith("head.fc")}
    main([])
    listing = capsys.readouterr().out
    assert all(name in listing and entry.url in listing for name, entry in OFFICIAL.items())
    assert "37.41+ GB" in listing
    main([str(put({"head.0.weight": torch.ones(2, 2)}, "head.pt"))])
    assert "trunk" not in capsys.readouterr().out
    for argv in ([str(tmp_path / "nowhere.pt")], [str(tmp_path)], ["https://local host/x.pt"],
                 [str(path), "--to", "keras", str(tmp_path / "x")],
                 [str(path), "--to", "transformers_x", str(tmp_path / "x")],
                 [str(path), "--to", "timm", str(tmp_path / "no" / "folder")]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and "weights: error: " in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_release_has_the_weights_and_the_settings_and_no_path(tmp_path, capsys):
    model = SwAV(RegNet(ARCHS["regnety_100mf"]), head=(32, 16), prototypes=8, head_bn=True)
    config = Config(data=str(tmp_path), out="/home/someone", arch="regnety_100mf", head="32-16",
                    crops="2x48+1x32", mean="0.1,0.2,0.3", head_bn=True, prototypes=8)
    save(tmp_path / "checkpoint.pt", {"version": 4, "step": 3, "config": config.as_dict(),
                                      "model": model.state_dict(), "optimizer": {"state": {}}})
    out = tmp_path / "release.pt"
    save(tmp_path / "trunk.pt", model.trunk.state_dict())
    main([str(tmp_path), "--to", "release", str(out)])              # of the folder: all of it
    assert "prototypes: 8" in capsys.readouterr().out
    content, loaded = load(out), read(out)
    assert content.keys() == {"version", "config", "model"}
    assert not {"data", "out"} & content["config"].keys()
    other = SwAV(RegNet(ARCHS["regnety_100mf"]), head=(32, 16), prototypes=8, head_bn=True)
    assert load_weights(other, out).untouched == ()
    assert all(torch.equal(value, other.state_dict()[name])
               for name, value in model.state_dict().items())
    known = preprocessing_of(config_of(loaded), out)
    assert (known["size"], known["mean"]) == (48, (0.1, 0.2, 0.3))
    save(tmp_path / "bare.pt", model.trunk.state_dict())
    with pytest.raises(SystemExit):
        main([str(tmp_path / "bare.pt"), "--to", "release", str(tmp_path / "other.pt")])
    assert "not of a run" in capsys.readouterr().err


def test_a_release_has_no_features_of_the_images(tmp_path, capsys):
    model = DeepCluster(RegNet(ARCHS["regnety_100mf"]), 9, (32, 16), (8,), steps_per_epoch=2)
    save(tmp_path / "checkpoint.pt", {"version": 4, "config": {"method": "deepcluster_v2"},
                                      "model": model.state_dict()})
    main([str(tmp_path), "--to", "release", str(tmp_path / "release.pt")])
    parts = [{*map(part_of, read(tmp_path / name).tensors)} for name in ("checkpoint.pt",
                                                                        "release.pt")]
    assert "memory" in parts[0] and parts[1] == parts[0] - {"memory"}
    assert "left out, for a release has no place for them: memory" in capsys.readouterr().err
