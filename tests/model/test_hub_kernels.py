"""No native code is fetched from the Hub and run, and no library speaks of it, where an adapter is made."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FETCH = "from pathlib import Path\ndef get_kernel(*names, **more):\n    Path({mark!r}).write_text('fetched')\n"
OPS = """
import logging
try:
    from kernels import get_kernel
    get_kernel("kernels-community/quantization-bitsandbytes", version=1)
except Exception as error:
    logging.getLogger(__name__).warning("Failed to load it from kernels-community: %s", error)
logging.getLogger(__name__).warning("a word of its own")
"""


def environment(folder: Path, files: dict[str, str]) -> dict[str, str]:
    """With files of modules, by path, that are found before those installed."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def test_bitsandbytes_is_imported_without_kernels_of_the_hub(tmp_path: Path) -> None:
    mark = tmp_path / "fetched"
    files = {"bitsandbytes/__init__.py": "from bitsandbytes.backends.cpu import ops"}
    files |= {"bitsandbytes/backends/cpu/ops.py": OPS, "kernels.py": FETCH.format(mark=str(mark))}
    code = "import sys; from prefopt.core.hub import import_bitsandbytes as load; load(); load()"
    code += "; assert 'bitsandbytes' in sys.modules; import kernels; kernels.get_kernel"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment(tmp_path / "lib", files), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "a word of its own\n") and not mark.exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_run_with_an_adapter_has_no_line_of_another_library(tmp_path: Path) -> None:
    mark = tmp_path / "fetched"
    data = Path(__file__).parents[1] / "pairs.jsonl"
    words = [sys.executable, "-m", "prefopt", "dpo", "--model", "prefopt:demo/tiny_imdb", "--data", str(data), "--lora"]
    words += ["--max-steps", "1", "--device", "cpu", "--output", str(tmp_path / "run"), "--progress", "none"]
    merge = [sys.executable, "-m", "prefopt", "merge", "--adapter", str(tmp_path / "run")]
    merge += ["--output", str(tmp_path / "merged")]
    found = environment(tmp_path / "lib", {"kernels.py": FETCH.format(mark=str(mark))})
    for line in (words, merge):
        done = subprocess.run(line, env=found, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "kernels" not in done.stderr + done.stdout, done.stderr
    assert not mark.exists()
