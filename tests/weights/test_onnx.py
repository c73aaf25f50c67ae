"""weights/onnx.py: onnxruntime's outputs are the trunk's; what is missing is asked for."""
import json
import sys

import pytest
import torch
from torch import nn

from methods.build import build_trunk
from weights.__main__ import main
from weights.onnx import classifier_of


def test_what_it_needs_is_asked_for(tmp_path, put, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit) as stop:
        main([str(put(build_trunk("regnety_100mf").state_dict())), "--to", "onnx",
              str(tmp_path / "x.onnx")])
    assert stop.value.code == 2 and "pip install onnx onnxscript" in capsys.readouterr().err
    assert not (tmp_path / "x.onnx").exists()


def test_a_folder_that_is_not_there_is_missed_before_the_work(tmp_path, put, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(torch.onnx, "export", lambda *given, **options: 1 / 0)
    with pytest.raises(SystemExit):
        main([str(put(build_trunk("regnety_100mf").state_dict())), "--to", "onnx",
              str(tmp_path / "none" / "x.onnx")])
    assert "none" in capsys.readouterr().err


def test_a_classifier_may_have_no_bias():
    fc = nn.Linear(4, 3, bias=False)
    found = classifier_of({"fc.weight": fc.weight.detach()})
    assert found.bias is None and torch.equal(found.weight, fc.weight)
    found = classifier_of({"fc.weight": fc.weight.detach(), "fc.bias": torch.ones(3)})
    assert found.bias.sum() == 3
    assert classifier_of({"stem.0.weight": fc.weight}) is None


@pytest.mark.parametrize("classes", [pytest.param(3, marks=pytest.mark.long),
                                     pytest.param(0, marks=pytest.mark.measured)])
def test_onnxruntime_gives_the_same_features(tmp_path, classes):
    onnxruntime = pytest.importorskip("onnxruntime")
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    trunk = build_trunk("regnety_100mf").eval()
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    fc = nn.Linear(trunk.num_features, classes) if classes else nn.Module()
    torch.save(trunk.state_dict() | {f"fc.{name}": x for name, x in fc.state_dict().items()},
               tmp_path / "trunk.pt")
    (tmp_path / "config.json").write_text(json.dumps({"config": {"mean": "0.1,0.2,0.3"}}))
    main([str(tmp_path), "--to", "onnx", str(tmp_path / "x.onnx")])
    assert {path.name for path in tmp_path.iterdir()} == {"trunk.pt", "config.json", "x.onnx"}
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    assert session.get_modelmeta().custom_metadata_map == {
        "mean": "0.1,0.2,0.3", "std": "0.229,0.224,0.225"}
    for shape in ((1, 3, 64, 64), (3, 3, 96, 70)):
        images = torch.randn(shape)
        outputs = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = [trunk(images)] + ([fc(trunk(images))] if classes else [])
        for output, right in zip(outputs, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(output), right, rtol=1e-4, atol=1e-5)
