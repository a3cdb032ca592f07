# SPDX-License-Identifier: MIT
"""Mythos under PyTorch's own engines, and under any configuration. Docstrings name the mistakes.

What does not compose, as far as tried with torch 2.13: `torch.func.vmap` (the check of token ids
reads their values, and so does the sorting of experts), forward-mode AD (F.grouped_mm has none).
"""

import copy

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from experiments.bench import bytes_kept
from mythos import MythosConfig, RecurrentDepthTransformer, num_params
from test_mythos import on_each_device

__all__ = ["on_each_device"]  # a fixture
torch.set_num_threads(1)
SMALL = dict(vocab_size=37, d_model=32, max_seq_len=48, max_loop_iters=2, n_heads=4, n_kv_heads=2)
SMALL |= dict(d_ff=48, num_experts=4, d_expert=16)
OPTIONS = dict(), dict(attention_type="gqa"), dict(num_experts=0)
each = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch.compiler.reset()


def make(**options) -> RecurrentDepthTransformer:
    torch.manual_seed(0)
    return RecurrentDepthTransformer(**(SMALL | options))


def ids(*shape):
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return torch.randint(37, shape, generator=generator)


def gradients(model, *args, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(*args, **kwargs)[1].backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.slow
@each
def test_compiles_without_a_graph_break(options):
    """Python in the loop that torch.compile cannot follow; fp32 experts of unknown shape."""
    model, tokens = make(**options), ids(2, 6)
    want = gradients(model, tokens, tokens, grad_loops=1)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager", fullgraph=True)  # fullgraph: a break is an error
    assert_close(gradients(compiled, tokens, tokens, grad_loops=1), want)
    with torch.no_grad():
        assert_close(compiled.eval()(tokens)[0], model.eval()(tokens)[0])


@pytest.mark.slow
@each
def test_decodes_compiled(options):
    """A graph break; a recompilation for each new token, behind 1, 2, 3 … cached ones, or for each
    length of a prompt; a length that is not known when compiling, where Python wants a number."""
    model, tokens, graphs = make(**options).eval(), ids(2, 12), []
    compiled = copy.deepcopy(model)
    compiled.compile(backend=lambda graph, _: (graphs.append(graph), graph)[1], fullgraph=True)
    with torch.no_grad():
        compiled(ids(3, 8))  # another shape: from now on shapes are left open
        for lengths in ([4, *[1] * 8], [9, 1, 1, 1], [7]):
            cache = model.new_cache(2, 13)
            chunks = tokens[:, : sum(lengths)].split(lengths, dim=1)
            logits = torch.cat([compiled(chunk, cache=cache)[0] for chunk in chunks], dim=1)
            assert_close(logits, model(tokens[:, : sum(lengths)])[0])
    assert len(graphs) == 3  # without a cache; a prompt of any length; one token behind any number


@pytest.mark.slow
@each
def test_compiled_code_computes_the_same(options):
    """Numbers that the compiler's own kernels, forward and backward, get wrong."""
    model, tokens = make(**options), ids(2, 6)
    want = gradients(model, tokens, tokens)
    model.compile(fullgraph=True)
    assert_close(gradients(model, tokens, tokens), want, atol=1e-5, rtol=1e-4)


class Checkpointed(RecurrentDepthTransformer):
    """Activation checkpointing over loops, as a user would add it: a loop keeps its input alone."""

    def step(self, *args):
        return checkpoint(super().step, *args, use_reentrant=False)


@each
def test_activation_checkpointing_over_loops(options):
    """A step with side effects: other gradients when run again. Memory that grows by more than
    the state with each loop."""
    plain, tokens = make(**options).train(), ids(2, 16)
    model = Checkpointed(plain.config).train()
    model.load_state_dict(plain.state_dict())
    want = gradients(plain, tokens, tokens, n_loops=4)
    assert_close(gradients(model, tokens, tokens, n_loops=4), want, rtol=0, atol=0)
    if plain.config.num_experts > 0:  # what is run twice is counted twice, for all experts alike
        assert torch.equal(model.update_router_bias(), 2 * plain.update_router_bias())
    for m in (plain, model):
        m.config = MythosConfig(**(SMALL | options | {"max_loop_iters": 4}))
    few, state = bytes_kept(model, tokens, None), tokens.numel() * 32 * 4
    for m in (plain, model):
        m.config = MythosConfig(**(SMALL | options | {"max_loop_iters": 12}))
    assert bytes_kept(model, tokens, None) - few <= 8 * 2 * state
    assert bytes_kept(plain, tokens, None) - few > 8 * 10 * state


@pytest.mark.slow
def test_compiles_with_activation_checkpointing():
    """An attribute set in the loop, which torch.compile refuses to run again in a backward; a load
    that is lost, or counted twice."""
    plain, tokens = make(prelude_layers=0, coda_layers=0, attention_type="gqa").train(), ids(2, 6)
    model = Checkpointed(plain.config).train()
    model.load_state_dict(plain.state_dict())
    model.compile(backend="aot_eager", fullgraph=True)
    assert_close(gradients(model, tokens, tokens), gradients(plain, tokens, tokens))
    assert torch.equal(model.update_router_bias(), plain.update_router_bias())


def test_compiled_blocks_serve_any_number_of_loops():
    """Something in a block that changes from loop to loop, with the number of loops, or of those
    with gradient: a graph for each. (The whole model needs one for each number; torch allows 8.)"""
    plain, tokens, graphs = make(recurrent_layers=2).train(), ids(2, 6), []

    def backend(graph, _):  # one for all blocks, as torch.compile's own is
        graphs.append(graph)
        return graph

    model = copy.deepcopy(plain)
    for block in model.recurrent:
        block.compile(backend=backend, fullgraph=True)
    for n_loops in range(1, 13):
        want = gradients(plain, tokens, tokens, n_loops=n_loops)
        assert_close(gradients(model, tokens, tokens, n_loops=n_loops), want)
    assert len(graphs) == 1
    gradients(model, tokens, tokens, n_loops=12, grad_loops=2)
    assert len(graphs) == 1


def test_accumulated_gradients_need_weights():
    """A loss that is no mean over its scored targets: by its share of them weighted, micro-batches
    give the gradient of the whole batch; a mean of means does not."""
    model, tokens, targets = make(), ids(4, 8), ids(4, 8).clone()
    targets[0, 2:] = targets[1, :7] = -100
    want, total = gradients(model, tokens, targets), (targets != -100).sum()
    parts = [*zip(tokens.split(2), targets.split(2), strict=True)]
    for weights in ([(t != -100).sum() / total for _, t in parts], [0.5, 0.5]):
        model.zero_grad()
        for weight, part in zip(weights, parts, strict=True):
            (weight * model(*part)[1]).backward()
        worst = max((p.grad - want[n]).abs().max() for n, p in model.named_parameters())
        assert worst > 1e-3 if weights == [0.5, 0.5] else worst < 1e-6


# ---- weights that are kept in another form than they are used in ----


@pytest.fixture
def alone():
    """This process as the only one of a group."""
    backend = "gloo" if torch.get_default_device().type == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["FSDP", "autocast", "narrow first parameter"])
