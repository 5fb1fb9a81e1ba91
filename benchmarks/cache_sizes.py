"""Bytes and seconds per pair of the token cache and of the reference cache, on a real file, extrapolated.

    python benchmarks/cache_sizes.py --data PAIRS.jsonl --tokenizer MODEL [--copies 20] [--pairs 10000000]

The rows of PAIRS.jsonl (prompt, chosen, rejected) are taken ``--copies`` times, their prompts numbered so that no two
are the same. They are tokenised by one process and by all cores into an empty cache, and opened again. The reference
cache is then filled by a scorer that computes nothing, so that its own time and size are measured and no model's, and
read again. Numbers for ``--pairs`` are those per pair times that: sizes grow so exactly, times were not measured there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from prefopt.core.cache_folder import reference_folder, tokens_folder
from prefopt.data.group import Group
from prefopt.data.load import load_groups
from prefopt.data.tokenizer import load_tokenizer
from prefopt.reference.cache import Identity, ReferenceCache, ResponseScore, SpaceKey

T = TypeVar("T")


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """The result of a function and its seconds."""
    started = time.monotonic()
    return function(), time.monotonic() - started


def below(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def cpu_seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def many(data: Path, copies: int, folder: Path) -> Path:
    """The rows of a file several times over, with numbered prompts."""
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for n in range(copies):
            for row in rows:
                kept = {name: row[name] for name in ("prompt", "chosen", "rejected")}
                file.write(json.dumps(kept | {"prompt": f"{n}: {row['prompt']}"}) + "\n")
    return path


def nothing(tokens: bool) -> Callable[[list[Group]], list[list[ResponseScore]]]:
    """A scorer without a model."""

    def score(groups: list[Group]) -> list[list[ResponseScore]]:
        found = []
        for group in groups:
            counts = [int(c.trained.sum()) for c in group.continuations]
            values = [np.full(n, -1.0, np.float32) if tokens else None for n in counts]
            found.append([ResponseScore(-1.0 * n, n, v) for n, v in zip(counts, values, strict=True)])
        return found

    return score


def measured(data: Path, tokenizer_name: str, copies: int, max_length: int) -> dict[str, float]:
    """All numbers, in bytes and seconds per pair unless their names say otherwise."""
    tokenizer = load_tokenizer(tokenizer_name)
    found: dict[str, float] = {}
    cores = len(os.sched_getaffinity(0))
    found["cores"] = cores
    groups: Any = None
    with tempfile.TemporaryDirectory() as folder:
        file = many(data, copies, Path(folder))
        for name, workers in (("one process", 1), ("all cores", cores)):
            os.environ["PREFOPT_CACHE"] = f"{folder}/{name}"
            load = lambda workers=workers: load_groups(  # noqa: E731
                [str(file)], tokenizer, max_length=max_length, workers=workers, on_bad_row="skip"
            )
            before = cpu_seconds()
            loaded, seconds = timed(load)
            groups = loaded.groups
            found[f"tokenising, {name}, processor time"] = (cpu_seconds() - before) / len(groups)
            found["pairs"] = len(groups)
            found[f"tokenising, {name}"] = seconds / len(groups)
        found["file, bytes"] = file.stat().st_size / len(groups)
        found["opening again"] = timed(load)[1] / len(groups)
        found["tokens"] = float(groups.tokens_G.sum()) / len(groups)
        found["trained tokens"] = float(groups.trained_N.sum()) / len(groups)
        found["token cache, bytes"] = below(tokens_folder()) / len(groups)
        for name, tokens in (("sums", False), ("sums and token values", True)):
            os.environ["PREFOPT_CACHE"] = f"{folder}/{name}"
            space = SpaceKey(Identity("w", "c"), "float32", "shared", "none", "cpu", 1)
            cache = ReferenceCache(space)
            fill = lambda cache=cache, tokens=tokens: cache.fill(  # noqa: E731
                groups, lambda: nothing(tokens), token_budget=32768, token_values=tokens
            )
            found[f"reference cache, {name}, filling"] = timed(fill)[1] / len(groups)
            found[f"reference cache, {name}, bytes"] = below(reference_folder()) / len(groups)
            read = lambda space=space, tokens=tokens: ReferenceCache(space).values(groups, token_values=tokens)  # noqa: E731
            found[f"reference cache, {name}, reading"] = timed(read)[1] / len(groups)
    found["peak memory of this process, bytes in all"] = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=10_000_000, help="what is extrapolated to")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measured(given.data, given.tokenizer, given.copies, given.max_length)
    whole = {"cores", "pairs", "tokens", "trained tokens", "peak memory of this process, bytes in all"}
    for name, value in found.items():
        if name in whole:
            print(f"{name:48} {value:15,.0f}")
        elif name.endswith("bytes"):
            print(f"{name:48} {value:15,.0f} a pair  {value * given.pairs / 1e9:10,.1f} GB for {given.pairs:,}")
        else:
            print(f"{name:48} {value * 1e6:12,.1f} us a pair  {value * given.pairs / 3600:9,.2f} h for {given.pairs:,}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
