"""Is a served model the one that was trained? python examples/check_server.py OUTPUT http://localhost:8000/v1

Sends the same prompts to a server with OpenAI's interface (vLLM, Ollama, llama.cpp and others) and to the model in the
folder. Compares the number of tokens of each prompt (and their ids, if the server has vLLM's /tokenize), then the
responses at temperature 0. If the numbers differ, the cause is another chat template, or a duplicate or missing
beginning-of-text token.

The folder's model computes in the precision of the server (--dtype: as the server was started). Responses may still
differ after a token that is about as likely as another, since kernels add in different orders. So at the first token
that differs, the folder's model gives the probabilities of both tokens: a difference within rounding passes, a larger
one means other weights, or a coarse quantisation.

If the server gives log-probabilities, they are compared too: of every token of 32 prompts if it echoes prompts (vLLM),
otherwise of the tokens of its responses. The largest and the mean difference are printed, beside the difference that
rounding to the server's precision explains. Exit status 0: the same model; 1: something differs.

Without a chat template, text is continued instead.
"""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import prefopt
from prefopt.export.scores import Difference, Floats, stored_prompts, token_logprobs
from prefopt.model.architectures import context_length

QUESTIONS = ("Hello!", "Name three colours.", "Grüße aus 北京 – what is 12 × 12?")
LIKELY = 256
"""Tokens among which the server's is looked for."""
ORDER = 1e-3
"""How far logits in float32 may move, in nats, when sums are taken in another order."""
KERNELS = 4
"""How many times as far as rounding on this machine moves log-probabilities other kernels may move them."""
ABSENT, REFUSED = (404, 405, 501), (400, 422)


def ask(url: str, body: dict[str, Any] | None, key: str | None, *, optional: bool = False) -> Any:
    """The JSON that a server answers; none where it has no such address, or refuses what is ``optional``."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        if error.code in ABSENT or (optional and error.code in REFUSED):
            return None
        raise SystemExit(f"{url}: the server answers {error.code}: {error.read().decode('utf-8', 'replace')}") from None
    except OSError as error:
        raise SystemExit(f"{url} cannot be reached: {error}") from None


@dataclass
class Folder:
    """The model in a folder, in the precision that the server computes in and in float32."""

    path: str
    dtype: str
    device: str | None

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.chat = self.tokenizer.chat_template is not None
        self.context = context_length(AutoConfig.from_pretrained(self.path))
        self.models: list[Any] = []

    def ids(self, prompt: Any) -> list[int]:
        if self.chat:
            return list(self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        return list(self.tokenizer(prompt)["input_ids"])

    def answers(self, prompts: list[Any], tokens: int) -> list[list[int]]:
        """Token ids of the likeliest answers."""
        rows = [{"prompt": prompt} for prompt in prompts]
        how: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": tokens, "progress": "none", "device": self.device}
        dtype = "float32" if self.dtype == "float16" else self.dtype  # which prefopt does not sample in
        found = prefopt.sample(self.path, rows, dtype=dtype, **how).rows
        return [row["token_ids"][0] for row in found]

    def text(self, ids: list[int]) -> str:
        """As servers show it; bytes that are no whole character yet are left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).rstrip("\ufffd")

    def parting(self, prompt: list[int], mine: list[int], there: str) -> tuple[float, float]:
        """Where the server's text parts from ``mine``: how much less likely its next token is than the likeliest one,
        and by how much rounding moves such a difference, both in nats."""
        last = next(n for n in range(len(mine), -1, -1) if there.startswith(self.text(mine[:n])))
        # A token that only begins a character fits any text, so that they may have parted before it, too.
        first = next(n for n in range(last, -1, -1) if n == 0 or self.text(mine[:n]) != self.text(mine[: n - 1]))
        return min(self._gap([*prompt, *mine[:n]], mine[:n], there) for n in range(first, last + 1))

    def _gap(self, ids: list[int], kept: list[int], there: str) -> tuple[float, float]:
        exact, rounded = (self._logits(which, ids) for which in range(2))
        likely = exact.topk(min(LIKELY, len(exact))).indices.tolist()
        fits = [token for token in likely if self._fits(kept, token, there)]
        moved = 2 * float((exact - rounded).abs().max()) + ORDER
        return float(exact.max() - exact[fits].max()) if fits else float("inf"), moved

    def _fits(self, ids: list[int], token: int, there: str) -> bool:
        """Whether the server's text may go on with a token: it adds to it, or ends it."""
        special = token in self.tokenizer.all_special_ids
        return special if self.text(ids) == there else not special and there.startswith(self.text([*ids, token]))

    def logprobs(self, rows: list[list[int]]) -> tuple[list[Floats], list[Floats]]:
        """Log-probability of every token but the first of each row, in float32 and in the server's precision."""
        exact, rounded = (token_logprobs(self._model(which), rows) for which in range(2))
        return exact, rounded

    @torch.no_grad()
    def _logits(self, which: int, ids: list[int]) -> torch.Tensor:
        model = self._model(which)
        logits: torch.Tensor = model(torch.tensor([ids], device=model.device)).logits[0, -1].float().cpu()
        return logits

    def _model(self, which: int) -> Any:
        if not self.models:
            self.models = [
                AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype).to(self.device or "cpu").eval()
                for dtype in (torch.float32, getattr(torch, self.dtype))
            ]
        return self.models[which]


