"""What 4 and 8 bits cost in bytes and in accuracy: counts of one layer of an 8 B Llama, and distances on real text.

python benchmarks/quantised.py --model tiny-imdb --data imdb/test.jsonl.gz
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from prefopt.data.comparisons import open_comparisons
from prefopt.data.files.sources import find_sources
from prefopt.data.group import Group
from prefopt.data.tokenizer import load_tokenizer
from prefopt.model.load import load_model
from prefopt.model.packing import packed_batches
from prefopt.model.quantised import bytes_held, dequantised
from prefopt.model.scorer import Scorer

CPU = torch.device("cpu")
# Rows and columns of the linear layers in one block of Llama 3 8B, which has 32 blocks; other weights, in bfloat16.
LLAMA_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
BLOCKS, OTHERS = 32, 2 * 128_256 * 4096 + 65 * 4096


def count_bytes() -> None:
    """Quantise every linear layer of one block, and count."""
    held = {"bfloat16": 0, "int8": 0, "nf4": 0}
    for rows, columns in LLAMA_8B:
        weight = torch.randn(rows, columns, dtype=torch.bfloat16)
        held["bfloat16"] += weight.nbytes
        eight = Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        four = Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=True)
        for name, layer in (("int8", eight), ("nf4", four)):
            layer.load_state_dict({"weight": weight})
            held[name] += bytes_held(layer.to("cpu"))
    weights = sum(rows * columns for rows, columns in LLAMA_8B)
    for name, count in held.items():
        whole = BLOCKS * count + 2 * OTHERS
        print(f"{name}: {8 * count / weights:.3f} bits a weight, {whole / 1e9:.2f} GB for all weights of an 8 B Llama")


def measure_distance(name: str, data: str, rows: int) -> None:
    """Root mean square difference of a token's log-probability from float32, and of weights, on real text."""
    tokenizer = load_tokenizer(name)
    (source,) = find_sources([data])
    texts = [row.responses[0].text for row, _ in zip(open_comparisons(source), range(rows), strict=False)]
    ids = [np.asarray(tokenizer(text)["input_ids"][:256]) for text in texts]
    groups = [Group.from_sequences([(x, np.arange(len(x)) > 0)], row=i) for i, x in enumerate(ids)]
    found = {}
    for how in ("none", "int8", "nf4"):
        model = load_model(name, dtype=torch.float32, device=CPU, quantise=how)
        if how == "none":
            exact = {n: p.detach() for n, p in model.named_parameters()}
        else:
            layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (Linear4bit, Linear8bitLt))]
            errors = [float((dequantised(m) - (w := exact[f"{n}.weight"])).norm() / w.norm()) for n, m in layers]
        scorer = Scorer(model)
        with torch.no_grad():
            batches = packed_batches(groups, scorer.layout, 2048, CPU)
            found[how] = torch.cat([scorer(batch) for batch in batches]).double()
        if how != "none":
            apart = float((found[how] - found["none"]).square().mean().sqrt())
            mean = -float(found[how].mean())
            print(f"{how}: weights {np.mean(errors):.4f} of their norm away,")
            print(f"  log-probabilities {apart:.4f} nats per token;")
            print(f"  {mean:.4f} nats per token on average, {-float(found['none'].mean()):.4f} before")
    print(f"({len(found['none'])} tokens of {len(groups)} texts)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a small model")
    parser.add_argument("--data", help="texts of any layout")
    parser.add_argument("--rows", type=int, default=64)
    given = parser.parse_args()
    count_bytes()
    if given.model and given.data:
        measure_distance(given.model, given.data, given.rows)


if __name__ == "__main__":
    main()
