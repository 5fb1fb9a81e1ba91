"""``prefopt launch``: what it refuses, what it prints, and that a job goes on after its time limit."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from prefopt.cli import main
from prefopt.parallel.launch import run_here
from train.small import pairs, words, write_model, write_rows

DPO = ["--", "dpo", "--model", "m", "--data", "d.jsonl", "--output", "an output", "--learning-rate", "1e-6"]
DPO += ["--batch-size", "64"]

PPO = ["ppo", "--model", "m", "--prompts", "p.jsonl", "--reward", "length", "--output", "o", "--learning-rate", "1e-6"]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["launch", *words, *DPO]) == 0
    return capsys.readouterr().out


def test_the_command_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(printed(capsys, "--gpus", "2", "--dry-run"))
    assert words[:5] == [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    assert words[words.index("prefopt") + 1 :] == DPO[1:]


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["--gpus", "2", "--", "compare", "--a", "x"], ["compare", "sft, distil, dpo"]),
        (["--gpus", "2", "--", "dpo", "--model", "m", "--data", "d", "--output", "o", "--bta", "3"], ["--beta"]),
        (["--gpus", "2", "--", "dpo", "--model", "m", "--data", "d", "--output", "o", "--beta", "-3"], ["--beta"]),
        (["--slurm", *DPO], ["--slurm", "--gpus"]),
        (["--slurm", "--kubernetes", "--gpus", "2", *DPO], ["--slurm and --kubernetes"]),
        (["--kubernetes", "--gpus", "2", *DPO], ["--image"]),
        (["--skypilot", "--gpus", "2", *DPO], ["--accelerator"]),
        (["--nodes", "2", "--gpus", "2", *DPO], ["--nodes 2", "--slurm", "clusters.md"]),
        (["--lines", "partition=a", "--gpus", "2", *DPO], ["--lines", "--slurm"]),
        (["--gpus", "2", "--name", "A b", *DPO], ["--name"]),
        (["--gpus", "2"], ["--command"]),
        (["--gpus", "128", *DPO], ["--batch-size 64", "128 processes"]),
        (["--gpus", "8", *DPO, "--shard", "hybrid"], ["--shard hybrid", "--shard full"]),
        (["--gpus", "1", *DPO, "--shard", "full"], ["--shard full", "several processes"]),
    ],
)
def test_what_cannot_be_launched_is_refused(
    words: list[str], facts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(fact in error for fact in facts), error


def test_job_files_name_nodes_gpus_and_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--nodes", "4", "--gpus", "8"]
    script = printed(capsys, *size, "--slurm", "--lines", "partition=gpu", "--hours", "1.5")
    for line in ("--nodes=4", "--gpus-per-node=8", "--time=1:30:00", "--partition=gpu", "--requeue"):
        assert f"#SBATCH {line}" in script.splitlines()
    service, job = yaml.safe_load_all(printed(capsys, *size, "--kubernetes", "--image", "me/prefopt"))
    spec = job["spec"]["template"]["spec"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    assert spec["subdomain"] == service["metadata"]["name"]
    assert spec["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    task = yaml.safe_load(printed(capsys, *size, "--skypilot", "--accelerator", "H100"))
    assert task["num_nodes"] == 4
    assert task["resources"]["accelerators"] == "H100:8"
    for shell in (script, spec["containers"][0]["command"][-1], task["run"]):
        assert "'an output'" in shell
        assert "--nproc-per-node 8" in shell


# Stand-ins for Slurm and torchrun: torchrun's writes down what it was given, and ends when it is told to.
TORCHRUN = """import json, pathlib, signal, sys, time
pathlib.Path("given.json").write_text(json.dumps(sys.argv[1:]))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
pathlib.Path("started").touch()
time.sleep(float(pathlib.Path("seconds").read_text()))
"""


def _cluster(folder: Path, seconds: float) -> dict[str, str]:
    tools = folder / "bin"
    tools.mkdir()
    scripts = {
        "scontrol": '#!/bin/bash\nif [ "$1" = show ]; then echo first; echo second; else echo "$@" >> requeued; fi\n',
        "srun": '#!/bin/bash\nshift\nexec "$@"\n',
        "python": f'#!/bin/bash\nexec {sys.executable} {folder}/torchrun.py "$@"\n',
    }
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (folder / "torchrun.py").write_text(TORCHRUN)
    (folder / "seconds").write_text(str(seconds))
    return {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]"
    }  # fmt: skip


def test_a_slurm_job_queues_itself_again_at_its_time_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "job.sh"
    script.write_text(printed(capsys, "--nodes", "2", "--gpus", "4", "--slurm"))
    variables = _cluster(tmp_path, 60)
    job = subprocess.Popen(["bash", str(script)], cwd=tmp_path, env=variables)
    for _ in range(600):
        if (tmp_path / "started").exists():
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 143
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    given = json.loads((tmp_path / "given.json").read_text())
    assert given[given.index("--rdzv-endpoint") + 1] == "first:29500"
    assert given[given.index("--rdzv-id") + 1] == "77"
    assert given[given.index("prefopt") + 1 :] == DPO[1:]


def test_a_slurm_job_that_ends_by_itself_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "job.sh"
    script.write_text(printed(capsys, "--nodes", "1", "--gpus", "4", "--slurm"))
    assert subprocess.run(["bash", str(script)], cwd=tmp_path, env=_cluster(tmp_path, 0), timeout=60).returncode == 0
    assert not (tmp_path / "requeued").exists()


def test_what_fails_in_a_process_is_told_in_a_line_and_by_the_exit_status(tmp_path: Path) -> None:
    words = ["dpo", "--model", str(tmp_path), "--data", "no.jsonl", "--output", str(tmp_path / "o"), "--beta", "0.1"]
    command = [sys.executable, "-m", "prefopt", "launch", "--gpus", "2", "--", *words, "--learning-rate", "1e-6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "TMPDIR": "/tmp"})
    assert done.returncode == 2
    assert done.stderr.count("prefopt: error: ") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("status", "told", "code"), [(-9, "SIGKILL", 137), (1, "status 1", 1), (2, "", 2)])
def test_a_rank_that_ends_is_named(
    status: int, told: str, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "if os.environ['RANK'] == '0':\n    time.sleep(60)\n"
        f"os.kill(os.getpid(), {-status}) if {status} < 0 else sys.exit({status})\n"
    )
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_here(command) == code
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    error = "".join(line for line in capfd.readouterr().err.splitlines(True) if line.startswith("prefopt"))
    assert (told in error and "rank 1" in error and "--resume" in error) if told else not error


FAILING = """import os, signal, sys
from prefopt.train import trainer
from prefopt.cli import main
keep = trainer.Trainer.keep
def fail(self, *, due=False):
    found = keep(self)  # waits until it is on disk
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and self.state.step == 2:
        self.world.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    if self.state.step == 2:
        self.world.barrier()
    return found
trainer.Trainer.keep = fail
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    rows = write_rows(tmp_path / "pairs.jsonl", pairs(8))
    given = words(write_model(tmp_path / "model"), rows, tmp_path / "out", save_every=2, max_steps=4, epochs=4)
    given = [word.replace("--progress=none", "--progress=plain") for word in given]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", str(script), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "step-00000002" in done.stdout.partition("resumed: ")[2]
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
