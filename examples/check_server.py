"""Is a served model the one that was trained? python examples/check_server.py OUTPUT http://localhost:8000/v1

Asks a server with OpenAI's interface (vLLM, Ollama, llama.cpp and more) and the folder itself the same questions, and
compares: how many tokens the server made of each prompt (and which, where it has vLLM's /tokenize), then what it
answers at temperature 0. A count that differs is another chat template, or one beginning-of-text token more or less;
answers that differ at once with equal counts are other weights, or a coarse quantisation. Later on, answers may part
where two tokens are about equally likely: rounding differs between servers. Exit status 0: nothing differs that should
not; 1: something does.

A folder without a chat template is asked to continue text.
"""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from transformers import AutoTokenizer

import prefopt

QUESTIONS = ("Hello!", "Name three colours.", "Grüße aus 北京 – what is 12 × 12?")
SAME = 4
"""Words that have to be the same before answers may part."""


def ask(url: str, body: dict[str, Any] | None, key: str | None) -> Any:
    """The JSON that a server answers; none where it has no such address."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        if error.code in (404, 405, 501):
            return None
        raise SystemExit(f"{url}: the server answers {error.code}: {error.read().decode('utf-8', 'replace')}") from None
    except OSError as error:
        raise SystemExit(f"{url} cannot be reached: {error}") from None


def common(one: list[Any], two: list[Any]) -> int:
    """How many elements two lists begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what was trained, merged where it was an adapter")
    parser.add_argument("url", help="such as http://localhost:8000/v1")
    parser.add_argument("--model", help="its name on the server; default: the only one there")
    parser.add_argument("--key", help="environment variable that holds a key")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--device", help="of the folder's model here; default: as prefopt sample")
    args = parser.parse_args()
    base, key = args.url.rstrip("/"), os.environ[args.key] if args.key else None
    names = [m["id"] for m in (ask(f"{base}/models", None, key) or {"data": []})["data"]]
    if args.model is None and len(names) != 1:
        raise SystemExit(f"name one of the server's models by --model: {', '.join(names) or 'it lists none'}")
    model = args.model or names[0]

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    chat = tokenizer.chat_template is not None
    asked: list[Any] = [[{"role": "user", "content": q}] for q in QUESTIONS] if chat else list(QUESTIONS)
    here = prefopt.sample(
        args.folder,
        [{"prompt": p} for p in asked],
        temperature=0.0,
        max_new_tokens=args.tokens,
        device=args.device,
        progress="none",
    ).rows
    wrong = 0
    for prompt, row, question in zip(asked, here, QUESTIONS, strict=True):
        body: dict[str, Any] = {"messages": prompt} if chat else {"prompt": prompt}
        if chat:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(prompt)["input_ids"]
        more = {"model": model, "temperature": 0, "max_tokens": args.tokens}
        found = ask(f"{base}/{'chat/' if chat else ''}completions", {**body, **more}, key)
        if found is None:
            raise SystemExit(f"{base} has no such interface; the address ends in /v1 as a rule")
        tokenized = ask(urllib.parse.urljoin(base + "/", "../tokenize"), {"model": model, **body}, key)
        theirs = (tokenized or {}).get("tokens")
        count = (found.get("usage") or {}).get("prompt_tokens")
        print(f"{question}")
        if theirs is not None:
            same = theirs == ids
            print(f"  prompt: {'the same' if same else 'OTHER'} token ids, {len(theirs)} there, {len(ids)} here")
            if not same:
                at = common(theirs, ids)
                print(f"    from token {at + 1}: {theirs[at : at + 5]} there, {ids[at : at + 5]} here")
        else:
            same = count == len(ids)
            print(f"  prompt: {count} tokens there, {len(ids)} here{'' if same else ': NOT the same'}")
        choice = found["choices"][0]
        there = (choice["message"]["content"] if chat else choice["text"]) or ""
        mine = tokenizer.decode(row["token_ids"][0], skip_special_tokens=True)  # as servers show it
        words = there.split(), mine.split()
        alike, whole = common(*words), words[0] == words[1]
        enough = whole or (min(map(len, words)) > 0 and alike >= min(SAME, *map(len, words)))
        told = "the same" if whole else f"the first {alike} words are the same"
        print(f"  answer: {told}{'' if enough else ': OTHER'}")
        if not whole:
            print(f"    there: {there!r}\n    here:  {mine!r}")
        wrong += not same or not enough
    print("the server has what was trained" if not wrong else f"{wrong} of {len(QUESTIONS)} questions differ")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
