"""Write demo_curves.json, the curves that tests/training compares runs with, from runs' folders.

    options="--threads 1 --workers 0 --log-every 25"
    for seed in 0 1 2 3 4; do python train.py --seed $seed $options --out curves/seed$seed; done
    python train.py --seed 3 --log-every 25 --out "curves/seed3 on two threads"     # ended at 100
    python train.py --steps 150 --lr 4.8 --strength 1 --out "curves/stuck strength"     # and so on
    python -m tests.oracles.make_curves curves/
"""
import json
import sys
from pathlib import Path

KEYS = ("step", "loss", "loss_over_ln_k", "prototypes_used", "effective_rank")
OPTIONS = {"steps", "strength", "gray", "blur", "lr", "epsilon", "head_bn", "sinkhorn_iterations",
           "prototypes", "freeze_prototypes"}
result = {"healthy": {}, "stuck": {}}
demo = None
for folder in sorted(Path(sys.argv[1]).iterdir()):
    saved = json.loads((folder / "config.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    entry = {"environment": saved["environment"],
             "curve": {key: [round(line[key], 4) for line in log] for key in KEYS}}
    if folder.name.startswith("seed"):
        demo = demo or saved["config"]
        if (folder / "results.json").exists():
            for name, row in json.loads((folder / "results.json").read_text()).items():
                entry[name.split()[0]] = row
        result["healthy"][folder.name] = entry
    else:
        entry["options"] = {key: saved["config"][key] for key in sorted(OPTIONS)
                            if saved["config"][key] != demo[key]}
        result["stuck"][folder.name.removeprefix("stuck ")] = entry
Path(__file__).with_name("demo_curves.json").write_text(json.dumps(result) + "\n")
