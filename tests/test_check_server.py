"""The check of a served model passes for the model itself, and finds another template, other weights, other tokens."""

from __future__ import annotations

import json
import re
import runpy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from small_chat import build_model

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "check_server.py"
Change = Callable[[Any, Any], None]


@contextmanager
def served(
    folder: Path, change: Change, *, tokenize: bool, dtype: str = "float32", logprobs: str = "none"
) -> Iterator[str]:
    """The model as transformers runs it, behind OpenAI's interface; ``change`` may spoil tokenizer and model.
    ``logprobs``: of nothing, of answers, or of prompts that it echoes too; a server of "strict" refuses to be asked."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    change(tokenizer, model)

    def ids_of(body: dict[str, Any]) -> list[int]:
        if "prompt" in body:
            return list(tokenizer(body["prompt"])["input_ids"])
        return list(tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False))

    def logprobs_of(ids: list[int]) -> list[float]:
        with torch.no_grad():
            found = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].float(), -1)
        return found[range(len(ids) - 1), ids[1:]].tolist()

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        if body.get("echo"):
            values = [None, *logprobs_of(body["prompt"]), -1.0] if logprobs == "prompts" else None
            return {"choices": [{"text": "", "logprobs": values and {"token_logprobs": values}}]}
        ids = ids_of(body)
        made: list[int] = []
        with torch.no_grad():
            for _ in range(body["max_tokens"]):
                made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
                if made[-1] == tokenizer.eos_token_id:
                    break
        text = tokenizer.decode(made, skip_special_tokens=True)
        choice: dict[str, Any] = {"text": text}
        words, values = [tokenizer.decode([i], skip_special_tokens=True) for i in made], logprobs_of(ids + made)
        given = values[len(ids) - 1 :] if logprobs in ("answers", "prompts") else []
        if "prompt" in body:
            choice["logprobs"] = {"tokens": words, "token_logprobs": given}
        else:
            pairs = zip(words, given, strict=False)
            choice = {"message": {"role": "assistant", "content": text}}
            choice["logprobs"] = {"content": [{"token": word, "logprob": value} for word, value in pairs]}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.tell({"data": [{"id": "small"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if logprobs == "strict" and "logprobs" in body:
                self.send_error(400)
            elif self.path == "/tokenize" and tokenize:
                self.tell({"tokens": ids_of(body)})
            elif self.path in ("/v1/chat/completions", "/v1/completions"):
                self.tell(answer(body))
            else:
                self.send_error(404)

        def tell(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def nothing(tokenizer: Any, model: Any) -> None:
    pass


def other_template(tokenizer: Any, model: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def other_weights(tokenizer: Any, model: Any) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight.flip(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    rows = Path(__file__).with_name("pairs.jsonl").read_text("utf-8").split("\n")[:14]
    build_model(path, [turn["content"] for row in rows for turns in json.loads(row).values() for turn in turns])
    # Far from its start, so that the likeliest tokens are words of all kinds.
    config = AutoConfig.from_pretrained(path, tie_word_embeddings=False, initializer_range=0.3)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def check(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), url, "--tokens", "6", "--device", "cpu", *more])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize(
    ("change", "told"),
    [(nothing, "has what was trained"), (other_template, "prompt: "), (other_weights, "OTHER")],
    ids=["the model itself", "another template", "other weights"],
)
def test_a_served_model_is_told_from_another(
    change: Change, told: str, tokenize: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with served(folder, change, tokenize=tokenize) as url:
        status = check(folder, url, monkeypatch)
    out = capsys.readouterr().out
    assert status == (change is not nothing) and told in out, out
    if change is other_template:
        assert ("OTHER token ids" if tokenize else "NOT the same") in out
    if change is other_weights:
        assert out.count("the same token ids" if tokenize else "tokens there") == 3 and "questions differ" in out


def test_text_is_compared_where_there_is_no_template(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(base)
    with served(base, nothing, tokenize=True) as url:
        assert check(base, url, monkeypatch) == 0
    assert capsys.readouterr().out.count("the same token ids") == 3


def test_a_server_in_bfloat16_is_compared_in_bfloat16(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with served(folder, nothing, tokenize=True, dtype="bfloat16") as url:
        assert check(folder, url, monkeypatch, "--dtype", "bfloat16") == 0
    out = capsys.readouterr().out
    assert "computes in bfloat16" in out and out.count("OTHER") == 0
    with served(folder, other_weights, tokenize=True, dtype="bfloat16") as url:
        assert check(folder, url, monkeypatch, "--dtype", "bfloat16") == 1


def moved(by: float) -> Change:
    """Weights that differ in one thing: the likeliest first token of the first answer, and the next likeliest one, are
    told apart by ``by`` nats the other way round."""

    def change(tokenizer: Any, model: Any) -> None:
        prompt = [{"role": "user", "content": "Hello!"}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            (first, second), (_, next_best) = (hidden @ model.lm_head.weight.T).topk(2)
            step = hidden / hidden.dot(hidden)
            model.lm_head.weight[next_best] += step * (first - second + by)

    return change


@pytest.mark.parametrize(("by", "told"), [(1e-4, "parts at a near tie"), (0.3, "OTHER")], ids=["near tie", "other"])
def test_a_near_tie_is_told_from_another_model(
    by: float, told: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    # The folder itself has the two tokens nearly alike, so that it is the server's rounding that decides.
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    moved(-2e-4 if by < 0.1 else -by)(tokenizer, model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with served(tmp_path, moved(by), tokenize=True) as url:
        assert check(tmp_path, url, monkeypatch) == (told == "OTHER")
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("logprobs", ["prompts", "answers"])
def test_log_probabilities_are_compared_where_a_server_gives_them(
    logprobs: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with served(folder, nothing, tokenize=True, logprobs=logprobs) as url:
        assert check(folder, url, monkeypatch) == 0
    out = capsys.readouterr().out
    values = int(re.findall(rf"of \d+ {logprobs} \((\d+) values\): the same up to rounding", out)[0])
    assert values > (1000 if logprobs == "prompts" else 3) and "largest difference" in out
    with served(folder, sharper, tokenize=True, logprobs=logprobs) as url:  # the same answers with other probabilities
        assert check(folder, url, monkeypatch) == 1
    out = capsys.readouterr().out
    assert out.count("answer: the same") == 3 and f"{logprobs} (" in out and "OTHER" in out


def sharper(tokenizer: Any, model: Any) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.02)


@pytest.mark.parametrize("logprobs", ["none", "strict"])
def test_servers_without_log_probabilities_are_checked_by_their_answers(
    logprobs: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with served(folder, nothing, tokenize=True, logprobs=logprobs) as url:
        assert check(folder, url, monkeypatch) == 0
    assert "gives no log-probabilities" in capsys.readouterr().out


def test_the_text_of_a_base_model_is_compared_by_log_probabilities_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    with served(tmp_path, nothing, tokenize=True, logprobs="answers") as url:
        assert check(tmp_path, url, monkeypatch) == 0
    assert re.search(r"of 3 answers \(\d+ values\): the same", capsys.readouterr().out)
