"""Two rewards that are no lists of words: models of the sentiment of film reviews, each trained on reviews of its own.

    python benchmarks/imdb_rewards.py --reviews aclImdb/train --output rewards
    prefopt frontier --config prefopt:recipes/frontier.yaml --prompts imdb_test.txt --held-out 128 --num 8 \\
      --reward rewards/a --judge rewards/b --output over-optimised

``--reviews`` holds ``pos`` and ``neg`` with a review in each file (Maas et al. 2011). The reviews of even and of odd
numbers train one model each. A pair is a passage of a positive review against one of a negative review, without a
prompt: about as long as the samples of the sweep, so that the models judge what they have learned to.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import prefopt

SENTENCE = re.compile(r"(?<=[.!?])\s+")


def passages(folder: Path, half: int, words: int, chance: random.Random) -> list[str]:
    """A passage of ``words`` words from each review of a half, from the beginning of one of its sentences."""
    found = []
    for file in sorted(folder.glob("*.txt"), key=lambda path: int(path.stem.partition("_")[0])):
        if int(file.stem.partition("_")[0]) % 2 != half:
            continue
        text = " ".join(re.sub(r"<br />", " ", file.read_text("utf-8")).split())
        starts = [0, *(match.end() for match in SENTENCE.finditer(text))]
        long = [text[start:] for start in starts if len(text[start:].split()) >= words]
        found.append(" ".join(chance.choice(long or [text]).split()[:words]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("rewards"))
    parser.add_argument("--model", default="prefopt:demo/tiny_imdb")
    parser.add_argument("--words", type=int, default=24, help="words of a passage")
    parser.add_argument("--pairs", type=int, default=6000, help="pairs of each model, at most")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for half, name in enumerate("ab"):
        chance = random.Random(half)
        good, bad = (passages(given.reviews / label, half, given.words, chance) for label in ("pos", "neg"))
        chance.shuffle(good)
        chance.shuffle(bad)
        rows = [{"prompt": "", "chosen": one, "rejected": other} for one, other in zip(good, bad, strict=False)]
        file = given.output / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[: given.pairs]), "utf-8")
        prefopt.reward(
            model=given.model,
            data=[str(file)],
            output=str(given.output / name),
            eval_fraction=0.1,
            batch_size=16,
            learning_rate=2e-4,
            dtype="float32",
            resume=(given.output / name).exists(),
        )


if __name__ == "__main__":
    main()
