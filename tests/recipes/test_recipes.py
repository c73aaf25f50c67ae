"""recipes/: the configuration, its texts and ranges, published recipes, and the command line."""
import ast
import dataclasses
import io
import math

import pytest
from PIL import Image

import train
from data.images import open_images
from multicrop import CropSpec, MultiCrop, parse_crops
from recipes.command_line import (
    MACHINE,
    choose_recipe,
    configure,
    hyphens,
    parse_arguments,
    split_arguments,
)
from recipes.config import WRITTEN, Config, with_length
from recipes.published import RECIPES, SWAV, seer
from regnet import ARCHS
from tests.helpers import ROOT, equal, refuse, write_pictures

FIELDS = {field.name for field in dataclasses.fields(Config)}


@pytest.fixture
def photos(tmp_path):
    """30 pictures."""
    write_pictures(tmp_path / "photos", 30, size=(40, 60))
    return tmp_path / "photos"


class Many:
    """A folder with a number of images that is not looked into."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


# -------------------------------------------------------------------------------- configuration
def attributes_read(tree: ast.AST) -> set[str]:
    """Of what is called config or self, or is the config of something."""
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load)
            and (isinstance(node.value, ast.Name) and node.value.id in ("config", "self")
                 or isinstance(node.value, ast.Attribute) and node.value.attr == "config")}


def test_every_field_of_the_configuration_is_read_somewhere():
    """Where it has an effect: what checks, prints or explains the configuration does not count."""
    files = ["train.py", *ROOT.glob("training/*.py"), "methods/build.py", "evaluation/probe.py",
             "evaluation/summary.py", "recipes/input.py", "recipes/machine.py"]
    trees = [ast.parse((ROOT / name).read_text()) for name in files]
    trees += [node for node in ast.parse((ROOT / "recipes" / "config.py").read_text()).body
              if getattr(node, "name", "") in ("Config", "with_length")]
    read = set().union(*map(attributes_read, trees))
    assert FIELDS - read == {"days"}            # by the rule of recipe medium: test_medium.py
    assert "data_format" not in read and FIELDS - attributes_read(trees[0])       # it can fail


def all_recipes() -> dict[str, dict]:
    """Name -> what is given for it."""
    return ({"demo": {}} | {name: {"recipe": name} for name in (*RECIPES, *SWAV)}
            | {arch: {"recipe": "seer", "arch": arch} for arch in ARCHS})


@pytest.mark.parametrize("name, given", all_recipes().items(), ids=all_recipes())
def test_a_configuration_is_the_same_from_its_own_text(name, given):
    config = configure(given)
    for option, (parse, _) in WRITTEN.items():
        text, value = config.text(option), getattr(config, option)
        assert isinstance(text, str) and isinstance(value, tuple) and parse(text) == value
        assert getattr(Config(**{option: text}), option) == value
        assert getattr(Config(**{option: list(value)}), option) == value
    as_dict = config.as_dict()
    assert as_dict.keys() == FIELDS
    assert all(isinstance(value, str | int | float | None) for value in as_dict.values())
    again = Config(**as_dict)
    assert again == config and hash(again) == hash(config) and again.as_dict() == as_dict


@pytest.mark.parametrize("option, text, value, written", [
    ("crops", "2x224+4x96", ((2, 224, (0.14, 1.0)), (4, 96, (0.05, 0.14))), "2x224+4x96"),
    ("crops", "2x64@0.25-1+4x32@0.08-0.25", ((2, 64, (0.25, 1.0)), (4, 32, (0.08, 0.25))), None),
    ("crops", "2x160@0.14-1.0 + 4x96@.05-0.140", ((2, 160, (0.14, 1.0)), (4, 96, (0.05, 0.14))),
     "2x160+4x96"),
    ("crops", "1x96@0.05-0.14+1x96@0.14-1", ((1, 96, (0.05, 0.14)), (1, 96, (0.14, 1.0))), None),
    ("crops", "2x64@0.12345678-1+4x32", ((2, 64, (0.12345678, 1.0)), (4, 32, (0.05, 0.14))), None),
    ("crops", "2x64@0.00001-1", ((2, 64, (0.00001, 1.0)),), None),
    ("head", "8192-8192-256", (8192, 8192, 256), None), ("head", "64", (64,), None),
    ("head", "032-16", (32, 16), "32-16"),
    ("mean", "0.485,0.456,0.406", (0.485, 0.456, 0.406), None),
    ("mean", "0.48145466,0.4578275,0.40821073", (0.48145466, 0.4578275, 0.40821073), None),
    ("mean", "0,-1,0.50", (0.0, -1.0, 0.5), "0,-1,0.5"),
    ("std", "1,0.2260000001,1e-3", (1.0, 0.2260000001, 0.001), "1,0.2260000001,0.001")])
def test_options_that_are_written_as_text(option, text, value, written):
    """Value and text lead to one another, with all digits: a run is resumed by its saved text."""
    config = Config(**{option: text})
    assert getattr(config, option) == value
    if option == "crops":
        assert all(isinstance(spec, CropSpec) for spec in config.crops)
        assert config.crops == tuple(parse_crops(text))
    assert Config(**{option: config.text(option)}) == config
    assert config.text(option) == config.as_dict()[option] == (written or text)


@pytest.mark.parametrize("given, message", [
    (["--arch=regnety_33gf"], "unknown arch 'regnety_33gf'; there is regnety_"),
    (["--recipe=swav", "--arch=resnet51"], "unknown arch 'resnet51'; there is resnet50"),
    (["--recipe=sear"], "unknown recipe 'sear'; there is seer"),
    (["--crops=2x224+96"], "'96' is not COUNTxSIZE"), (["--crops="], "is not COUNTxSIZE"),
    (["--crops=2x32@0.5-0.2"], "0 < FROM <= TO <= 1"),
    (["--crops=2x100000"], "a size of 7 to 2,048 pixels"),
    (["--crops=101x32"], "a count of 1 to 100"),
    (["--crops=2x32+2x8"], "--crops 2x32.*: 8 pixels are a single one before the last of"),
    (["--crops=1x32"], "--crops 1x32: swav needs crops of an image: two, or more"),
    (["--head=8192x256"], "head '8192x256' is not WIDTH"), (["--head="], "head '' is not"),
    (["--head=16-0"], "head '16-0' is not"), (["--head=16--8"], "head '16--8' is not"),
    (["--mean=nan,0,0"], "--mean nan,0,0: needs numbers"),
    (["--mean=0.5,0.5"], "mean or std '0.5,0.5' is not RED,GREEN,BLUE"),
    (["--mean=123.7,116.3,103.5"], "--mean .*: needs numbers from -10 to 10, of channels that go "
                                   "from 0 to 1"),
    (["--std=0,1,1"], "--std 0,1,1: needs numbers from 0.001 to 10"),
    (["--std=1,inf,1"], "--std 1,inf,1: needs numbers from 0.001 to 10"),
    (["--head=100000000-64"], "--head 100000000-64: needs numbers from 1 to 100,000"),
    (["--std=red"], "std 'red' is not RED,GREEN,BLUE"),
    (["--batch-size=0"], "--batch-size 0: needs 2 to 1,000,000"),
    (["--batch-size=100000000"], "--batch-size 100000000: needs 2 to 1,000,000"),
    (["--workers=100000"], "--workers 100000: needs -1 to 256"),
    (["--epochs=-1"], "--epochs -1.0: needs 0 to 1,000,000"),
    (["--seed=99999999999999999999999"], "--seed 9*: needs 0 to 9,223,372,036,854,775,807"),
    (["--device=meta"], "--device meta cannot be used here: needs cuda, mps, cpu"),
    (["--batch-size=8", "--micro-batch=3"],
     "--micro-batch 3 does not divide the 8 images of a process; 2 does"),
    (["--micro-batch=1", "--crops=2x32+1x16"], "--micro-batch 1 with 1x16 in --crops: .*use 2"),
    (["--micro-batch=-1"], "--micro-batch -1: needs 0 to"),
    (["--epsilon=0"], "--epsilon 0.0: needs 0.001 to 10"), (["--lr=nan"], "--lr nan: needs"),
    (["--lr=inf"], "--lr inf: needs"),
    (["--gray=2"], "--gray 2.0: needs 0 to 1"), (["--images=-1"], "--images -1: needs 0 to"),
    (["--max-pixels=999999999"], "--max-pixels 999999999: needs 1 to"),
    (["--shard", "--compile"], "a sharded network cannot be compiled: leave out --compile"),
    (["--shard", "--precision=fp16"], "--precision fp16 cannot be sharded: take bf16 or fp32"),
    (["--shard-group=-1"], "--shard-group -1: needs 0 to 100,000")])
def test_what_no_run_can_use_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        configure(parse_arguments(["--recipe=demo", *given]))


def test_every_number_has_a_range_with_two_ends():
    """So that no absurd one reaches the place where memory or processes are taken for it."""
    for field in dataclasses.fields(Config):
        if field.type in (int, float):
            low, high = field.metadata["low"], field.metadata["high"]
            assert low <= field.default <= high < math.inf, field.name


@pytest.mark.parametrize("name, fitting", [("batch_size", 8), ("queue", 6)])
def test_what_the_processes_cannot_share_is_refused(name, fitting):
    given = {"batch_size": 6, "queue": 6} | {name: fitting + 1}
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {fitting + 1} is not "
                                         f"divisible by 2 processes; {fitting} is"):
        configure(given, world=2)
    configure(given | {name: fitting}, world=2)


@pytest.mark.parametrize("given, message", [
    (["--stepz=1"], "unrecognized arguments: --stepz=1"),
    (["--step=1"], "unrecognized arguments: --step=1"),                     # no abbreviations
    (["--data="], "argument --data: is empty"),
    (["--plan", "--bandwidth=0"], "--bandwidth: '0': needs a number from 0.001 to 1,000,000"),
    (["--plan", "--gpus=1000000"], "--gpus: '1000000': needs a whole number from 1 to 100,000"),
    (["--plan", "--workers=100000"], "--workers 100000: needs"),
    (["--data=s3://bucket/photos"], "s3://bucket/photos is no path: mount it as a folder"),
    (["--precision=int8"], "invalid choice: 'int8'"), (["--steps=many"], "invalid int value"),
    (["--explain", "--plan"], "not allowed with argument"),
    (["--gpus=4"], "--gpus: of --plan alone"),
    (["--crops=2x224+96"], "'96' is not COUNTxSIZE"),
    (["--data=nowhere/at/all"], "no such folder")])
def test_a_bad_command_line_gets_one_sentence(given, message, tmp_path, capsys):
    out = tmp_path / "run"
    assert message in refuse(capsys, f"--out={out}", *given)
    assert not out.exists()


def test_a_run_without_a_length_is_refused():
    for given in ({"steps": 0}, {"recipe": "seer", "images": 0}, {"epochs": 0.0}):
        with pytest.raises(ValueError, match="no length: give --steps, --epochs or --images"):
            with_length(configure(given), 30)


# ----------------------------------------------------------------------------- the command line
def test_hyphens_and_underscores_are_alike():
    for flag in ("--batch-size=64", "--batch_size=64"):
        assert parse_arguments([flag]) == {"batch_size": 64}
    assert parse_arguments(["--data", "my_pictures", "--head_bn"]) == {
        "data": "my_pictures", "head_bn": True}
    assert hyphens(["--out_x=a_b", "a_b", "-x_y"]) == ["--out-x=a_b", "a_b", "-x_y"]


def test_every_field_is_an_option_with_a_help_text(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(Config):
        on_it = f"--{field.name.replace('_', '-')}" in printed
        assert on_it == bool(field.metadata["help"]) == (
            field.name not in ("extended_at", "grown_at"))
    words = " ".join(printed.split())
    assert "(seer: 2x224+4x96, swav: 2x224+6x96, demo: 2x64@0.25-1+4x32@0.08-0.25)" in words


@pytest.mark.parametrize("argv, expected", [
    (["--lr=3"], {"lr": 3.0}), (["--head=8-4"], {"head": "8-4"}),
    (["--epochs", "2"], {"epochs": 2.0}), (["--no-head-bn"], {"head_bn": False}),
    (["--compile"], {"compile": True}),
    (["--no-codes-from-all-crops"], {"codes_from_all_crops": False}),
    (["--no-checkpoint-activations"], {"checkpoint_activations": False})])
def test_options_have_the_types_of_their_fields(argv, expected):
    given = parse_arguments(argv)
    assert given == expected
    assert [type(value) for value in given.values()] == [type(v) for v in expected.values()]


def test_options_of_a_run_and_what_else_is_asked_for():
    given = parse_arguments(["--plan", "--gpus=4", "--lr=3"])
    options, asked, machine = split_arguments(given)
    assert options == {"lr": 3.0} and asked == {"plan": True}
    assert machine == {name: default for name, (default, *_) in MACHINE.items()} | {"gpus": 4}
    assert split_arguments({"lr": 3.0})[1] == {}
    assert split_arguments(parse_arguments(["--plot", "a", "b"]))[:2] == ({}, {"plot": ["a", "b"]})
    with pytest.raises(ValueError, match="--gpus, --gpu-memory: of --plan alone"):
        split_arguments(parse_arguments(["--gpus=4", "--gpu-memory=40"]))


def test_the_recipe_follows_from_what_is_given(photos):
    images = open_images(photos)
    assert choose_recipe({"data": "photos"}, images) == "small"
    assert choose_recipe({"data": "photos", "arch": "regnety_16gf"}, images) == "small"
    assert choose_recipe({"data": "photos", "recipe": "seer"}, images) == "seer"
    assert choose_recipe({"data": "many"}, Many(100_000)) == "medium"
    assert choose_recipe({"data": "many", "arch": "regnety_16gf"}, Many(10 ** 8)) == "medium"
    assert choose_recipe({"data": "many", "arch": "regnety_16gf"}, Many(10 ** 8 + 1)) == "seer"
    assert choose_recipe({"data": "many", "arch": "resnet50"}, Many(10 ** 6)) == "swav"
    config = configure({"data": "photos", "epochs": 1.0}, images=images)
    assert (config.recipe, config.arch) == ("small", "regnety_100mf")
    assert (config.batch_size, config.steps) == (15, 0)
    assert config.text("mean").startswith("0.4") or config.text("mean").startswith("0.5")
    other = configure({"data": "photos", "arch": "regnety_200mf"}, images=images)
    assert other.arch == "regnety_200mf"


def test_explain_prints_the_rule_and_what_was_given_instead(photos, capsys):
    train.main([f"--data={photos}", "--explain", "--strength=0.7"])
    printed = capsys.readouterr().out
    assert "recipe small for 30 images" in printed and "--crops 2x64" in printed
    line, = [line for line in printed.splitlines() if "--strength 0.7" in line]
    assert "given; the recipe has 0.2" in line
    for given, said in (["--batch-size=48"], "--lr 25.6 "), (
            ["--batch-size=48", "--lr=1"], "given; the recipe has 25.6"):
        train.main([f"--data={photos}", "--explain", *given])       # 4.8 * 256 / 48
        assert said in capsys.readouterr().out
    train.main(["--explain", "--temperature=0.2", "--steps=7"])     # recipes of the table too
    printed = capsys.readouterr().out
    assert "recipe demo" in printed and "--temperature 0.2" in printed and "--steps 7 " in printed


def test_explain_calls_changed_what_is_changed(capsys):
    train.main(["--explain", "--crops=2x64@0.25-1+4x32@0.08-0.25", "--head=256-32", "--lr=9.6"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines["--crops"].endswith(" given") and lines["--lr"].endswith(" given")
    assert lines["--head"].endswith("--head 256-32".ljust(44) + "given; the recipe has 256-64")
    assert "given" not in lines["--prototypes"]


# ---------------------------------------------------------------------------- length and schedules
def test_recipes_and_length():
    assert configure({}).recipe == "demo" and configure({"arch": "regnety_16gf"}).recipe == "seer"
    seer = configure({"arch": "regnety_256gf"}, world=8)
    assert (seer.text("crops"), seer.text("head")) == ("2x224+4x96", "8192-8192-256")
    assert seer.crops == (CropSpec(2, 224, (0.14, 1.0)), CropSpec(4, 96, (0.05, 0.14)))
    assert (seer.head, seer.prototypes, seer.batch_size) == ((8192, 8192, 256), 16000, 8192)
    assert seer.peak_lr() == pytest.approx(9.6)
    assert with_length(seer, 10 ** 9).steps == math.ceil(10 ** 9 / 8192)
    for given, steps in (({"epochs": 2.0}, 20), ({"images": 700}, 7), ({"steps": 3}, 3),
                         ({"steps": 30, "epochs": 2.0}, 20)):
        config = configure({"batch_size": 100} | given)
        assert with_length(config, 1000).steps == steps


def test_the_strength_rises_with_the_position():
    config = Config(steps=100, batch_size=10, strength=0.8, strength_from=0.2, strength_rise=0.5)
    strengths = [config.strength_at(position) for position in (0, 9, 250, 500, 999)]
    assert strengths == pytest.approx([0.2, 0.2, 0.5, 0.8, 0.8])
    assert Config(steps=100, strength=0.8).strength_at(0) == 0.8
    image = Image.radial_gradient("L").convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "png")
    crop = MultiCrop(parse_crops("2x32"), config.strength_at, jitter=1.0)
    for position, strength in ((0, 0.2), (999, 0.8)):
        expected = MultiCrop(parse_crops("2x32"), strength, jitter=1.0)(buffer.getvalue(), 5)
        assert equal(expected, crop(buffer.getvalue(), 5, position))


def test_learning_rate_warms_up_and_follows_a_cosine():
    config = Config(steps=100, warmup=0.1, lr=0.3, batch_size=512, final_lr=0.01)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.06 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.6) and max(rates) == pytest.approx(0.6)
    assert rates[55] == pytest.approx(0.6 * (0.01 + 0.99 * 0.5))
    assert rates[-1] == pytest.approx(0.006, rel=0.1)
    assert rates == rates[:10] + sorted(rates[10:])[::-1]
    raised = dataclasses.replace(config, first_lr=0.5)
    rising = [0.33 + 0.03 * i for i in range(10)]
    assert [raised.lr_at(i) for i in range(10)] == pytest.approx(rising)
    assert [raised.lr_at(i) for i in range(10, 100)] == rates[10:]


# ---------------------------------------------------------------------------- published recipes
@pytest.mark.parametrize("arch, steps, warmup, peak", [
    ("regnety_128gf", 244_141, 8_000, 4.8), ("regnety_256gf", 122_071, 8_000, 9.6),
    ("regnety_10b", 126_009, 5_500, 9.3)])
def test_seers_recipes_give_the_published_schedules(arch, steps, warmup, peak):
    """Steps, warm-up and peak learning rate as VISSL's documentation has them."""
    config = with_length(configure({"arch": arch}), 10 ** 9)
    assert config.steps == steps and config.warmup_steps() == pytest.approx(warmup, rel=2e-3)
    assert config.peak_lr() == pytest.approx(peak)
    last = config.lr_at(config.steps - 1) / peak
    assert last == pytest.approx(1.0 if arch == "regnety_128gf" else 0.001, rel=1e-3)


