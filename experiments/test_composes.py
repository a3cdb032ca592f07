# SPDX-License-Identifier: MIT
"""Mythos under PyTorch's own engines, and under any configuration. Docstrings name the mistakes."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mythos import MythosConfig, RecurrentDepthTransformer, loop_gain
from test_mythos import ids, make, on_each_device, spy

__all__ = ["on_each_device"]  # a fixture
each = pytest.mark.parametrize("options", [{}, dict(attention_type="gqa", num_experts=0)], ids=str)


def gradients(model, *args, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(*args, **kwargs)[1].backward()
    return {name: p.grad for name, p in model.named_parameters()}


def counting():
    """A backend for torch.compile that changes nothing, and the list of the graphs it got."""
    torch.compiler.reset()
    graphs = []
    return lambda graph, _: (graphs.append(graph), graph)[1], graphs


@pytest.mark.slow
@each
def test_decodes_compiled(options):
    """A recompilation for each new token, behind 1, 2, 3 … cached ones, or for each length of a
    prompt; a length that is not known when compiling, where Python wants a number."""
    model, tokens, (backend, graphs) = make(**options), ids(2, 12), counting()
    compiled = copy.deepcopy(model)
    compiled.compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(ids(3, 8))  # another shape: from now on shapes are left open
        for lengths in ([4, *[1] * 8], [9, 1, 1, 1], [7]):
            cache = model.new_cache(2, 13)
            chunks = tokens[:, : sum(lengths)].split(lengths, dim=1)
            logits = torch.cat([compiled(chunk, cache=cache)[0] for chunk in chunks], dim=1)
            assert_close(logits, model(tokens[:, : sum(lengths)])[0])
    assert len(graphs) == 3  # without a cache; a prompt of any length; one token behind any number


def test_compiled_blocks_serve_any_number_of_loops():
    """A block that changes with the loop, or with the number of loops: a graph for each."""
    plain, tokens, (backend, graphs) = make().train(), ids(2, 6), counting()
    model = copy.deepcopy(plain)
    model.recurrent[0].compile(backend=backend, fullgraph=True)
    for how in (dict(n_loops=1), dict(n_loops=2), dict(n_loops=9), dict(n_loops=9, grad_loops=2)):
        assert_close(*(gradients(m, tokens, tokens, **how) for m in (model, plain)))
    assert len(graphs) == 1
    torch.compiler.reset()
    model = make(num_experts=0)
    model.recurrent[0].compile(backend="aot_eager")
    gradients(model, tokens, tokens)  # from now on its backward frees what it has used
    assert loop_gain(model, tokens, iterations=3) > 0


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_activation_checkpointing_over_loops(compiled):
    """A step with side effects: other gradients when run again; a load that is lost. What
    torch.compile cannot follow, or refuses to run again."""
    plain = make(fresh=True, prelude_layers=0, coda_layers=0, attention_type="gqa").train()
    tokens = ids(2, 6)
    model = copy.deepcopy(plain)
    model.step = partial(checkpoint, model.step, use_reentrant=False)  # keeps a loop's input alone
    if compiled:
        model.compile(backend="aot_eager", fullgraph=True)  # fullgraph: a break is an error
    want, got = (gradients(m, tokens, tokens, n_loops=2) for m in (plain, model))
    assert_close(got, want, atol=1e-5, rtol=1e-4)
    times = 1 if compiled else 2  # what is run twice is counted twice, unless compiled
    assert torch.equal(model.update_router_bias(), times * plain.update_router_bias())


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "FSDP"])
@each
def test_low_precision(options, how, monkeypatch, request):
    """fp32 numbers that meet bf16 layers, or bf16 ones fp32 layers (flaw 8); experts in slow fp32,
    or one by one (13); a cache in the dtype of the weights that are kept, not of the rows."""
    model, tokens = make(**options, num_experts_per_token=4), ids(2, 9)  # all: no choice may flip
    want, _ = model(tokens)
    model.train().to(torch.bfloat16 if how == "bfloat16" else torch.float32)
    if how == "FSDP":  # this process is the only one of a group
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        request.addfinalizer(dist.destroy_process_group)
        mesh = dist.init_device_mesh(tokens.device.type, (1,))
        for part in [*model.prelude, *model.recurrent, *model.coda, model]:
            fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    products = spy(monkeypatch, torch.nn.functional, "grouped_mm")
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=how == "autocast"):
        cache = model.new_cache(2, 9)  # before FSDP has run: from the weights that it keeps
        logits, loss = model(tokens, tokens)
        # Two products in each of 3 loops.
        assert [x.dtype for (x, _), _ in products] == [torch.bfloat16] * (0 if options else 6)
        assert model.generate(tokens[:, :3], 6, halt_threshold=0.2).shape == (2, 9)
        parts = [model.eval()(x, cache=cache)[0] for x in tokens.split([4, 1, 1, 3], dim=1)]
    assert logits.dtype == cache.rows.dtype == torch.bfloat16 and loss.dtype == torch.float32
    got = torch.stack([logits, torch.cat(parts, dim=1)]).float()
    assert (got - want).norm() < 0.04 * want.norm()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert how == "FSDP" or 0 < loop_gain(model, tokens) < 10


def test_copies_and_checkpoints():
    """A function stored on a module makes deepcopy share its weights (flaw 24); a table lost in
    to_empty (7); a buffer that a checkpoint forgets, or that a cast turns into another."""
    model, tokens = make(), ids(1, 6)
    want, twin, saved = model(tokens)[0], copy.deepcopy(model), copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.data.zero_()
    assert torch.equal(twin(tokens)[0], want) and not torch.equal(model(tokens)[0], want)
    with torch.device("meta"):
        other = RecurrentDepthTransformer(model.config)
        assert other(tokens.to("meta"), n_loops=2)[0].shape == (1, 6, 37)  # shapes alone
    other.to_empty(device=tokens.device).init_weights()
    other.load_state_dict(saved)
    assert torch.equal(other(tokens)[0], want)
    assert other.bfloat16().float().recurrent[0].ffn.load.dtype == torch.int64


widths = [None, 2, 3, 4, 6, 8, 12, 16]
FIELDS = dict(  # values that are possible, each by itself
    vocab_size=[1, 40], d_model=[8, 12, 16, 24, 32], max_seq_len=[1, 2, 12], embed_norm=[False],
    prelude_layers=[0, 1, 2], recurrent_layers=[0, 1, 2], coda_layers=[0, 1, 2],
    max_loop_iters=[0, 1, 4], spectral_radius_target=[None, 0.1], attention_type=["gqa"],
    n_heads=[1, 2, 3, 4, 5], head_dim=widths, n_kv_heads=widths, kv_lora_rank=widths,
    q_lora_rank=widths, rope_theta=[1.0, 1e6], d_ff=widths, num_experts=[0, 1, 2, 5],
    num_experts_per_token=[1, 3, 5], num_shared_experts=[0, 2], d_expert=widths, norm_eps=[0.0],
)  # fmt: skip
OK = dict(vocab_size=9, d_model=16, max_seq_len=8, n_heads=2, max_loop_iters=2)


@settings(max_examples=60)  # else as in test_mythos.py
@given(st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in FIELDS.items()}))
@example(dict(vocab_size=1, max_seq_len=1, prelude_layers=0, recurrent_layers=0, coda_layers=0))
def test_a_config_is_refused_at_construction_or_works(fields):
    """A combination of fields that fails later: in forward, backward, or when it generates."""
    try:
        config = MythosConfig(**(OK | fields))
    except ValueError as refused:
        assert ": got " in str(refused) and ", expected " in str(refused)
        return
    model = RecurrentDepthTransformer(config).train()
    tokens = torch.randint(config.vocab_size, (2, min(3, config.max_seq_len)))
    logits, loss = model(tokens, tokens)
    loss.backward()
    assert logits.isfinite().all() and loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    new = model.generate(tokens, config.max_seq_len - tokens.shape[1], halt_threshold=0.3)
    assert new.shape == (2, config.max_seq_len) and (new < config.vocab_size).all()
