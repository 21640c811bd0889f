"""The GPT against the book's figures and the book's architecture written out again."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pygpt import GPT, GPTConfig
from pygpt.kv_cache import KVCache

pytestmark = pytest.mark.usefixtures("one_thread")

BOOK = {"vocab_size": 50257, "context_length": 1024, "drop_rate": 0.1, "qkv_bias": False}


def meta_model(name: str, **changes: object) -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig.preset(name, **{**BOOK, **changes}))


@pytest.mark.parametrize(
    ("name", "untied", "tied"),
    [
        ("gpt2", 163_009_536, 124_412_160),
        ("gpt2-medium", 406_212_608, 354_749_440),
        ("gpt2-large", 838_220_800, 773_891_840),
        ("gpt2-xl", 1_637_792_000, 1_557_380_800),
    ],
)
def test_parameter_counts_are_the_books(name: str, untied: int, tied: int) -> None:
    assert meta_model(name, tie_weights=False).num_params == untied
    assert meta_model(name, tie_weights=True).num_params == tied


def test_gpt2_small_and_its_parts_have_the_published_sizes() -> None:
    assert meta_model("gpt2", qkv_bias=True).num_params == 124_439_808
    block = meta_model("gpt2").blocks[0]
    assert sum(p.numel() for p in block.ff.parameters()) == 4_722_432
    assert sum(p.numel() for p in block.att.parameters()) == 2_360_064


def books_logits(model: GPT, ids: Tensor) -> Tensor:
    """The book's chapter 4, spelled out with three projections and an explicit mask."""
    config, state = model.config, model.state_dict()
    T, C, H = ids.shape[1], config.emb_dim, config.n_heads

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        scale, shift = state[f"{name}.weight"], state[f"{name}.bias"]
        return scale * (x - mean) / torch.sqrt(var + 1e-5) + shift

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = state["tok_emb.weight"][ids] + state["pos_emb.weight"][torch.arange(T)]
    for layer in range(config.n_layers):
        at = f"blocks.{layer}"
        q, k, v = linear(norm(x, f"{at}.norm1"), f"{at}.att.qkv").split(C, dim=-1)
        q, k, v = (y.view(len(ids), T, H, C // H).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(C // H)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(ids), T, C)
        x = x + linear(context, f"{at}.att.out")
        x = x + linear(gelu(linear(norm(x, f"{at}.norm2"), f"{at}.ff.up")), f"{at}.ff.down")
    return norm(x, "final_norm") @ state.get("out_head.weight", state["tok_emb.weight"]).T


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_logits_are_those_of_the_books_architecture(tie_weights: bool, qkv_bias: bool) -> None:
    torch.manual_seed(1)
    config = GPTConfig(61, 24, 32, 4, 2, 0.1, qkv_bias=qkv_bias, tie_weights=tie_weights)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    ids = torch.randint(61, (3, 24))
    torch.testing.assert_close(model(ids), books_logits(model, ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("init_std", [0.02, 0.08])
def test_initialisation_is_gpt2s(init_std: float) -> None:
    torch.manual_seed(2)
    model = GPT(GPTConfig(500, 100, 128, 4, 8, qkv_bias=True, init_std=init_std))
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            residual = name.endswith(("att.out.weight", "ff.down.weight"))
            std = init_std / 4 if residual else init_std
            assert abs(p.std() / std - 1) < 0.03 and abs(p.mean()) < std / 20, name


def test_loss_is_the_mean_over_targets_that_count(tiny_model: GPT) -> None:
    torch.manual_seed(3)
    ids, targets = torch.randint(61, (2, 9)), torch.randint(61, (2, 9))
    targets[0, 2:] = -100
    each = -tiny_model(ids).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    each = each * (targets != -100)
    torch.testing.assert_close(tiny_model.loss(ids, targets, reduction="none"), each)
    torch.testing.assert_close(tiny_model.loss(ids, targets, reduction="sum"), each.sum())
    torch.testing.assert_close(tiny_model.loss(ids, targets), each.sum() / (targets != -100).sum())


def test_gradients_reach_every_parameter(tiny_model: GPT) -> None:
    ids = torch.arange(48).view(2, 24)
    tiny_model.loss(ids, ids).backward()
    for name, p in tiny_model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@torch.no_grad()
def test_cached_pieces_give_what_the_whole_gives(tiny_model: GPT) -> None:
    ids = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(4))
    cache = KVCache(tiny_model.config, 2)
    pieces = [
        tiny_model(ids[:, a:b], cache) for a, b in [(0, 7), (7, 8), (8, 9), (9, 15), (15, 24)]
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), tiny_model(ids))


@torch.no_grad()
def test_rows_of_different_lengths_in_one_cache_are_independent(tiny_model: GPT) -> None:
    ids = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(5))
    lengths = [4, 11, 7]
    cache = KVCache(tiny_model.config, 3)
    padded = ids[:, :11].clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = 60
    tiny_model(padded, cache)
    cache.trim(lengths)
    for new in (1, 3, 1):
        piece = torch.stack([ids[row, n : n + new] for row, n in enumerate(cache.lengths)])
        got = tiny_model(piece, cache)
        for row, n in enumerate(cache.lengths):
            whole = tiny_model(ids[row : row + 1, :n])
            torch.testing.assert_close(got[row], whole[0, -new:])
    cache.keep([2, 0])
    assert cache.lengths == [12, 9]
    alone = KVCache(tiny_model.config, 1)
    tiny_model(ids[1:2, :3], alone)
    cache.replace(0, alone)
    got = tiny_model(torch.stack([ids[1, 3:4], ids[0, 9:10]]), cache)
    torch.testing.assert_close(got[0, -1], tiny_model(ids[1:2, :4])[0, -1])
    torch.testing.assert_close(got[1, -1], tiny_model(ids[0:1, :10])[0, -1])


@torch.no_grad()
def test_packed_documents_give_what_each_gives_alone(tiny_model: GPT) -> None:
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(6))
    documents = torch.tensor([[0] * 5 + [1] * 7, [3] * 1 + [4] * 8 + [7] * 3], dtype=torch.int32)
    packed = tiny_model.hidden(ids, document_ids=documents)
    for row, pieces in enumerate([(5, 7), (1, 8, 3)]):
        alone = [tiny_model.hidden(piece[None])[0] for piece in ids[row].split(pieces)]
        torch.testing.assert_close(packed[row], torch.cat(alone))


