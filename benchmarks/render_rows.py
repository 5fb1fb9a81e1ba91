"""Rows per second of rendering: from comparisons to token ids and masks, in one process, by template and length of row.

    python benchmarks/render_rows.py --tokenizer FOLDER [--data FILE ...] [--rows 2000] [--rounds 5]

Beside prefopt: one call of ``apply_chat_template(tokenize=True)`` for each response and one for each prompt, which is
the least that tells a prompt from its answers with transformers alone; and the tokenizer alone, on the rendered texts.
Every figure is the best of the rounds. Without ``--data`` the rows are made up: 25 words of prompt, 30 of each answer.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from prefopt.data.chat.render import Rendered, Renderer
from prefopt.data.chat.template import Rendering
from prefopt.data.comparisons import read_comparisons
from prefopt.data.tokenizer import Tokenizer, load_tokenizer
from prefopt.data.validate import check
from prefopt.records import Comparison, Message

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the of and to in he have it that for they with as not on she at by this we you do but from or which".split()


def made_up(count: int) -> list[Comparison]:
    """Pairs of short answers."""
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    return [
        Comparison.pair([Message("user", text(25))], chosen=text(30), rejected=text(30), row=row)
        for row in range(1, count + 1)
    ]


def best(rounds: int, run: Callable[[], int]) -> tuple[float, int]:
    """Seconds of the fastest round, and what the runs return."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return min(times), result


def by_prefopt(renderer: Renderer, rows: Sequence[Comparison]) -> int:
    return sum(x.group.tokens for x in renderer.render_all(rows) if isinstance(x, Rendered))


def by_transformers(tokenizer: Tokenizer, rows: Sequence[Comparison]) -> int:
    tokens = 0
    for c in rows:
        turns = [{"role": m.role, "content": m.content} for m in c.prompt]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        for response in c.responses:
            whole = turns + [{"role": m.role, "content": m.content} for m in response.messages]
            tokens += len(tokenizer.apply_chat_template(whole, return_dict=False))
        tokens += len(asked)
    return tokens


def by_tokenizer(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    batch = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return sum(len(encoding.ids) for encoding in batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer with <|im_start|> and <|im_end|>")
    parser.add_argument("--data", nargs="*", default=[], help="files of pairs, as conversations")
    parser.add_argument("--rows", type=int, default=2000, help="rows to make up")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    sets = {f"{options.rows} made up": made_up(options.rows)}
    sets |= {name: [c for c in read_comparisons(name).comparisons if not check(c, "pairs")] for name in options.data}
    print(f"{'rows':40} {'template':10} {'prefopt':>12} {'transformers':>13} {'tokenizer':>12}  rows per second")
    for name, rows in sets.items():
        for template, source in (("own", None), ("ChatML", CHATML)):
            renderer = Renderer(tokenizer, Rendering(chat_template=source))
            if source is not None:
                tokenizer.chat_template = source
            texts = [
                tokenizer.apply_chat_template([{"role": m.role, "content": m.content} for m in turns], tokenize=False)
                for c in rows
                for turns in (c.prompt + r.messages for r in c.responses)
            ]
            mine, tokens = best(options.rounds, lambda renderer=renderer, rows=rows: by_prefopt(renderer, rows))
            theirs, _ = best(options.rounds, lambda rows=rows: by_transformers(tokenizer, rows))
            alone, _ = best(options.rounds, lambda texts=texts: by_tokenizer(tokenizer, texts))
            speeds = [f"{len(rows) / seconds:,.0f}" for seconds in (mine, theirs, alone)]
            print(f"{name[-40:]:40} {template:10} {speeds[0]:>12} {speeds[1]:>13} {speeds[2]:>12}", end="")
            print(f"  ({tokens / len(rows):,.0f} tokens a row, prompt once)")


if __name__ == "__main__":
    main()
