"""hubconf.py: every trunk through torch.hub, which needs torch and torchvision alone."""
import ast
import subprocess
import sys

import pytest
import torch

from methods.build import TRUNKS
from tests.helpers import ROOT
from weights.official import LICENCES, OFFICIAL

HUB = dict(source="local")


def test_all_trunks_are_listed_with_their_weights_and_licences(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "owner_name_main").symlink_to(ROOT)             # as downloaded before
    assert sorted(torch.hub.list("owner/name:main", trust_repo=True)) == sorted(TRUNKS)
    for arch in TRUNKS:
        text = torch.hub.help("owner/name:main", arch, trust_repo=True)
        lines = text.partition("Official weights:")[2].split("\n")[1:-1]
        expected = [(f"    {name}: ", LICENCES[entry.licence])
                    for name, entry in OFFICIAL.items() if entry.arch == arch]
        assert len(lines) == len(expected)
        for line, (name, licence) in zip(lines, expected):
            assert line.startswith(name) and line.endswith(licence)


def test_a_trunk_comes_with_the_weights_that_are_named(tmp_path):
    torch.manual_seed(0)
    trunk = torch.hub.load(ROOT, "regnety_100mf", **HUB)
    assert trunk.training
    torch.save(trunk.state_dict(), tmp_path / "trunk.pt")
    images = torch.randn(2, 3, 32, 32)
    for weights in (tmp_path, str(tmp_path / "trunk.pt")):
        loaded = torch.hub.load(ROOT, "regnety_100mf", **HUB, weights=weights)
        assert torch.equal(loaded(images), trunk.eval()(images)) and not loaded.training
    for weights, arch, sentence in (
            (tmp_path, "regnetx_1.6gf", "holds regnety_100mf, not regnetx_1.6gf"),
            ("seer_regnety_32gf", "regnety_64gf", "is of regnety_32gf, not regnety_64gf")):
        with pytest.raises(ValueError, match=sentence):
            torch.hub.load(ROOT, arch, **HUB, weights=weights)


def test_what_it_imports_needs_torch_and_torchvision_alone():
    """Followed through the project's files; an import in a function is of what is optional."""
    waiting, seen, others = ["hubconf"], set(), set()
    while waiting:
        name = waiting.pop()
        path = ROOT / f"{name.replace('.', '/')}.py"
        if not path.exists():
            others.add(name.partition(".")[0])
        elif name not in seen:
            seen.add(name)
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Import):
                    waiting += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    waiting.append(node.module)
    assert {"weights.trunk", "weights.files", "weights.sharded", "regnet"} <= seen
    assert others - sys.stdlib_module_names == {"torch", "torchvision"}


@pytest.mark.long
def test_it_works_from_another_folder(tmp_path):
    code = (f"import torch; trunk = torch.hub.load({str(ROOT)!r}, 'regnety_100mf', source='local')"
            "; print(tuple(trunk(torch.randn(2, 3, 64, 64)).shape))")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                            text=True, env={"PATH": "", "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0 and result.stdout == "(2, 152)\n", result.stderr