def test_dropout_acts_in_training_only(tiny_config: GPTConfig) -> None:
    torch.manual_seed(7)
    model = GPT(GPTConfig(**{**tiny_config.to_dict(), "drop_rate": 0.5}))
    ids = torch.arange(24)[None]
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_autocast_and_half_precision_stay_close(tiny_model: GPT) -> None:
    ids = torch.arange(24)[None]
    exact = tiny_model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert (tiny_model(ids) - exact).abs().max() < 0.05 * exact.abs().max()
    got = tiny_model.bfloat16()(ids)
    assert got.dtype == torch.bfloat16
    assert (got - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "at least one token, got (1, 0)"),
        (torch.zeros(3, dtype=torch.long), "ids must be (B, T)"),
        (torch.zeros(1, 3), "int32 or int64, got torch.float32"),
        (torch.zeros(1, 25, dtype=torch.long), "25 tokens exceed the context_length 24"),
        (torch.tensor([[0, 61]]), "id 61 is outside the vocabulary of 61"),
        (torch.tensor([[0, -1]]), "id -1 is outside the vocabulary of 61"),
    ],
)
def test_bad_ids_are_refused_by_name(tiny_model: GPT, ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model(ids)


def test_a_full_cache_and_other_misuse_are_refused(tiny_model: GPT) -> None:
    ids = torch.zeros(1, 10, dtype=torch.long)
    cache = KVCache(tiny_model.config, 1, capacity=12)
    tiny_model(ids, cache)
    with pytest.raises(ValueError, match="the cache holds 10 of at most 12 tokens; 10 more"):
        tiny_model(ids, cache)
    with pytest.raises(ValueError, match="ids have 2 rows, the cache 1"):
        tiny_model(ids[:, :1].repeat(2, 1), cache)
    with pytest.raises(ValueError, match="cannot trim"):
        cache.trim([11])
    with pytest.raises(ValueError, match="document_ids must be int32"):
        tiny_model.hidden(ids, document_ids=ids)
    with pytest.raises(ValueError, match="cannot be used together"):
        tiny_model.hidden(ids[:, :1], cache, document_ids=torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="equal shapes"):
        tiny_model.loss(ids, ids[:, 1:])


def test_repr_and_flops_say_what_the_model_costs() -> None:
    model = meta_model("gpt2", qkv_bias=True)
    text = repr(model)
    assert "124,439,808 parameters" in text and "497.8 MB of float32 on meta" in text
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() == 2 and "pos_emb" not in name  # the tied embedding is the head's matrix
    )
    attention = 12 * 2 * 2 * 768 * sum(range(1, 101)) / 100
    assert model.flops_per_token(100) == 2 * matrices + attention


def test_modules_are_plain_and_can_be_traversed(tiny_model: GPT) -> None:
    linears = {n for n, m in tiny_model.named_modules() if isinstance(m, nn.Linear)}
    assert "blocks.1.att.qkv" in linears and "out_head" in linears and len(linears) == 9
    assert F.linear(
        tiny_model.hidden(torch.zeros(1, 1, dtype=torch.long)), tiny_model.head_weight
    ).shape == (1, 1, 61)


def test_the_whole_step_compiles_into_one_graph(tiny_model: GPT) -> None:
    ids = torch.arange(24)[None]
    torch._dynamo.reset()
    compiled = torch.compile(tiny_model.loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, ids), tiny_model.loss(ids, ids))


def test_torch_func_differentiates_a_model_as_autograd_does():
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 16, 32, 2, 2, 0.0, tie_weights=True))
    ids, targets = torch.randint(0, 50, (2, 3, 16)).unbind()

    def loss(parameters, ids, targets):
        logits = torch.func.functional_call(model, parameters, (ids,))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    parameters = {name: x.detach() for name, x in model.named_parameters()}
    found = torch.func.grad(loss)(parameters, ids, targets)
    model.loss(ids, targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