@each
def test_cache_has_the_dtype_that_is_computed_in(options, how, alone):
    """A cache in the dtype of the first weight that is kept: it then refuses the rows that are
    computed in another, or rounds them to a quantised embedding's integers."""
    model, tokens = make(**options).eval(), ids(2, 9)
    if how == "FSDP":
        mesh = init_device_mesh(tokens.device.type, (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for part in [*model.prelude, *model.recurrent, *model.coda, model]:
            fully_shard(part, mesh=mesh, mp_policy=policy)
    if how == "narrow first parameter":
        table, model.embed = model.embed, nn.Module()
        model.embed.weight = nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False)
        model.embed.forward = lambda ids: table.weight[ids]
    autocast = torch.autocast(tokens.device.type, torch.bfloat16, enabled=how == "autocast")
    with torch.no_grad(), autocast:
        cache = model.new_cache(2, 9)  # before FSDP has run: from the weights that it keeps
        assert model.generate(tokens[:, :3], 6).shape == (2, 9)
        parts = [model(t, cache=cache)[0] for t in tokens.split([4, 1, 1, 3], dim=1)]
        want = model(tokens)[0].float()
    exact = how == "narrow first parameter"
    atol = 1e-5 if exact else 0.02 * want.abs().max().item()
    assert_close(torch.cat(parts, dim=1).float(), want, rtol=0, atol=atol)
    assert cache.rows.dtype == (torch.float32 if exact else torch.bfloat16)


@each
def test_functional_gradient(options):
    """A model that torch.func cannot call without its own parameters. (In eval mode: in training
    the experts count their load in place, which torch.func forbids.)"""
    model, tokens = make(**options).eval(), ids(2, 6)
    want, parameters = gradients(model, tokens, tokens), dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (tokens, tokens))[1]

    assert_close(torch.func.grad(loss)({k: p.detach() for k, p in parameters.items()}), want)


