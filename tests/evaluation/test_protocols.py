"""evaluate.py as a program: what it refuses, and that torchrun's ranks print what one does.

What each protocol measures is tested beside its file."""
import json

import pytest

from regnet import ARCHS, RegNet
from tests.evaluation.conftest import QUICK, RANDOM
from tests.helpers import torchrun
from weights.atomic import save


@pytest.mark.long
def test_torchrun_prints_what_one_process_prints(shades, command):
    argv = ["knn", *RANDOM, "--data", str(shades), *QUICK, "--k=5"]
    alone = command(*argv)
    assert 100 / 6 < alone["top1"] < 100
    result = torchrun("evaluate.py", *argv)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == [alone]


@pytest.mark.parametrize("argv, expected", [
    (["knn", "nowhere.pt"], "neither a file nor the name of an official one"),
    (["knn", ""], "argument checkpoint: is empty"),
    (["knn", "{trunk}", "--k=0"], "--k: '0': needs a whole number from 1 to 1,000,000"),
    (["knn", "{trunk}", "--temperature=0.1,nan"], "--temperature: 'nan': needs a number"),
    (["knn", "{trunk}", "--siz=32"], "unrecognized arguments: --siz=32"),
    (["knn", "{trunk}", "--size=100000"], "'100000': needs a whole number from 8 to 2,048"),
    (["knn", "{trunk}", "--workers=100000"], "--workers: '100000': needs"),
    (["knn", "{trunk}", "--seed=99999999999999999999999"], "--seed: '9"),
    (["knn", "{trunk}", "--device=meta"], "--device meta cannot be used here: needs cuda"),
    (["knn", "{trunk}", "--data=s3://bucket/photos"], "is no path: mount it"),
    (["knn", "{trunk}", "--data="], "argument --data: is empty"),
    (["finetune", "{trunk}", "--batch-size=100000000"], "--batch-size: '100000000': needs"),
    (["finetune", "{trunk}", "--epochs=-1"], "--epochs: '-1': needs a number from 0.001"),
    (["knn", "random", "--arch=regnety_100mf", "--device=foo"], "foo"),
    (["knn", "random"], "random needs --arch"),
    (["knn", "random", "--arch=regnety_100mf", "--data=nowhere"], "no such folder"),
    (["knn", "{trunk}", "--crop-ratio=2"], "needs 0, or a number from 0.1 to 1"),
    (["knn", "{trunk}", "--crop-ratio=0.0001"], "needs 0, or a number from 0.1 to 1"),
    (["linear", "{trunk}", "--depths=res7"],
     "unknown depth res7; there is res2, res3, res4, avgpool"),
    (["classify", "{trunk}"], "holds no classifier"),
    (["classify", "random", "--arch=regnety_100mf"], "no classifier"),
    (["lowshot", "{trunk}", "--draws=0"], "needs a whole number from 1 to 1,000"),
    (["clusters", "{trunk}", "--columns=0"], "needs a whole number from 1 to 100"),
    (["clusters", "{trunk}"], "holds no prototypes"),
    (["finetune", "{trunk}", "--shard"], "--shard is for finetune by torchrun, in bf16 or fp32"),
    (["linear", "{trunk}", "--sgd", "--shard"], "--shard is of finetune, not of linear"),
    (["finetune", "{trunk}", "--steps=9"], "--steps is of detect, compare, scaling, "),
    (["detect", "{trunk}", "--crop-ratio=0.5"], "--crop-ratio is of knn, linear, lowshot, "),
    (["detect", "{trunk}", "--steps=9", "--epochs=9"], "--steps or --epochs, not both"),
    (["finetune", "{trunk}", "--labels=some"], "neither a share, as 0.01, nor a list"),
    (["knn", "{trunk}", "--arch=regnety_200mf"], "holds regnety_100mf, not regnety_200mf")])
def test_bad_input_gets_one_sentence(tmp_path, refused, argv, expected):
    save(tmp_path / "trunk.pt", RegNet(ARCHS["regnety_100mf"]).state_dict())
    assert expected in refused(*[word.format(trunk=tmp_path / "trunk.pt") for word in argv])
