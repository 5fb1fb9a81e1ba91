"""Processes of tests, forked from a server that has imported everything and so started in a few hundredths of a second.

The server is a process of its own, since this one has threads. What it does once is in :mod:`fork_server`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fork_server"])


def forked(target: Callable[..., Any], *arguments: Any, variables: dict[str, str] | None = None, **options: Any) -> Any:
    """A started process that calls ``target(*arguments, **options)``, which is at the top of a module, with the
    environment and the folder of this process, and ``variables`` besides."""
    with pytest.MonkeyPatch.context() as patch:  # the server does not take our path from multiprocessing, as of 3.11
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    environment = {**os.environ, **(variables or {})}
    process = CONTEXT.Process(target=_begin, args=(environment, target, arguments, options), daemon=False)
    process.start()
    return process


def _begin(
    environment: dict[str, str], target: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    os.environ.clear()  # the server has the environment of the test that started it
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    target(*arguments, **options)
