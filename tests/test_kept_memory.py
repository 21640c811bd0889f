"""ops.keep_memory: blocks for large results, which neither overlap nor grow from step to step."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import pygpt
from pygpt import _native, ops
from pygpt.ops.native import empty


@pytest.fixture(autouse=True)
def kept():
    ops.keep_memory()


@pytest.mark.parametrize("seed", range(3))
def test_blocks_do_not_overlap(seed):
    choose, like, live = random.Random(seed), torch.empty(0), []
    for number in range(400):
        if live and choose.random() < 0.5:
            tensor, value = live.pop(choose.randrange(len(live)))
            assert bool((tensor == value).all())
            del tensor
        else:
            shape = (choose.randrange(1, 40), choose.randrange(1 << 14, 1 << 16))
            dtype = choose.choice((torch.float32, torch.bfloat16, torch.float16))
            tensor = empty(like, shape, dtype)
            assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
            assert tensor.data_ptr() % 64 == 0
            live.append((tensor.fill_(number % 256), number % 256))
    assert all(bool((tensor == value).all()) for tensor, value in live)


def test_a_freed_block_is_given_again():
    like, shape = torch.empty(0), (1 << 20,)
    places = set()
    for _ in range(50):
        places.add(empty(like, shape).data_ptr() // 4096)
    assert len(places) == 1


def test_a_tensor_that_nobody_made_gives_its_block_back():
    before = empty(torch.empty(0), (1 << 20,)).data_ptr() // 4096
    for _ in range(3):
        _native.empty(0, (1 << 20,))
    assert empty(torch.empty(0), (1 << 20,)).data_ptr() // 4096 == before


def test_small_and_other_tensors_are_torchs():
    for shape, dtype in (((10,), torch.float32), ((1 << 20,), torch.float64), ((0,), None)):
        assert empty(torch.empty(0), shape, dtype).shape == shape


def test_more_than_the_machine_has_is_torchs_own_error():
    with pytest.raises(RuntimeError, match=r"memory|allocate"):
        empty(torch.empty(0), (1 << 60,))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("bf16", [False, True])
def test_training_steps_need_no_more_memory_than_the_first_two(bf16):
    torch.manual_seed(0)
    model = pygpt.GPT(pygpt.GPTConfig(2000, 128, 192, 3, 3, 0.0, tie_weights=True))
    ids, targets = torch.randint(0, 2000, (2, 8, 128)).unbind()

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def step():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.loss(ids, targets)
        loss.backward()

    for _ in range(3):
        step()
    before = resident()
    for _ in range(5):
        step()
    assert resident() - before < 20e6