def same_prompt(ids: list[int], theirs: list[int] | None, count: int | None) -> bool:
    """Whether the server made the same tokens of a prompt; says so."""
    if theirs is None:
        same = count == len(ids)
        print(f"  prompt: {count} tokens there, {len(ids)} here{'' if same else ': NOT the same'}")
        return same
    same = theirs == ids
    print(f"  prompt: {'the same' if same else 'OTHER'} token ids, {len(theirs)} there, {len(ids)} here")
    if not same:
        shorter = min(len(theirs), len(ids))
        at = next((i for i in range(shorter) if theirs[i] != ids[i]), shorter)
        print(f"    from token {at + 1}: {theirs[at : at + 5]} there, {ids[at : at + 5]} here")
    return same


def same_answer(folder: Folder, prompt: list[int], mine: list[int], there: str) -> bool:
    """Whether the server answered as the folder's model does, or parts from it at a near tie; says so."""
    here = folder.text(mine)
    if there == here or there.strip() == here.strip():
        print("  answer: the same")
        return True
    gap, rounding = folder.parting(prompt, mine, there)
    near = gap <= rounding
    told = "parts at a near tie" if near else "OTHER"
    how = f"is not among the {LIKELY} likeliest" if gap == float("inf") else f"is {gap:.3g} nats less likely here"
    print(f"  answer: {told}: the server's token {how}, rounding explains {rounding:.3g}")
    print(f"    there: {there!r}\n    here:  {here!r}")
    return near