@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_what_no_source_says_of_seer_is_called_assumed(arch):
    rule = seer(arch)
    sources = {name: source for name, (_, source) in rule.items() if name != "arch"}
    assert all(sources.values())
    if arch in ("regnety_400mf", "regnetx_16gf"):
        assert set(sources.values()) == {"assumed"}
    if arch == "regnety_10b":
        assert not any("assumed" in source for source in sources.values())
    config = configure({"arch": arch})
    assert (config.batch_size == 8192) == (arch == "regnety_256gf")
    assert config.head_bn == (arch not in ("regnety_64gf", "regnety_128gf", "regnety_256gf",
                                           "regnety_10b"))


@pytest.mark.parametrize("arch, first, group", [
    ("regnety_32gf", 0.3, 32), ("regnety_64gf", 0.3, 64), ("regnety_128gf", 0.3, 64),
    ("regnety_256gf", 0.3, 64), ("regnety_10b", 0.3, 8)])
def test_seers_warm_up_starts_at_the_published_rate(arch, first, group):
    config = with_length(configure({"arch": arch}), 10 ** 9)
    assert config.first_lr * config.peak_lr() == pytest.approx(first)
    assert first < config.lr_at(0) < 1.01 * first and config.sync_bn_group == group
    warmup = config.warmup_steps()
    middle = config.lr_at(warmup // 2 - 1)
    assert middle == pytest.approx((first + config.peak_lr()) / 2, rel=1e-3)
    assert config.lr_at(warmup - 1) == pytest.approx(config.peak_lr())


def test_swavs_own_recipes():
    config = with_length(configure({"arch": "resnet50"}), 1_281_167)
    assert (config.recipe, config.text("crops"), config.head, config.head_bn,
            config.prototypes) == ("swav", "2x224+6x96", (2048, 128), True, 3000)
    assert (config.batch_size, config.epsilon, config.sinkhorn_iterations, config.queue) == (
        4096, 0.05, 3, 0)
    assert (config.weight_decay, config.momentum, config.trust_coefficient,
            config.temperature) == (1e-6, 0.9, 0.001, 0.1)
    assert config.peak_lr() == pytest.approx(4.8) and config.std == (0.228, 0.224, 0.225)
    assert config.lr_at(config.steps) == pytest.approx(0.0048)
    assert config.first_lr * config.peak_lr() == pytest.approx(0.3)
    assert config.warmup_steps() == pytest.approx(10 * 1_281_167 / 4096, rel=1e-3)
    config = with_length(configure({"recipe": "swav-bs256"}), 1_281_167)
    assert (config.arch, config.batch_size, config.queue, config.freeze_prototypes) == (
        "resnet50", 256, 3840, 5005)
    assert config.peak_lr() == config.lr_at(0) == pytest.approx(0.6)
    assert config.lr_at(config.steps) == pytest.approx(0.0006)
    assert config.queue_start == 15 * (1_281_167 // 256 + 1) == 75_075
