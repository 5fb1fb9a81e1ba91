"""Direct Preference Optimization in one flat file: torch and transformers, no classes, one sequence at a time.

    python examples/flat_dpo.py --model MODEL --data PAIRS.jsonl --output OUTPUT --dtype float64

It does the same as `prefopt dpo --eval-fraction 0`, with the same options and defaults; its losses are equal to 1e-6 (a
test runs both). It is simpler: every response is encoded together with its prompt, whole logits are held, nothing is
cached or resumed, and a row that is too long is refused.

PAIRS.jsonl holds rows of {"prompt": ..., "chosen": ..., "rejected": ...}, all text or all lists of messages.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description="DPO (arXiv 2305.18290), written out")
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--beta", type=float, default=0.1)
parser.add_argument("--label-smoothing", type=float, default=0.0)
parser.add_argument("--epochs", type=float, default=1.0)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--learning-rate", type=float, default=1e-6)
parser.add_argument("--warmup", type=float, default=0.1)
parser.add_argument("--max-grad-norm", type=float, default=1.0)
parser.add_argument("--max-length", type=int, default=1024)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
model.eval()  # switches dropout off: log-probabilities must not be random
rows = [json.loads(line) for line in Path(options.data).read_text("utf-8").splitlines() if line.strip()]


# --- From rows to token ids, with a mask of the tokens that are trained: those of the response, and its end ---

bare = tokenizer("a", add_special_tokens=False)["input_ids"]
full = tokenizer("a")["input_ids"]
lead = full[: full.index(bare[0])]  # BOS, where the tokenizer puts one before plain text


def encode(prompt, response):
    """Token ids [L] of prompt and response, and which of them are trained [L]."""
    if isinstance(prompt, str):
        before, text, end = prompt, prompt + response, [tokenizer.eos_token_id]
    else:
        before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        text, end = tokenizer.apply_chat_template(prompt + response, tokenize=False).rstrip(), []
        if not text.startswith(before) or not text.endswith(tokenizer.eos_token):
            raise SystemExit("this chat template is not supported in this example: use prefopt dpo")
    # In generation the prompt is tokenized alone. Some tokenizers would merge its end with the response.
    asked, ids, rest = (
        tokenizer(t, add_special_tokens=False)["input_ids"] for t in (before, text, text[len(before) :])
    )
    if ids[: len(asked)] != asked:
        ids = asked + rest
    ids, trained = ids + end, [i >= len(asked) for i in range(len(ids) + len(end))]
    if isinstance(prompt, str):
        ids, trained = lead + ids, [False] * len(lead) + trained
    if len(ids) > options.max_length:
        raise SystemExit(f"a response has {len(ids)} tokens with its prompt, more than --max-length")
    return torch.tensor(ids), torch.tensor(trained)


pairs = [(encode(row["prompt"], row["chosen"]), encode(row["prompt"], row["rejected"])) for row in rows]


# --- The log-probability of a response: the sum over its tokens, each given all before it ---


def logp(ids, trained):
    logits = model(input_ids=ids[None]).logits[0, :-1]  # position t foretells token t + 1
    logps = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return logps[trained[1:]].double().sum()


with torch.no_grad():  # the reference is the model as it is now
    reference = [(logp(*chosen), logp(*rejected)) for chosen, rejected in pairs]


# --- Training: AdamW, linear warm-up and decay, an order that seed and epoch alone decide ---

steps_per_epoch = math.ceil(len(pairs) / options.batch_size)
steps = max(1, math.ceil(options.epochs * steps_per_epoch))
warmup = round(options.warmup * steps)
optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
log = []

for step in range(steps):
    epoch, within = divmod(step, steps_per_epoch)
    order = np.random.Generator(np.random.PCG64([options.seed, epoch])).permutation(len(pairs))
    batch = order[within * options.batch_size : (within + 1) * options.batch_size]

    total = margins = 0.0
    for i in batch:
        (chosen, rejected), (chosen_ref, rejected_ref) = pairs[i], reference[i]
        # Equation 7 of the paper; the label smoothing is Mitchell's conservative DPO.
        chosen_reward = options.beta * (logp(*chosen) - chosen_ref)
        rejected_reward = options.beta * (logp(*rejected) - rejected_ref)
        margin = chosen_reward - rejected_reward
        e = options.label_smoothing
        loss = -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)
        (loss / len(batch)).backward()  # the mean over the batch, one pair at a time
        total += loss.item()
        margins += margin.item()

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
    if step < warmup:
        rate = options.learning_rate * (step + 1) / (warmup + 1)
    else:
        rate = options.learning_rate * (1 - (step - warmup) / max(1, steps - warmup))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()

    log.append(
        {
            "step": step + 1,
            "loss": total / len(batch),
            "rewards/margins": margins / len(batch),
            "grad_norm": norm.item(),
            "learning_rate": rate,
        }
    )
    print(f"step {step + 1}/{steps}: loss {log[-1]['loss']:.6f}, margin {log[-1]['rewards/margins']:+.4f}", flush=True)


# --- An ordinary Hugging Face folder, and what happened on the way ---

output = Path(options.output)
model.save_pretrained(output)
tokenizer.save_pretrained(output)
(output / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