def prompt_logprobs(base: str, model: str, key: str | None, rows: list[list[int]]) -> list[Floats] | None:
    """The server's log-probability of every token but the first of each row; none where it echoes no prompts."""
    found: list[Floats] = []
    for ids in rows:
        body = {"model": model, "prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
        answered = ask(f"{base}/completions", body, key, optional=True)
        values = ((answered or {"choices": [{}]})["choices"][0].get("logprobs") or {}).get("token_logprobs") or []
        if len(values) < len(ids) or any(value is None for value in values[1 : len(ids)]):
            return None
        found.append(np.array(values[1 : len(ids)], np.float64))
    return found


def answer_logprobs(folder: Folder, choice: Any, mine: list[int]) -> list[float]:
    """The server's log-probabilities of its answer's first tokens, as long as they are those of ``mine``."""
    given = choice.get("logprobs") or {}
    if given.get("content"):
        pairs = [(token["token"], token["logprob"]) for token in given["content"]]
    else:
        pairs = list(zip(given.get("tokens") or (), given.get("token_logprobs") or (), strict=False))
    found: list[float] = []
    there = ""
    for count, (text, value) in enumerate(pairs[: len(mine)], 1):
        there += text
        if value is None or folder.text(mine[:count]) != there:
            break
        found.append(float(value))
    return found


def same_logprobs(folder: Folder, what: str, rows: list[list[int]], there: list[Floats]) -> bool:
    """Whether the server's log-probabilities of the last tokens of rows are the folder's up to rounding; says so."""
    exact, rounded = (
        [values[len(values) - len(few) :] for values, few in zip(side, there, strict=True)]
        for side in folder.logprobs(rows)
    )
    found, rounding = Difference.between(exact, there), Difference.between(exact, rounded)
    same = found.largest <= KERNELS * rounding.largest + ORDER
    print(f"log-probabilities of {what} ({found.count} values): {'the same up to rounding' if same else 'OTHER'}")
    print(
        f"  largest difference {found.largest:.2g}, mean {found.mean:.2g}; rounding moves them {rounding.largest:.2g}"
    )
    return same


def compare_logprobs(base: str, model: str, key: str | None, folder: Folder, answers: list[Any]) -> bool:
    """Compare log-probabilities of the stored prompts, else of ``answers``: prompt, own answer and the server's."""
    prompts = stored_prompts(None, folder.tokenizer, folder.context)
    if (there := prompt_logprobs(base, model, key, prompts.ids)) is not None:
        return same_logprobs(folder, f"{len(there)} prompts", prompts.ids, there)
    rows, values = [], []
    for prompt, mine, choice in answers:
        if few := answer_logprobs(folder, choice, mine):
            rows.append([*prompt, *mine[: len(few)]])
            values.append(np.array(few, np.float64))
    if not values:
        print("the server gives no log-probabilities, so they are not compared")
        return True
    return same_logprobs(folder, f"{len(values)} answers", rows, values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what was trained, merged where it was an adapter")
    parser.add_argument("url", help="such as http://localhost:8000/v1")
    parser.add_argument("--model", help="its name on the server; default: the only one there")
    parser.add_argument("--key", help="environment variable that holds a key")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--device", help="of the folder's model here; default: as prefopt sample")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="what the server computes in (its own --dtype); default: what config.json says",
    )
    args = parser.parse_args()
    base, key = args.url.rstrip("/"), os.environ[args.key] if args.key else None
    names = [m["id"] for m in (ask(f"{base}/models", None, key) or {"data": []})["data"]]
    if args.model is None and len(names) != 1:
        raise SystemExit(f"name one of the server's models by --model: {', '.join(names) or 'it lists none'}")
    model = args.model or names[0]

    dtype = args.dtype or str(AutoConfig.from_pretrained(args.folder).dtype or "float32").removeprefix("torch.")
    folder = Folder(args.folder, dtype, args.device)
    print(f"the folder's model computes in {dtype}")
    asked: list[Any] = [[{"role": "user", "content": q}] for q in QUESTIONS] if folder.chat else list(QUESTIONS)
    wrong, answers = 0, []
    for prompt, mine, question in zip(asked, folder.answers(asked, args.tokens), QUESTIONS, strict=True):
        body = {"messages" if folder.chat else "prompt": prompt}
        more = {"model": model, "temperature": 0, "max_tokens": args.tokens}
        address, wanted = (
            f"{base}/{'chat/' if folder.chat else ''}completions",
            {"logprobs": True if folder.chat else 1},
        )
        found = ask(address, {**body, **more, **wanted}, key, optional=True) or ask(address, {**body, **more}, key)
        if found is None:
            raise SystemExit(f"{base} has no such interface; the address ends in /v1 as a rule")
        tokenized = ask(urllib.parse.urljoin(base + "/", "../tokenize"), {"model": model, **body}, key)
        print(question)
        choice, ids = found["choices"][0], folder.ids(prompt)
        there = (choice["message"]["content"] if folder.chat else choice["text"]) or ""
        counted = (found.get("usage") or {}).get("prompt_tokens")
        same = same_prompt(ids, (tokenized or {}).get("tokens"), counted)
        wrong += not same_answer(folder, ids, mine, there) or not same
        answers.append((ids, mine, choice))
    if wrong:
        print(f"{wrong} of {len(QUESTIONS)} questions differ")
    same = compare_logprobs(base, model, key, folder, answers)
    if same and not wrong:
        print("the server has what was trained")
    return int(not same or bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