@pytest.mark.slow
@each
def test_export(options):
    """A forward that only Python can run."""
    model, tokens = make(**options).eval(), ids(2, 6)
    program = torch.export.export(model, (tokens,), {"n_loops": 3})
    other = (tokens + 1) % 37
    assert_close(program.module()(other, n_loops=3)[0], model(other, n_loops=3)[0])


def test_state_dict_is_complete_and_casts_back():
    """A buffer that a checkpoint forgets, or that a cast to bf16 and back turns into another."""
    model, other = make(), make()
    model.train()(ids(2, 6), ids(2, 6))
    model.update_router_bias(0.5)
    for p in other.parameters():
        p.data.zero_()
    assert not other.load_state_dict(model.state_dict()).missing_keys
    assert_close(other.eval()(ids(2, 6))[0], model.eval()(ids(2, 6))[0], rtol=0, atol=0)
    back = copy.deepcopy(model).bfloat16().float()
    assert all(b.dtype == a.dtype for a, b in zip(model.buffers(), back.buffers(), strict=True))


# ---- any configuration ----

widths = st.one_of(st.none(), st.sampled_from([0, 2, 3, 4, 6, 8, 12, 16]))
FIELDS = dict(
    vocab_size=st.integers(0, 40), d_model=st.sampled_from([0, 8, 12, 16, 24, 32]),
    max_seq_len=st.integers(0, 12), prelude_layers=st.integers(-1, 2),
    recurrent_layers=st.integers(-1, 2), coda_layers=st.integers(-1, 2),
    max_loop_iters=st.integers(-1, 4),
    spectral_radius_target=st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.95, 1.0])),
    attention_type=st.sampled_from(["mla", "gqa", "MLA", ""]), n_heads=st.integers(0, 5),
    head_dim=widths, n_kv_heads=widths, kv_lora_rank=widths, q_lora_rank=widths,
    rope_theta=st.sampled_from([1.0, 100.0, 1e6, -1.0]), d_ff=widths,
    num_experts=st.integers(-1, 5), num_experts_per_token=st.integers(0, 5),
    num_shared_experts=st.integers(-1, 2), d_expert=widths, norm_eps=st.sampled_from([1e-6, 0.0]),
    embed_norm=st.sampled_from([True, False, 1]),
)  # fmt: skip
OK = dict(vocab_size=9, d_model=16, max_seq_len=8, n_heads=2, max_loop_iters=2)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(fields=st.fixed_dictionaries({}, optional=FIELDS))
@example(fields={})
@example(fields=dict(vocab_size=1, max_seq_len=1, prelude_layers=0, coda_layers=0))
@example(fields=dict(recurrent_layers=0, num_experts=0, max_loop_iters=0))
def test_a_config_is_refused_at_construction_or_works(fields):
    """A combination of fields that fails later: in forward, backward, or when it generates."""
    try:
        config = MythosConfig(**(OK | fields))
    except ValueError as refused:
        assert ": got " in str(refused) and ", expected " in str(refused)
        return
    torch.manual_seed(0)
    model = RecurrentDepthTransformer(config).train()
    assert num_params(model) == sum(x.numel() for x in model.parameters()) + (
        config.num_experts * config.recurrent_layers
    )
    T = min(3, config.max_seq_len)
    tokens = torch.randint(config.vocab_size, (2, T))
    logits, loss = model(tokens, tokens)
    loss.backward()
    assert logits.isfinite().all() and loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    new = model.generate(tokens, config.max_seq_len - T, halt_threshold=0.3)
    assert new.shape == (2, config.max_seq_len) and (new < config.vocab_size).all()
