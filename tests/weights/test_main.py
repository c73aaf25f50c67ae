"""python -m weights: what is in a file, and the same file with another library's names."""
import pytest
import torch

from tests.helpers import ORACLES
from weights.__main__ import main
from weights.official import OFFICIAL

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
