"""What the page starts: names of files, one command for a run, and the folder that its paths are read from."""

from __future__ import annotations

from pathlib import Path

from prefopt.config.methods import SftConfig
from prefopt.ui.form import file_of


def test_the_file_of_a_run_is_beside_its_folder(tmp_path: Path) -> None:
    for output in ("z", "z/", "z//"):
        config = SftConfig(model="m", data=["d"], output=f"{tmp_path}/{output}")
        assert file_of(config) == tmp_path / "z.yaml", output
