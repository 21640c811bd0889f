"""ops.sample: the same token from every backend and instruction set, and the right one."""

from __future__ import annotations

import os

import pytest
import torch

from pygpt import ops

TOY = torch.tensor([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])  # the book's
BACKENDS = ("native", "torch", "reference")
SOAK = int(os.environ.get("PYGPT_SOAK", "1"))


def draw_all(logits, n=20_000, **settings):
    """Tokens of one row of logits for n evenly spaced uniforms."""
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return ops.sample(logits.expand(n, -1), uniforms=uniforms, **settings)


def shares(logits, **settings):
    """Share of each token among evenly spaced uniforms."""
    tokens = draw_all(logits, **settings)
    return torch.bincount(tokens, minlength=logits.shape[1]).double() / len(tokens)


@pytest.mark.parametrize("seed", range(60 * SOAK))
def test_native_torch_and_reference_give_the_same_tokens(seed):
    g = torch.Generator().manual_seed(seed)
    rows, vocab = 3, int(torch.randint(1, 600, (), generator=g))
    spread = 10.0 ** float(torch.randn((), generator=g))
    logits = torch.randn(rows, vocab, generator=g) * spread
    if seed % 3 == 0:
        logits = logits.round()  # ties, and -0 beside 0
    if seed % 5 == 0:
        logits[torch.rand(logits.shape, generator=g) < 0.4] = -torch.inf
        logits[:, -1] = 1.0
    logits = logits.to((torch.float32, torch.bfloat16, torch.float16)[seed % 3])
    settings = {
        "temperature": torch.rand(rows, generator=g) * 3 + 0.01,
        "top_k": torch.randint(0, vocab + 3, (rows,), generator=g) if seed % 2 else 0,
        "top_p": torch.rand(rows, generator=g) if seed % 3 else 1.0,
        "min_p": torch.rand(rows, generator=g) * 0.3 if seed % 4 == 0 else 0.0,
    }
    if seed % 4 == 1:
        settings |= {
            "history": torch.randint(-1, vocab, (rows, 9), generator=g),
            "repetition_penalty": torch.rand(rows, generator=g) + 0.7,
            "presence_penalty": 0.2,
            "frequency_penalty": torch.rand(rows, generator=g),
        }
    if seed % 7 == 1:
        settings["logit_bias"] = torch.randn(rows, vocab, generator=g)
    uniforms = torch.rand(rows, generator=g, dtype=torch.float64)
    native, by_torch, twin = (
        ops.sample(logits, uniforms=uniforms, impl=impl, **settings).tolist() for impl in BACKENDS
    )
    assert native == twin
    assert by_torch == twin


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 50},
        {"top_k": 700, "min_p": 0.02},
        {"top_k": 5000, "top_p": 0.7},
        {"top_p": 0.9},
        {"top_p": 0.3, "temperature": 30.0},
        {"top_p": 0.999, "temperature": 0.2},
        {"min_p": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_equals_torch_at_the_size_of_gpt2s_vocabulary(settings, dtype):
    g = torch.Generator().manual_seed(3)
    logits = (torch.randn(2, 50257, generator=g) * 3).to(dtype)
    uniforms = torch.rand(2, generator=g, dtype=torch.float64)
    native = ops.sample(logits, uniforms=uniforms, impl="native", **settings)
    assert torch.equal(native, ops.sample(logits, uniforms=uniforms, impl="torch", **settings))


@pytest.mark.parametrize("impl", BACKENDS)
def test_the_books_toy_logits_give_pizza_its_probability(impl):
    n = 20_000 if impl != "reference" else 5_000
    got = draw_all(TOY, n, temperature=5.0, impl=impl)
    assert abs(float((got == 6).double().mean()) - 0.0430) < 2e-4


def test_shares_follow_the_softmax():
    torch.testing.assert_close(shares(TOY), TOY.double().softmax(1)[0], rtol=0, atol=2 / 20_000)


@pytest.mark.parametrize("impl", ["native", "torch"])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 63, 64, 65, 199])
def test_exactly_k_survive_and_ties_go_to_the_lowest_index(impl, k):
    logits = torch.zeros(1, 200)
    logits[0, 150], logits[0, 90] = 0.5, -0.0
    expected = sorted([150, *(i for i in range(200) if i != 150)][:k])
    got = draw_all(logits, 4000, top_k=k, impl=impl).unique().tolist()
    assert got == expected


def test_temperature_zero_takes_the_greatest_logit_at_the_lowest_index():
    logits = torch.tensor([[0.0, 2.0, -1.0, 2.0], [5.0, -torch.inf, 5.0, 0.0]])
    for impl in BACKENDS:
        assert ops.sample(logits, temperature=0.0, impl=impl).tolist() == [1, 0]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([[0.5, 0.1, 0.25, 0.15]]).log()
    assert draw_all(logits, top_p=0.5).unique().tolist() == [0]
    assert draw_all(logits, top_p=0.51).unique().tolist() == [0, 2]
    assert draw_all(logits, top_p=0.8).unique().tolist() == [0, 2, 3]
    assert draw_all(logits, top_p=0.0).unique().tolist() == [0]


def test_top_p_cuts_equal_logits_at_the_lowest_index():
    assert draw_all(torch.zeros(1, 100), top_p=0.25).unique().tolist() == list(range(25))


