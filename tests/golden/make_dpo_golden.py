"""Golden values of the DPO loss, made by TRL's own DPOTrainer in float64.

    python -m venv trl-env && trl-env/bin/pip install trl==1.16.0
    trl-env/bin/python tests/golden/make_dpo_golden.py        # writes dpo.json beside this file

TRL is no dependency of prefopt: the tests read only the JSON. Its layout:

    made_with   versions of trl, transformers and torch
    losses[]    the loss as a function of log-probabilities
        name, beta, label_smoothing
        lengths_chosen, lengths_rejected    [pairs] trained tokens of each response
        policy_chosen, policy_rejected      [pairs] log-probability of each response, summed over its tokens
        reference_chosen, reference_rejected
        loss                                mean over the pairs
        grad_chosen, grad_rejected          [pairs] gradient of the loss in the policy's sums
        metrics                             rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies
    models[]    the loss of a whole model; see `fill` for the weights, which any process can rebuild
        name, architecture, attention, config   arguments of transformers.LlamaConfig or GPT2Config
        parameters                          names in the order that numbers them for `fill`
        beta, pairs[]                       prompt, chosen, rejected: token ids; every token of a response is trained
        loss, metrics                       metrics as above, with logps/chosen and logps/rejected
        fused_head_loss                     the same with TRL's fused head, which computes in float32 whatever the model
        grad_norm                           over all parameters
        gradients{name}                     norm and entries at flat indices [0, n//3, 2n//3, n-1]

Two places where TRL 1.16 alone would not give the number asked for:

- Its fused head accumulates in float32, so a float64 model would get a float32 loss. `Float64Head` stands in for that
  one kernel; batching, masks, shift, sums, reference, loss and metrics are TRL's.
- It reads label_smoothing only in "robust" and "exo_pair" ("sigmoid" ignores it). Smoothed DPO (cDPO, Mitchell 2023) is
  (1-e) L(w,l) + e L(l,w), made here of two runs of TRL's "sigmoid", the second with the sides exchanged, and checked
  against its "robust", which is [(1-e) L(w,l) - e L(l,w)] / (1-2e).

Llama's RMSNorm and eager attention's softmax round to float32 in any dtype, so that two float64 runs that add up in a
different order agree to about 1e-6 only; GPT-2 under SDPA has no such place and agrees to 1e-10.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils as trl_utils

VOCABULARY = 64
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
PAIRS = [
    {"prompt": [5, 9, 11, 7], "chosen": [20, 21, 22, 23, 2], "rejected": [30, 31, 2]},
    {"prompt": [6], "chosen": [40, 2], "rejected": [41, 42, 43, 44, 45, 46, 2]},
    {"prompt": [8, 12, 13, 50, 51, 52, 53, 54, 10], "chosen": [33, 34, 35, 2], "rejected": [33, 34, 36, 2]},
]
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def fill(model: torch.nn.Module, names: list[str], shift: float) -> None:
    """Weights by formula: with i the place of a parameter in ``names`` and j the flat index of an element,

        w[i][j] = base + 0.3 sin(a) + shift cos(3 a),   a = ((j*j + 17 i) mod 10007) / 100,

    base 1 for the weights of norms and 0 elsewhere. Policy: shift 0; reference: shift 0.03.
    """
    parameters = dict(model.named_parameters())
    for i, name in enumerate(names):
        j = torch.arange(parameters[name].numel(), dtype=torch.int64)
        a = ((j * j + 17 * i) % 10007).double() / 100
        is_norm = name.endswith("weight") and ("norm" in name or ".ln_" in name)
        values = float(is_norm) + 0.3 * torch.sin(a) + shift * torch.cos(3 * a)
        parameters[name].data.copy_(values.view_as(parameters[name]))


class Float64Head:
    """What TRL's fused kernel computes, from whole logits, in the dtype of the hidden states."""

    @staticmethod
    def apply(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, targets: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        logits = torch.nn.functional.linear(hidden, weight, bias)
        logp = logits.log_softmax(-1)
        picked = logp.gather(1, targets[:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)
        return picked, entropy, None, logits.mean(-1).detach(), logits.argmax(-1) == targets


class PretokenizedTrainer(DPOTrainer):
    """TRL's trainer, given token ids instead of text."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def make_trainer(folder: str, policy: Any, reference: Any, **options: Any) -> DPOTrainer:
    words = {f"<{i}>": i for i in range(VOCABULARY)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")), pad_token="<0>", eos_token="<2>"
    )
    args = DPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        max_length=None,
        **options,
    )
    rows = [{f"{side}_ids": ids for side, ids in pair.items()} for pair in PAIRS]
    return PretokenizedTrainer(
        policy, reference, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def build(architecture: str, attention: str, config: dict[str, Any], shift: float) -> tuple[Any, list[str]]:
    classes = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "gpt2": ("GPT2Config", "GPT2LMHeadModel")}
    config_class, model_class = (getattr(transformers, name) for name in classes[architecture])
    model = model_class._from_config(config_class(**config), attn_implementation=attention).double()
    names = sorted(name for name, _ in model.named_parameters())
    fill(model, names, shift)
    return model, names


def averages(trainer: DPOTrainer, names: tuple[str, ...]) -> dict[str, float]:
    recorded = trainer._metrics["train"]
    values = {name: sum(recorded[name]) / len(recorded[name]) for name in names}
    recorded.clear()
    return values


def loss_on_sums(trainer: DPOTrainer, inputs: dict[str, Any], swap: bool = False) -> dict[str, Any]:
    """TRL's loss with a model that answers with given token log-probabilities, and its gradient in their sums."""
    order = ("rejected", "chosen") if swap else ("chosen", "rejected")
    lengths = [n for side in order for n in inputs[f"lengths_{side}"]]
    sums = [s for side in order for s in inputs[f"policy_{side}"]]
    mask = torch.zeros(len(lengths), 2 + max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, 2 : 2 + n] = 1
    spread = mask[:, 1:] * (torch.tensor(sums, dtype=torch.float64) / torch.tensor(lengths))[:, None]
    leaf = spread.requires_grad_()

    def answer(**_: Any) -> Any:
        nothing = torch.zeros_like(leaf)
        return trl_utils.FusedCausalLMOutput(
            log_probs=leaf * mask[:, 1:], entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )

    batch = {"input_ids": mask.clone(), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    for trl_side, side in zip(("chosen", "rejected"), order, strict=True):
        batch[f"ref_{trl_side}_logps"] = torch.tensor(inputs[f"reference_{side}"], dtype=torch.float64)
    trainer.model.train()
    loss = trainer.compute_loss(answer, batch)
    (gradient,) = torch.autograd.grad(loss, leaf)
    per_response = gradient[:, 1]  # position 1 (after the shift) is trained in every row
    assert torch.equal(gradient, per_response[:, None] * mask[:, 1:]), "a sum has one gradient for all its tokens"
    halves = dict(zip(order, per_response.view(2, -1), strict=True))
    return {
        "loss": loss,
        "chosen": halves["chosen"],
        "rejected": halves["rejected"],
        "metrics": averages(trainer, REWARDS),
    }


def loss_case(folder: str, beta: float, smoothing: float) -> dict[str, Any]:
    inputs = {
        "lengths_chosen": [3, 12, 1, 7, 25, 40],
        "lengths_rejected": [9, 12, 2, 1, 60, 33],
        "policy_chosen": [-8.25, -31.5, -0.75, -20.125, -55.0, -210.0],
        "policy_rejected": [-21.5, -30.0, -3.5, -2.0, -190.25, -95.5],
        "reference_chosen": [-8.0, -33.0, -0.75, -18.0, -95.0, -110.0],
        "reference_rejected": [-20.75, -34.25, -3.5, -2.5, -90.0, -175.5],
    }
    model, _ = build("llama", "eager", LLAMA, 0.0)
    trainer = make_trainer(folder, model, build("llama", "eager", LLAMA, 0.0)[0], beta=beta, label_smoothing=smoothing)
    trainer.precompute_ref_logps = True  # take the reference from the batch, as after a precompute
    plain, exchanged = loss_on_sums(trainer, inputs), loss_on_sums(trainer, inputs, swap=True)
    mixed = {k: (1 - smoothing) * plain[k] + smoothing * exchanged[k] for k in ("loss", "chosen", "rejected")}
    trainer.loss_types = ["robust"]
    robust = loss_on_sums(trainer, inputs)
    expected = ((1 - smoothing) * plain["loss"] - smoothing * exchanged["loss"]) / (1 - 2 * smoothing)
    assert math.isclose(robust["loss"].item(), expected.item(), rel_tol=1e-14), "exchanged sides against TRL's robust"
    return {
        "name": f"beta {beta}, label smoothing {smoothing}",
        "beta": beta,
        "label_smoothing": smoothing,
        **inputs,
        "loss": mixed["loss"].item(),
        "grad_chosen": mixed["chosen"].tolist(),
        "grad_rejected": mixed["rejected"].tolist(),
        "metrics": plain["metrics"],
    }


def model_case(folder: str, architecture: str, attention: str, config: dict[str, Any], beta: float) -> dict[str, Any]:
    policy, names = build(architecture, attention, config, 0.0)
    reference, _ = build(architecture, attention, config, 0.03)
    trainer = make_trainer(folder, policy, reference, beta=beta)
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    policy.train()
    fused = trainer.compute_loss(policy, batch).item()
    trainer._metrics["train"].clear()
    original, trl_utils._ChunkedLogProbFunction = trl_utils._ChunkedLogProbFunction, Float64Head
    loss = trainer.compute_loss(policy, batch)
    loss.backward()
    trl_utils._ChunkedLogProbFunction = original
    assert loss.dtype == torch.float64 and math.isclose(fused, loss.item(), rel_tol=1e-5)
    gradients = {name: p.grad.flatten() for name, p in policy.named_parameters()}
    return {
        "name": f"{architecture}, {attention} attention, beta {beta}",
        "architecture": architecture,
        "attention": attention,
        "config": config,
        "parameters": names,
        "beta": beta,
        "pairs": PAIRS,
        "loss": loss.item(),
        "metrics": averages(trainer, (*REWARDS, "logps/chosen", "logps/rejected")),
        "fused_head_loss": fused,
        "grad_norm": torch.cat(list(gradients.values())).norm().item(),
        "gradients": {
            name: {"norm": g.norm().item(), "entries": [g[k].item() for k in (0, len(g) // 3, 2 * len(g) // 3, -1)]}
            for name, g in gradients.items()
        },
    }


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        golden = {
            "made_with": {m.__name__: m.__version__ for m in (trl, transformers, torch)},
            "losses": [loss_case(folder, beta, e) for beta in (0.05, 0.1, 0.5) for e in (0.0, 0.1)],
            "models": [
                model_case(folder, "llama", "eager", LLAMA, 0.1),
                model_case(folder, "gpt2", "sdpa", GPT2, 0.5),
            ],
        }
    path = Path(__file__).with_name("dpo.json")
    path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {len(golden['losses'])} losses, {len(golden['models'])} models")


if __name__ == "__main__":
    main()
