"""Starting a command on several processes: the torchrun command for this machine, and job files for clusters.

A job gets a signal some minutes before its time limit, writes a checkpoint and ends. The same command, started again,
resumes by itself, see :func:`prefopt.core.ranks.restarted`.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence

from prefopt.config.launch import LaunchConfig
from prefopt.core.terminal import complain

SHUTDOWN_SECONDS = 270
"""What torchrun leaves the ranks to write a checkpoint in, after a signal; 30 by default."""
WARNING_SECONDS = 600
"""How long before its time limit a job gets the signal."""


def torchrun(config: LaunchConfig, *where: str, python: str = "python") -> list[str]:
    """torchrun's command; ``where``: its options on nodes and their meeting point."""
    each = "gpu" if config.gpus is None else str(config.gpus)
    started = [python, "-m", "torch.distributed.run", "--nproc-per-node", each]
    return [*started, "--shutdown-timeout", str(SHUTDOWN_SECONDS), *where, "-m", "prefopt", *config.command]


def on_this_machine(config: LaunchConfig) -> list[str]:
    """The command for one machine, by this Python. Its port is a free one."""
    return torchrun(config, "--standalone", python=sys.executable)


def threads_each(processes: int) -> int:
    """Threads of each of the processes of this machine, which share its cores; torchrun by itself gives each one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


def run_here(command: Sequence[str]) -> int:
    """Run the command of :func:`on_this_machine` and wait for its processes. Returns the exit status of the first that
    failed; those that ended for a reason of their own, not for a mistake or a signal, are named."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with warnings.catch_warnings():  # where standard error is no file, as in a notebook
            warnings.filterwarnings("ignore", message="Unable to enable fault handler")
            main(list(command[command.index("torch.distributed.run") + 1 :]))
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as error:  # torchrun would print a traceback of its own
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (2, 130, 143):  # then the process has said why
            complain(f"prefopt: rank {rank} {_how(failure.exitcode)}; the others were stopped; continue with --resume")
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    finally:  # torchrun leaves its own handlers behind
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _how(status: int) -> str:
    if status > 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    hint = " (the machine may be out of memory)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def job_file(config: LaunchConfig) -> str:
    """The job for the manager that ``config`` names."""
    return {"slurm": slurm, "kubernetes": kubernetes, "skypilot": skypilot}[config.manager](config)


def slurm(config: LaunchConfig) -> str:
    """A script for sbatch. It queues itself again where the time limit stopped it."""
    minutes = round(config.hours * 60)
    options = {
        "job-name": config.name,
        "nodes": config.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": config.gpus,
        "time": f"{minutes // 60}:{minutes % 60:02d}:00",
        "signal": f"B:USR1@{WARNING_SECONDS}",
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    head = [f"#SBATCH --{name}={value}" for name, value in options.items()]
    head += ["#SBATCH --requeue", *(f"#SBATCH --{line.removeprefix('--')}" for line in config.lines or ())]
    meeting = ["--nnodes", str(config.nodes), "--rdzv-backend", "c10d", "--rdzv-id", "$SLURM_JOB_ID"]
    meeting += ["--rdzv-endpoint", f"$first:{config.port}"]
    return "\n".join(
        [
            "#!/bin/bash",
            *head,
            "",
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "",
            "# Shortly before the time limit the run writes a checkpoint and ends; the job then waits for its next",
            "# turn, in which the same command goes on from that checkpoint.",
            "again=",
            "stop() {",
            "  again=yes",
            '  kill -TERM "$step"',
            "}",
            "trap stop USR1",
            "",
            f"srun --kill-on-bad-exit=1 {_shell(torchrun(config, *meeting))} &",
            "step=$!",
            'wait "$step"',
            "status=$?",
            'if [ -n "$again" ]; then',
            "  # The signal interrupted the wait, and not the step.",
            '  wait "$step"',
            "  now=$?",
            '  [ "$now" = 127 ] || status=$now',
            "fi",
            'if [ -n "$again" ]; then',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$status"',
            "",
        ]
    )


def kubernetes(config: LaunchConfig) -> str:
    """A headless Service, by which the pods find the first one, and an indexed Job; JSON documents are YAML too."""
    meeting = ["--nnodes", str(config.nodes), "--node-rank", "$JOB_COMPLETION_INDEX"]
    meeting += ["--master-addr", f"{config.name}-0.{config.name}", "--master-port", str(config.port)]
    container = {
        "name": "train",
        "image": config.image,
        "command": ["bash", "-c", f"exec {_shell(torchrun(config, *meeting))}"],
        "resources": {"limits": {"nvidia.com/gpu": config.gpus}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = {
        "subdomain": config.name,
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": SHUTDOWN_SECONDS + 30,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": config.name},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": config.name},
        },
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": config.name},
        "spec": {
            "completions": config.nodes,
            "parallelism": config.nodes,
            "completionMode": "Indexed",
            "backoffLimit": 3 * config.nodes,
            "activeDeadlineSeconds": round(config.hours * 3600),
            "template": {"spec": pod},
        },
    }
    return "".join(f"---\n{json.dumps(document, indent=2)}\n" for document in (service, job))


def skypilot(config: LaunchConfig) -> str:
    """A task for ``sky launch`` and ``sky jobs launch``, from a clone of prefopt; JSON is YAML too."""
    meeting = ["--nnodes", "$SKYPILOT_NUM_NODES", "--node-rank", "$SKYPILOT_NODE_RANK"]
    meeting += ["--master-addr", "$first", "--master-port", str(config.port)]
    run = 'first=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n' + _shell(torchrun(config, *meeting)) + "\n"
    task = {
        "name": config.name,
        "num_nodes": config.nodes,
        "resources": {
            "accelerators": f"{config.accelerator}:{config.gpus}",
            "job_recovery": {"max_restarts_on_errors": 3},
        },
        "workdir": ".",
        "setup": "python -m pip install .\n",
        "run": run,
    }
    return json.dumps(task, indent=2) + "\n"


def _shell(words: Sequence[str]) -> str:
    """Words for a shell that fills in the variables of the job manager, which stand in words of our own."""
    ours = ("$SLURM_JOB_ID", "$JOB_COMPLETION_INDEX", "$SKYPILOT_NUM_NODES", "$SKYPILOT_NODE_RANK", "$first")
    return " ".join(f'"{word}"' if word.startswith(ours) else shlex.quote(word) for word in words)