def test_min_p_compares_with_the_likeliest_token():
    logits = torch.tensor([[1.0, 0.5, 0.2, 0.1]]).log()
    assert draw_all(logits, min_p=0.3).unique().tolist() == [0, 1]
    assert draw_all(logits, min_p=1.0).unique().tolist() == [0]


def test_top_p_is_taken_of_what_top_k_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of two survivors the first has 4/7 = 0.57; of all four it has 0.4.
    assert draw_all(logits, top_k=2, top_p=0.5).unique().tolist() == [0]
    assert draw_all(logits, top_p=0.5).unique().tolist() == [0, 1]


def test_penalties_and_bias_change_the_shares_as_written():
    logits, bias = torch.tensor([[2.0, -1.0, 1.0]]), torch.tensor([0.0, 0.0, -0.5])
    history = torch.tensor([[0, 1, -1, 1]])
    got = shares(
        logits,
        logit_bias=bias,
        history=history.expand(20_000, -1),
        repetition_penalty=2.0,
        presence_penalty=0.1,
        frequency_penalty=0.25,
    )
    expected = torch.tensor([2 / 2 - 0.35, -1 * 2 - 0.6, 0.5]).double().softmax(0)
    torch.testing.assert_close(got, expected, rtol=0, atol=2 / 20_000)


def test_a_rows_token_does_not_depend_on_its_neighbours_or_on_threads():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 3000, generator=g)
    uniforms = torch.rand(9, generator=g, dtype=torch.float64)
    settings = {"top_k": torch.arange(1, 10) * 7, "top_p": 0.95}
    together = ops.sample(logits, uniforms=uniforms, **settings)
    alone = [
        ops.sample(logits[i : i + 1], uniforms=uniforms[i : i + 1], top_k=7 * (i + 1), top_p=0.95)
        for i in range(9)
    ]
    assert together.tolist() == [int(t) for t in alone]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(ops.sample(logits, uniforms=uniforms, **settings), together)
    finally:
        torch.set_num_threads(threads)


def test_any_strides_are_read():
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(500, 4, generator=g)
    uniforms = torch.rand(8, dtype=torch.float64, generator=g)[::2]
    expected = ops.sample(logits.t().contiguous(), uniforms=uniforms, impl="reference")
    assert torch.equal(ops.sample(logits.t(), uniforms=uniforms), expected)
    assert torch.equal(
        ops.sample(logits.t()[:, :499], uniforms=uniforms, top_k=499).ge(0).all(),
        torch.tensor(True),
    )


def test_a_generator_makes_it_repeatable():
    logits = torch.randn(4, 100)
    first, second, other = (
        ops.sample(logits.repeat(8, 1), generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_logprobs_are_those_of_the_model_alone():
    result = ops.sample(TOY, temperature=0.0, logit_bias=-TOY[0], n_logprobs=3)
    logprobs = TOY.log_softmax(1)[0]
    assert result.tokens.tolist() == [0]  # the bias made all equal
    torch.testing.assert_close(result.logprobs, logprobs[:1])
    assert result.top_tokens.tolist() == [[3, 7, 0]]
    torch.testing.assert_close(result.top_logprobs[0], logprobs[[3, 7, 0]])


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize(
    "bad",
    [[torch.nan, 1.0], [-torch.nan, 1.0], [torch.inf, 1.0], [-torch.inf, -torch.inf]],
    ids=str,
)
def test_a_row_without_a_distribution_is_refused(impl, bad):
    with pytest.raises(ValueError, match="row 1 of logits has NaN, \\+inf or no finite value"):
        ops.sample(torch.tensor([[0.0, 1.0], bad, [1.0, 2.0]]), impl=impl)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be in"),
        ({"temperature": torch.nan}, "temperature must be in"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"min_p": torch.tensor([0.1, 2.0])}, "min_p must be in"),
        ({"top_k": torch.tensor([1, 2, 3])}, r"top_k must be a number or of shape \(2,\)"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be in"),
        ({"logit_bias": torch.zeros(4)}, r"logit_bias must be of shape \(5,\) or \(2, 5\)"),
        ({"history": torch.tensor([[1], [5]])}, "history holds token 5"),
        ({"history": torch.tensor([1, 2])}, "history must be integers of shape"),
        ({"uniforms": torch.zeros(3)}, r"uniforms must be of shape \(2,\)"),
        ({"impl": "fast"}, "impl must be one of"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ops.sample(torch.zeros(2, 5), **settings)


def test_wrong_logits_are_named():
    with pytest.raises(ValueError, match="logits must be"):
        ops.sample(torch.zeros(5))
    with pytest.raises(ValueError, match="logits must be float32"):
        ops.sample(torch.zeros(1, 5, dtype=torch.float64))


def test_the_registered_op_is_sound():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 40, generator=g)
    uniforms = torch.rand(3, dtype=torch.float64, generator=g)
    parameters = torch.tensor([[1.0, 5, 0.9, 0.0, 1.1, 0.0, 0.0]], dtype=torch.float64)
    history = torch.randint(-1, 40, (3, 4), generator=g)
    arguments = (logits, uniforms, parameters, torch.zeros(3, 40), history)
    torch.library.opcheck(torch.ops.pygpt.sample.default, arguments)


def test_it_compiles_without_a_graph_break():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    uniforms = torch.tensor([0.1, 0.5, 0.9])

    def draw(logits, uniforms):
        return ops.sample(logits * 2, top_k=5, top_p=0.9, uniforms=uniforms)

    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(logits, uniforms), draw(logits, uniforms))
