"""ops.tied_embedding: one gradient for a matrix that embeds the ids and is the head."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pygpt import ops


def losses(weight, ids, targets, *, tied):
    rows, head = ops.tied_embedding(ids, weight) if tied else (F.embedding(ids, weight), weight)
    return ops.linear_cross_entropy(rows.flatten(0, 1).sin(), head, targets, impl="native")


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=g, requires_grad=True)
    ids = torch.randint(0, 7, (3, 20), generator=g)  # each id several times
    return weight, ids, torch.randint(0, 50, (60,), generator=g)


def test_the_gradient_is_that_of_embedding_and_head_added_up(inputs):
    (theirs,) = torch.autograd.grad(losses(*inputs, tied=False), inputs[0])
    (ours,) = torch.autograd.grad(losses(*inputs, tied=True), inputs[0])
    torch.testing.assert_close(ours, theirs)


def test_a_kept_graph_gives_the_same_gradient_again(inputs):
    loss = losses(*inputs, tied=True)
    first, second = (torch.autograd.grad(loss, inputs[0], retain_graph=True)[0] for _ in "12")
    assert torch.equal(first, second)


def test_the_heads_gradient_is_added_to_and_not_copied(inputs):
    loss = losses(*inputs, tied=True)
    loss.backward()
    loss = losses(*inputs, tied=True)
    with torch.autograd.profiler.profile() as profile:
        torch.autograd.grad(loss, inputs[0])
    names = {event.name for event in profile.function_events}
    assert not names & {"aten::clone", "aten::embedding_dense_backward"}


def test_without_gradients_it_is_the_embedding(inputs):
    weight, ids, _ = inputs
    with torch.no_grad():
        rows, head = ops.tied_embedding(ids, weight)
    assert torch.equal(rows, weight[ids]) and head is weight
