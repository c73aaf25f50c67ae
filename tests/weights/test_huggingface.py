"""weights/huggingface.py: its folder against what transformers saves, and against transformers."""
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from evaluation.features import Preprocessing
from methods.build import build_trunk
from regnet import ARCHS, RegNet, RegNetParams
from tests.helpers import ORACLES
from tests.oracles.make_layouts import fill, images
from weights.__main__ import main
from weights.files import read
from weights.huggingface import model_config, preprocessor_config, write_folder
from weights.load import stages_of
from weights.names import from_ours, to_ours

THEIRS = json.loads((ORACLES / "transformers.json").read_text())
RUN = {"crops": "2x64+4x32", "mean": "0.1,0.2,0.3", "std": "0.5,0.6,0.7"}


def tensors_of(path):
    """A .safetensors file by its format's definition."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    assert begin % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    ends, tensors = [0], {}
    for name, entry in header.items():
        dtype = {"F32": torch.float32, "I64": torch.int64}[entry["dtype"]]
        start, end = entry["data_offsets"]
        assert start == ends[-1] and start % dtype.itemsize == 0
        ends.append(end)
        tensors[name] = torch.frombuffer(bytearray(content[begin + start:begin + end]),
                                         dtype=dtype).reshape(entry["shape"])
    assert begin + ends[-1] == len(content)
    return tensors


@pytest.mark.parametrize("entry", THEIRS["networks"], ids=lambda entry: str(
    entry["config"]["layer_type"]))
def test_the_folder_is_as_transformers_saves_it(tmp_path, put, entry):
    state = fill(entry["shapes"])
    (tmp_path / "hf.tmp").mkdir()               # of a try that was killed, or of somebody else
    main([str(put(state)), "--to", "hf", str(tmp_path / "hf")])
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json"]
    config, images_as = (json.loads((tmp_path / "hf" / name).read_text())
                         for name in ("config.json", "preprocessor_config.json"))
    assert config == entry["config"] | {"architectures": ["RegNetForImageClassification"],
                                        "num_labels": len(entry["logits"][0])}
    assert images_as.keys() <= {*THEIRS["preprocessor"]}
    written = tensors_of(tmp_path / "hf" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], x) for name, x in state.items())

    ours, _ = to_ours(written)                  # its outputs are those that transformers computed
    stages, squeeze = stages_of(ours)

    class Stages(RegNetParams):
        def stages(self):
            return stages_as_here

    stages_as_here = [type(RegNetParams(1, 8, 0, 2, 8).stages()[0])(*stage) for stage in stages]
    trunk = RegNet(Stages(1, 8, 0, 2, 8, 0.25 * squeeze, len(ours["stem.0.weight"]))).eval()
    fc = nn.Linear(trunk.num_features, config["num_labels"])
    trunk.load_state_dict({name: x for name, x in ours.items() if not name.startswith("fc.")})
    fc.load_state_dict({"weight": ours["fc.weight"], "bias": ours["fc.bias"]})
    with torch.no_grad():
        features = trunk.double()(images().double())
        logits = fc.double()(features)
    for output, name in ((features, "features"), (logits, "logits")):
        torch.testing.assert_close(output, torch.tensor(entry[name]).double(), rtol=1e-5, atol=1e-5)


def test_the_preprocessing_is_the_runs_own():
    usual = preprocessor_config({}, None)
    assert usual["size"] == {"shortest_edge": 256} and usual["crop_size"]["height"] == 224
    own = preprocessor_config(RUN | {"recipe": {"size": 40, "crop_ratio": 0, "bicubic": True}},
                              None)
    assert own["size"] == own["crop_size"] == {"height": 40, "width": 40}
    assert (own["do_center_crop"], own["resample"]) == (False, 3)
    assert (own["image_mean"], own["image_std"]) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])


def test_what_transformers_cannot_be_gets_a_sentence(tmp_path, put, capsys):
    with torch.device("meta"):
        wide = RegNet(replace(ARCHS["regnety_100mf"], se_ratio=0.5)).state_dict()
        groups = RegNet(ARCHS["regnety_100mf"]).state_dict()
        resnet = build_trunk("resnet50").state_dict()
    name = "trunk_output.block2.block2-0.f.b.0.weight"
    groups[name] = groups[name][:, :4]
    for tensors, sentence in ((wide, "a quarter of a block's input"), (resnet, "cannot be resnet"),
                              (groups, "one group width for all stages")):
        with pytest.raises(ValueError, match=sentence):
            model_config(tensors)
    small = {name: torch.zeros(1) for name in resnet}
    out = tmp_path / "hf"
    regnet = fill(THEIRS["networks"][0]["shapes"])
    for source, sentence in ((put(small, "resnet.pt"), "RegNet cannot be"),
                             (put(regnet), "is there already: choose another name")):
        with pytest.raises(SystemExit):
            main([str(source), "--to", "hf", str(out), "--force"])
        assert sentence in capsys.readouterr().err
        assert not list(out.glob("*")) and not list(tmp_path.glob("hf.*"))
        out.mkdir(exist_ok=True)


@pytest.mark.long
def test_transformers_opens_it(tmp_path, tiny):
    transformers = pytest.importorskip("transformers")
    PIL = pytest.importorskip("PIL.Image")
    trunk = build_trunk("regnety_100mf").eval()
    fc = nn.Linear(trunk.num_features, 2)
    torch.save(trunk.state_dict() | {f"fc.{name}": x for name, x in fc.state_dict().items()},
               tmp_path / "best.pt")
    (tmp_path / "config.json").write_text(json.dumps({"config": RUN | {"classes": ["a", "b"]}}))
    out = tmp_path / "hf"
    write_folder(read(tmp_path / "best.pt"), out)
    model, info = transformers.RegNetModel.from_pretrained(out, output_loading_info=True)
    classifier, all_info = transformers.RegNetForImageClassification.from_pretrained(
        out, output_loading_info=True)
    assert not any([*info["missing_keys"], *info["mismatched_keys"], *all_info["missing_keys"],
                    *all_info["unexpected_keys"], *all_info["mismatched_keys"]])
    assert classifier.config.id2label == {0: "a", 1: "b"}
    with torch.no_grad():
        features = trunk(images())
        torch.testing.assert_close(model.eval()(images()).pooler_output.flatten(1), features)
        torch.testing.assert_close(classifier.eval()(images()).logits, fc(features))
    picture = PIL.effect_noise((90, 120), 60).convert("RGB")
    picture.save(tmp_path / "x.png")

    class One(list):
        def name(self, i):
            return "x"

    processor = transformers.AutoImageProcessor.from_pretrained(out)
    theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
    ours, ok = Preprocessing(64).center_crops(One([(tmp_path / "x.png").read_bytes()]))[0]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    assert ok and theirs.shape == ours.shape        # they resize with other rounding: a grey level
    assert ((theirs * std + mean) * 255 - ours).abs().max() < 1.01


@pytest.mark.long
def test_every_arch_is_one_of_theirs():
    transformers = pytest.importorskip("transformers")
    for arch in ARCHS:
        with torch.device("meta"):
            state = build_trunk(arch).state_dict()
            theirs = transformers.RegNetModel(transformers.RegNetConfig(**model_config(state)))
        ours = from_ours(state, "transformers")
        assert {name: x.shape for name, x in ours.items()} == {
            name: x.shape for name, x in theirs.state_dict().items()}, arch
