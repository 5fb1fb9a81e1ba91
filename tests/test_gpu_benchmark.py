"""The benchmark for GPUs runs on a processor too, with a tiny model, and shares prompts there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--device cpu --shapes tiny --steps 3 --batch-size 4 --prompt 12 --response 8 --profile-pairs 2 --rounds 1"


@pytest.mark.slow
def test_every_side_answers_without_a_gpu(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "gpu_dpo.py")
    words = [*SMALL.split(), "--seconds", "280", "--sides", "prefopt", "profiles", "--json", str(tmp_path / "x.json")]
    subprocess.run([sys.executable, script, *words], check=True, capture_output=True)
    runs = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert {"prefopt, tiny, LoRA", "prefopt, tiny, full, checkpointed", "profiles, tiny"} == set(runs)
    assert all(run["pairs_per_second"] > 0 for name, run in runs.items() if name.startswith("prefopt"))
    for run in runs.values():
        if "utilisation" in run:
            assert run["utilisation_unshared"] > run["utilisation"] > 0
    assert all(1 < profile["bound"] < 2 for profile in runs["profiles, tiny"].values())
