"""Files to tokenise, and a process of its own that does: to be watched, raced and killed."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.small import small_tokenizer
from prefopt.data import load
from prefopt.data import workers as prepare
from prefopt.data.load import GroupSet, load_groups
from prefopt.data.table import COLUMNS

TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}{% if shout %}!{% endif %}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


def chat_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations with a chosen and a rejected answer; a few prompts come twice."""
    chance = random.Random(seed)

    def text(low: int, high: int) -> str:
        return "".join(chance.choice("abcdefgh ij") for _ in range(chance.randint(low, high))).strip() or "x"

    return [
        {
            "prompt": [{"role": "user", "content": f"{text(5, 60)}{i // 2 * 2}"}],
            "chosen": [{"role": "assistant", "content": f"yes {i} {text(1, 40)}"}],
            "rejected": [{"role": "assistant", "content": f"no {i} {text(1, 40)}"}],
        }
        for i in range(n)
    ]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8", errors="surrogatepass"
    )
    return path


def contents(data: GroupSet) -> dict[str, Any]:
    """All that a set of groups says, to be compared."""
    columns = {name: getattr(data.groups, name).tobytes() for name in COLUMNS}
    return columns | {"read": data.read, "problems": data.problems, "notes": data.notes, "template": data.template}


def start(
    file: Path, *, seconds: float = 0.0, workers: int = 1, log: Path | None = None, hold_at: int | None = None
) -> Any:
    """Tokenise ``file`` in a process that waits so long before each chunk of ten rows, and without end before the one
    of number ``hold_at``, from 0; it prints what it summed up."""
    held = "" if hold_at is None else str(hold_at)
    command = [sys.executable, __file__, str(file), str(seconds), str(workers), str(log or ""), held]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def child(file: str, seconds: float, workers: int, log: str, hold_at: str) -> None:
    from prefopt.core.terminal import StopRequest
    from prefopt.errors import Interrupted, UserError

    prepare.CHUNK_ROWS, load.PARALLEL_ROWS = 10, 20
    prepared, chunks = prepare.Preparer.__call__, itertools.count()

    def slow(self: prepare.Preparer, rows: Any) -> prepare.Chunk:
        time.sleep(seconds)
        if log:
            with Path(log).open("a") as handle:
                handle.write(f"{os.getpid()} {len(rows)}\n")
        if next(chunks) == int(hold_at or -1):
            threading.Event().wait()
        return prepared(self, rows)

    prepare.Preparer.__call__ = slow  # type: ignore[method-assign]
    with StopRequest() as stop:
        try:
            data = load_groups([file], small_tokenizer(), workers=workers, stop=stop.check)
        except (Interrupted, UserError) as error:
            print(type(error).__name__, error, file=sys.stderr)
            raise SystemExit(3) from None
    print("; ".join(data.summary()), int(np.sum(data.groups.tokens_G)))


if __name__ == "__main__":
    child(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
