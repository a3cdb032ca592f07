# SPDX-License-Identifier: MIT
"""The table that `python mythos.py` prints: every named size, counted on the meta device."""

from inspect import cleandoc

import torch

from experiments.command import say
from experiments.measure import (
    executed_params,
    flops_per_token,
    kv_bytes_per_token,
    num_params,
)
from mythos import SIZES, RecurrentDepthTransformer, get_model_config


class Shapes(RecurrentDepthTransformer):
    """A model to be counted on the meta device, where numbers drawn at random are slow nothings."""

    def init_weights(self) -> None:
        """No values, hence no initial ones."""


def print_sizes() -> None:
    """Mythos sizes. layers: prelude + recurrent × max loops + coda.

    active: parameters that one token uses; executed: with the loop's counted L times.
    cache: bytes per token at L loops in bf16. tokens: 20 per active parameter (Chinchilla);
    FLOPs: to train on them. Extrapolated: Parcae fitted its laws below 1.3e20 FLOPs.
    """
    say(cleandoc(print_sizes.__doc__) + "\n")
    line = "{:>5} {:>9} {:>9} {:>11}  {:<10} {:<11} {:>8} {:>10} {:>10} {:>7} {:>8}".format
    say(line(*"size total active executed layers experts context MLA-cache GQA-cache tokens "
              "FLOPs".split()))  # fmt: skip
    for name in SIZES:
        c = get_model_config(name)
        with torch.device("meta"):  # shapes without memory
            model = Shapes(c)
            gqa = Shapes(c, attention_type="gqa")
        active = num_params(model, active=True)
        scale, unit = (1e6, "M") if name == "tiny" else (1e9, "B")
        counts = (num_params(model), active, executed_params(model))
        counts = (f"{n / scale:.2f}{unit}" for n in counts)
        layers = f"{c.prelude_layers}+{c.recurrent_layers}×{c.max_loop_iters}+{c.coda_layers}"
        experts = f"{c.num_experts_per_token}/{c.num_experts} + {c.num_shared_experts}"
        caches = (f"{kv_bytes_per_token(m):,}" for m in (model, gqa))
        flops = 3 * flops_per_token(model, context=c.max_seq_len // 2) * 20 * active
        say(line(name, *counts, layers, experts, f"{c.max_seq_len:,}", *caches,
                 f"{20 * active / 1e9:.3g}B", f"{flops:.1e}"))  # fmt: skip
