"""Every foreign format: read as its makers write it, GGUF as gguf's own reader reads it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pygpt import GPT, GPTConfig, PygptError, Tokenizer, generate
from pygpt.cli import main
from pygpt.ops.native import crc32c
from pygpt.weights import convert, describe, read
from pygpt.weights.tensorflow_bundle import read_bundle
from tests.conftest import TEXT

pytestmark = pytest.mark.usefixtures("one_thread")

OPENAI = Path(__file__).parent / "fixtures" / "openai"
V, T, C, H, L = 61, 24, 32, 4, 2


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def random_gpt(**changes: Any) -> GPT:
    torch.manual_seed(0)
    model = randomised(GPT(GPTConfig.from_dict({**GPTConfig(V, T, C, H, L).to_dict(), **changes})))
    assert isinstance(model, GPT)
    return model


def assert_equal_logits(folder: Path, theirs: nn.Module) -> GPT:
    ours = GPT.from_pretrained(folder)
    ids = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids)
        assert (ours(ids) - expected).abs().max() <= 2e-5 * expected.abs().max()
    return ours


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (H, C // H)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


# --- the book ------------------------------------------------------------------------------------


class BookNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            self.scale * centred / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
            + self.shift
        )


class BookAttention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.W_query, self.W_key, self.W_value = (nn.Linear(C, C, bias=bias) for _ in range(3))
        self.out_proj = nn.Linear(C, C)
        self.register_buffer("mask", torch.ones(T, T).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(self.W_query(x), self.W_key(x), self.W_value(x)))


class BookFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(C, 4 * C), nn.GELU(approximate="tanh"), nn.Linear(4 * C, C)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class BookBlock(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.att, self.ff = BookAttention(bias), BookFeedForward()
        self.norm1, self.norm2 = BookNorm(), BookNorm()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class BookGPT(nn.Module):
    """The book's GPTModel under its own parameter names."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(V, C), nn.Embedding(T, C)
        self.trf_blocks = nn.Sequential(*[BookBlock(bias) for _ in range(L)])
        self.final_norm, self.out_head = BookNorm(), nn.Linear(C, V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids) + self.pos_emb.weight[: ids.shape[1]]
        return self.out_head(self.final_norm(self.trf_blocks(x)))


class BookLoRA(nn.Module):
    def __init__(self, linear: nn.Linear, alpha: float) -> None:
        super().__init__()
        self.linear, self.alpha, self.lora = linear, alpha, nn.Module()
        self.lora.A = nn.Parameter(torch.randn(linear.in_features, 2) * 0.1)
        self.lora.B = nn.Parameter(torch.randn(2, linear.out_features) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.alpha * (x @ self.lora.A @ self.lora.B)


def add_lora(model: nn.Module, alpha: float) -> None:
    for name, child in model.named_children():
        if isinstance(child, nn.Linear):
            setattr(model, name, BookLoRA(child, alpha))
        else:
            add_lora(child, alpha)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_books_state_dicts_give_the_books_logits(
    tmp_path: Path, bias: bool, wrapped: bool
) -> None:
    theirs = randomised(BookGPT(bias))
    state: Any = theirs.state_dict()
    if wrapped:
        state = {"model_state_dict": state, "optimizer_state_dict": {"state": {}}}
    torch.save(state, tmp_path / "model.pth")
    said = convert(tmp_path / "model.pth", tmp_path / "out", n_heads=H)
    assert "state dict of the book" in said and "without a tokenizer" in said
    ours = assert_equal_logits(tmp_path / "out", theirs)
    assert ours.config.qkv_bias == bias and not ours.config.tie_weights


def test_the_books_lora_is_folded_into_its_weights(tmp_path: Path) -> None:
    theirs = randomised(BookGPT(bias=True))
    add_lora(theirs, alpha=3.0)
    torch.save(theirs.state_dict(), tmp_path / "lora.pth")
    with pytest.raises(PygptError, match="not their scale; give lora_scale"):
        convert(tmp_path / "lora.pth", tmp_path / "out", n_heads=H)
    convert(tmp_path / "lora.pth", tmp_path / "out", n_heads=H, lora_scale=3.0)
    assert_equal_logits(tmp_path / "out", theirs)


def test_the_books_classifier_keeps_its_head(tmp_path: Path) -> None:
    theirs = BookGPT()
    theirs.out_head = nn.Linear(C, 3)
    randomised(theirs)
    torch.save(theirs.state_dict(), tmp_path / "classifier.pth")
    convert(tmp_path / "classifier.pth", tmp_path / "out", n_heads=H)
    gpt, head = GPT.from_pretrained(tmp_path / "out"), load_file(tmp_path / "out/head.safetensors")
    ids = torch.arange(T)[None]
    got = F.linear(gpt.hidden(ids), head["weight"], head["bias"])
    torch.testing.assert_close(got, theirs(ids))
    assert json.loads((tmp_path / "out/labels.json").read_text()) == ["0", "1", "2"]
    with pytest.raises(PygptError, match=r"classifies, which llama\.cpp's gpt2 cannot"):
        convert(tmp_path / "classifier.pth", tmp_path / "m.gguf", n_heads=H)


def test_a_classifier_of_pygpts_keeps_head_labels_and_template(tmp_path: Path) -> None:
    random_gpt().save_pretrained(tmp_path / "in")
    head = {"weight": torch.randn(2, C), "bias": torch.randn(2)}
    save_file(head, tmp_path / "in/head.safetensors")
    (tmp_path / "in/labels.json").write_text('["ham", "spam"]')
    (tmp_path / "in/template.json").write_text('{"prompt": "?"}')
    convert(tmp_path / "in", tmp_path / "out", dtype="bf16")
    kept = load_file(tmp_path / "out/head.safetensors")
    assert all(torch.equal(kept[name], head[name]) for name in head)
    for name in ("labels.json", "template.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "in" / name).read_text()
    with pytest.raises(PygptError, match=r"classifies, which llama\.cpp's gpt2 cannot"):
        convert(tmp_path / "in", tmp_path / "m.gguf")


# --- nanoGPT, minGPT, transformers' pickles ------------------------------------------------------


class NanoNorm(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), self.weight, self.bias)


class NanoAttention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=bias), nn.Linear(C, C, bias=bias)
        self.register_buffer("bias", torch.ones(1, 1, T, T))

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(attend(*self.c_attn(x).split(C, dim=-1)))


class NanoBlock(nn.Module):
    def __init__(self, bias: bool, approximate: str) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = NanoNorm(bias), NanoAttention(bias), NanoNorm(bias)
        self.mlp = nn.Module()
        self.mlp.c_fc = nn.Linear(C, 4 * C, bias=bias)
        self.mlp.c_proj = nn.Linear(4 * C, C, bias=bias)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        inner = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate=self.approximate)
        return x + self.mlp.c_proj(inner)


class NanoGPT(nn.Module):
    """nanoGPT's parameters and arithmetic; minGPT's with the tanh GELU and an untied head."""

    def __init__(self, bias: bool, approximate: str = "none", tied: bool = True) -> None:
        super().__init__()
        blocks = nn.ModuleList(NanoBlock(bias, approximate) for _ in range(L))
        parts = {"wte": nn.Embedding(V, C), "wpe": nn.Embedding(T, C), "h": blocks}
        self.transformer = nn.ModuleDict({**parts, "ln_f": NanoNorm(bias)})
        self.lm_head = nn.Linear(C, V, bias=False)
        if tied:
            self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        parts = self.transformer
        x = parts["wte"](ids) + parts["wpe"].weight[: ids.shape[1]]
        for block in parts["h"]:
            x = block(x)
        return self.lm_head(parts["ln_f"](x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpts_checkpoints_give_its_logits(tmp_path: Path, bias: bool, prefix: str) -> None:
    theirs = randomised(NanoGPT(bias))
    arguments = {
        "n_layer": L,
        "n_head": H,
        "n_embd": C,
        "block_size": T,
        "vocab_size": V,
        "dropout": 0.2,
    }
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in theirs.state_dict().items()},
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": {**arguments, "bias": bias},
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char"},
    }
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert "(nanoGPT, " in convert(tmp_path / "ckpt.pt", tmp_path / "out")
    ours = assert_equal_logits(tmp_path / "out", theirs)
    assert ours.config == GPTConfig(
        V, T, C, H, L, 0.2, qkv_bias=bias, tie_weights=True, exact_gelu=True
    )


def test_mingpts_state_dict_gives_its_logits(tmp_path: Path) -> None:
    theirs = randomised(NanoGPT(bias=True, approximate="tanh", tied=False))
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    with pytest.raises(PygptError, match="does not tell its number of attention heads; give n_h"):
        convert(tmp_path / "model.pt", tmp_path / "out")
    assert "(minGPT, " in convert(tmp_path / "model.pt", tmp_path / "out", n_heads=H)
    assert not assert_equal_logits(tmp_path / "out", theirs).config.tie_weights


def test_a_pickled_transformers_folder_is_converted_but_not_opened(tmp_path: Path) -> None:
    model = random_gpt(qkv_bias=True, tie_weights=True)
    model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises((PygptError, FileNotFoundError), match=r"model\.safetensors"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(PygptError, match="pickled file; bring it in with `pygpt convert"):
        GPT.from_pretrained(tmp_path / "pytorch_model.bin")
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        convert(source, tmp_path / "out")
        assert_equal_logits(tmp_path / "out", model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tok_emb.weight": torch.zeros(1, 1).expand(10**9, C)}, "has not the data"),
        ({"tok_emb.weight": torch.empty(V, C, device="meta")}, "has not the data"),
        ({"tok_emb.weight": torch.eye(V, C).to_sparse()}, "sparse"),
        ({"tok_emb.weight": torch.zeros(V)}, "bad.pth: not enough values"),
        ({"trf_blocks.99999999999999999999.x": torch.zeros(1)}, "missing: trf_blocks.2.norm1"),
        ({"out_head.bias": torch.zeros(3)}, "the classification head does not fit the model"),
    ],
)
def test_state_dicts_that_claim_what_is_not_there_are_refused(
    tmp_path: Path, change: dict[str, Tensor], message: str
) -> None:
    torch.save({**BookGPT().state_dict(), **change}, tmp_path / "bad.pth")
    with pytest.raises(PygptError, match=re.escape(message)):
        convert(tmp_path / "bad.pth", tmp_path / "out", n_heads=H)
    assert not (tmp_path / "out").exists()


def test_lora_without_its_other_half_is_refused(tmp_path: Path) -> None:
    theirs = BookGPT()
    add_lora(theirs, alpha=3.0)
    state = theirs.state_dict()
    for value in (None, torch.zeros(3, 3)):
        state["out_head.lora.B"] = value
        kept = {name: tensor for name, tensor in state.items() if tensor is not None}
        torch.save(kept, tmp_path / "lora.pth")
        with pytest.raises(PygptError, match=r"lora\.pth: "):
            convert(tmp_path / "lora.pth", tmp_path / "out", n_heads=H, lora_scale=3.0)


class Bomb:
    def __reduce__(self) -> Any:
        return print, ("a pickle ran code",)


def test_a_pickle_never_runs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {**BookGPT().state_dict(), "bomb": Bomb()}
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(PygptError, match="damaged, or holds more than tensors"):
        convert(tmp_path / "bad.pth", tmp_path / "out", n_heads=H)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_of_a_pickled_file_is_noticed(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "flipped.pth"
    theirs = randomised(BookGPT())
    torch.save(theirs.state_dict(), path)
    data = bytearray(path.read_bytes())
    at = int(torch.randint(len(data), (), generator=torch.Generator().manual_seed(seed)))
    data[at] ^= 1 << seed % 8
    path.write_bytes(data)
    try:
        convert(path, tmp_path / "out", n_heads=H)
    except PygptError as error:
        assert "flipped.pth" in str(error)
    else:  # padding, or a field that nobody reads
        assert_equal_logits(tmp_path / "out", theirs)


@pytest.mark.parametrize("seed", range(12))
def test_cut_pickles_are_refused(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "cut.pth"
    torch.save(BookGPT().state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: 1 + len(data) * seed // 12])
    with pytest.raises(PygptError, match=r"cut\.pth"):
        convert(path, tmp_path / "out", n_heads=H)


@pytest.mark.parametrize(
    "state", [[1, 2], {"a": torch.ones(2)}, {}, {"trf_blocks.0.x": torch.ones(1)}]
)
def test_pickles_of_something_else_are_refused(tmp_path: Path, state: Any) -> None:
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(PygptError, match=r"other\.pth"):
        convert(tmp_path / "other.pth", tmp_path / "out", n_heads=H)


# --- llm.c ---------------------------------------------------------------------------------------


def write_llmc(path: Path, model: GPT, dtype: torch.dtype, padded: int) -> None:
    """As llm.c does: a header, then each kind of parameter for all layers."""
    c = model.config
    version = 3 if dtype == torch.float32 else 5
    header = [20240326, version, c.context_length, c.vocab_size, c.n_layers, c.n_heads, c.emb_dim]
    state = model.state_dict()
    wte = torch.cat([state["tok_emb.weight"], torch.zeros(padded - c.vocab_size, c.emb_dim)])
    kinds = ["norm1", "att.qkv", "att.out", "norm2", "ff.up", "ff.down"]
    tensors = [wte, state["pos_emb.weight"]]
    for kind in kinds:
        for part in ("weight", "bias"):
            tensors += [state[f"blocks.{n}.{kind}.{part}"] for n in range(c.n_layers)]
    tensors += [state["final_norm.weight"], state["final_norm.bias"]]
    with path.open("wb") as file:
        file.write(struct.pack("<256i", *header, padded, *[0] * 248))
        for tensor in tensors:
            file.write(tensor.to(dtype).flatten().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [V, 128])
def test_llmcs_files_are_read_without_their_padding(
    tmp_path: Path, dtype: torch.dtype, padded: int
) -> None:
    model = random_gpt(qkv_bias=True, tie_weights=True)
    write_llmc(tmp_path / "model.bin", model, dtype, padded)
    convert(tmp_path / "model.bin", tmp_path / "out", dtype="f32")
    ours = GPT.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor.to(dtype).float()), name
    assert GPT.from_pretrained(tmp_path / "model.bin").tok_emb.weight.dtype == dtype


def test_damaged_llmc_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_llmc(path, random_gpt(qkv_bias=True, tie_weights=True), torch.float32, V)
    whole = path.read_bytes()
    for length in (4, 100, 1023, 1024, 5000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(PygptError, match=r"model\.bin"):
            convert(path, tmp_path / "out")
    for position in range(1, 8):
        for value in (-1, 0 if position < 7 else 1, 2**31 - 1):
            data = bytearray(whole)
            struct.pack_into("<i", data, 4 * position, value)
            path.write_bytes(data)
            with pytest.raises(PygptError, match=r"model\.bin"):
                convert(path, tmp_path / "out")


# --- OpenAI --------------------------------------------------------------------------------------


def test_tensorflows_own_file_is_read_to_the_bit() -> None:
    tensors, checks = read_bundle(OPENAI / "model.ckpt.index")
    assert len(tensors) == len(checks) == 28  # global_step, an integer, is left out
    for name, tensor in tensors.items():
        numbers = np.arange(tensor.numel()) * 7 + 13 * sum(name.removeprefix("model/").encode())
        expected = np.float32(numbers % 101 - 50).reshape(tensor.shape) / 64
        assert (tensor.numpy() == expected).all(), name


def test_openais_folder_becomes_a_gpt(tmp_path: Path) -> None:
    said = convert(OPENAI, tmp_path)
    assert "OpenAI (TensorFlow)" in said
    direct, converted = GPT.from_pretrained(OPENAI), GPT.from_pretrained(tmp_path)
    assert direct.config == GPTConfig(11, 5, 4, 2, 2, qkv_bias=True, tie_weights=True)
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, converted.state_dict()[name]), name
    kernel = read_bundle(OPENAI / "model.ckpt.index")[0]["model/h1/mlp/c_fc/w"]
    assert torch.equal(direct.blocks[1].ff.up.weight, kernel[0].T)


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_every_flipped_byte_of_a_bundle_is_noticed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "openai"
    shutil.copytree(OPENAI, folder)
    whole, before = (folder / name).read_bytes(), GPT.from_pretrained(folder).state_dict()
    harmless = 0
    for at in range(0, len(whole), 19):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        (folder / name).write_bytes(data)
        try:
            after = GPT.from_pretrained(folder).state_dict()
        except (PygptError, FileNotFoundError):
            continue
        harmless += 1  # padding of the footer, the meta index, or the counter, which is not read
        assert all(torch.equal(after[n], before[n]) for n in before), at
    assert harmless <= 12
    for length in (0, 20, 47, 48, len(whole) // 2, len(whole) - 1):
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(PygptError, match="model"):
            GPT.from_pretrained(folder)


def test_an_index_of_endless_numbers_is_refused_at_once(tmp_path: Path) -> None:
    shutil.copytree(OPENAI, tmp_path / "openai")
    block = b"\xff" * 2**20 + bytes(4)  # the latter: no restart points
    data = torch.frombuffer(bytearray(block + b"\0"), dtype=torch.uint8)
    crc = crc32c(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    footer = bytes([0, 0, 0, 0x84, 0x80, 0x40]).ljust(40, b"\0")
    magic = struct.pack("<Q", 0xDB4775248B80FB57)
    index = block + b"\0" + struct.pack("<I", masked) + footer + magic
    (tmp_path / "openai/model.ckpt.index").write_bytes(index)
    with pytest.raises(PygptError, match=r"index: a number of more than 64 bits"):
        GPT.from_pretrained(tmp_path / "openai")
    (tmp_path / "openai/model.ckpt.index").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(PygptError, match=r"index is a git-lfs pointer"):
        GPT.from_pretrained(tmp_path / "openai")


def test_an_openai_folder_without_its_parts_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "openai"
    shutil.copytree(OPENAI, folder)
    (folder / "model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(FileNotFoundError, match="data-00000-of-00001 does not exist"):
        GPT.from_pretrained(folder)
    (folder / "model.ckpt.index").unlink()
    with pytest.raises(PygptError, match="has 0 checkpoints"):
        GPT.from_pretrained(folder)
    (folder / "hparams.json").write_text("{}")
    with pytest.raises(PygptError, match=r"hparams\.json"):
        GPT.from_pretrained(folder)


# --- GGUF ----------------------------------------------------------------------------------------

# The bytes, ab, abc and the end of a text; merges are written in both ways.
TOKENIZER = Tokenizer.train(["abc" * 9], 259).to_hugging_face()
TOKENIZER["model"]["merges"][1] = "ab c"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize(("tie_weights", "qkv_bias"), [(False, False), (True, True)])
def test_gguf_reads_back_what_was_written(
    tmp_path: Path, dtype: str, tie_weights: bool, qkv_bias: bool
) -> None:
    gguf = pytest.importorskip("gguf")
    model = random_gpt(vocab_size=261, tie_weights=tie_weights, qkv_bias=qkv_bias)
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "in/tokenizer.json").write_text(json.dumps(TOKENIZER))
    assert "with its tokenizer" in convert(tmp_path / "in", tmp_path / "m.gguf", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "gpt2"
    assert (
        fields["general.file_type"]
        == gguf.LlamaFileType[{"f32": "ALL_F32"}.get(dtype, f"MOSTLY_{dtype.upper()}")]
    )
    assert fields["gpt2.context_length"] == T and fields["gpt2.block_count"] == L
    assert fields["gpt2.attention.head_count"] == H
    assert fields["gpt2.attention.layer_norm_epsilon"] == np.float32(1e-5)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.merges"] == ["a b", "ab c"]
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[:258] == [*TOKENIZER["model"]["vocab"]] and tokens[258] == "<|endoftext|>"
    assert fields["tokenizer.ggml.token_type"][256:] == [1, 1, 3, 5, 5]
    assert fields["tokenizer.ggml.eos_token_id"] == 258
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    state = model.state_dict()
    known = {**gguf.MODEL_TENSORS}[gguf.MODEL_ARCH.GPT2]
    names = {gguf.TENSOR_NAMES[key].format(bid=n) for key in known for n in range(L)}
    assert {name.rpartition(".")[0] for name in tensors} <= names
    assert ("output.weight" in tensors) == (not tie_weights)

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.array(values, np.float32)).reshape(*tensor.shape[::-1].tolist())

    for name, ours in {
        "token_embd.weight": "tok_emb.weight",
        "blk.1.attn_qkv.weight": "blocks.1.att.qkv.weight",
        "blk.0.ffn_down.weight": "blocks.0.ff.down.weight",
    }.items():
        steps = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.5 / 127 + 2**-11}[dtype]
        assert (read(name) - state[ours]).abs().max() <= steps * state[ours].abs().max()
        if dtype == "q8_0":
            own = gguf.quants.quantize(state[ours].numpy(), gguf.GGMLQuantizationType.Q8_0)
            assert (own == tensors[name].data.reshape(own.shape)).all()
    assert torch.equal(read("blk.1.ffn_norm.bias"), state["blocks.1.norm2.bias"])
    assert torch.equal(read("position_embd.weight"), state["pos_emb.weight"])
    bias = read("blk.0.attn_qkv.bias")
    assert torch.equal(bias, state["blocks.0.att.qkv.bias"] if qkv_bias else torch.zeros(3 * C))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that has learned a short text, with its tokenizer."""
    folder = tmp_path_factory.mktemp("learned")
    tok = Tokenizer.train([TEXT], 290)
    ids = torch.tensor(tok.encode(TEXT))
    torch.manual_seed(0)
    shape = GPTConfig(290, 128, 64, 4, 2, 0.0, qkv_bias=True, tie_weights=True, init_std=0.08)
    model = GPT(shape).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(150):
        at = 17 * step % (len(ids) - 65)
        loss = model.loss(ids[None, at : at + 64], ids[None, at + 1 : at + 65])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.0
    model.save_pretrained(folder, tok)
    return folder


# llama.cpp rounds to 16 bits inside, so that f32 differs too; shares of the largest logit.
@pytest.mark.parametrize(
    ("dtype", "error"), [("f32", 5e-4), ("f16", 2e-3), ("bf16", 1e-2), ("q8_0", 2e-2)]
)
def test_llamacpp_gives_our_tokens(tmp_path: Path, learned: Path, dtype: str, error: float) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    convert(learned, tmp_path / "model.gguf", dtype=dtype)
    llama = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=128, n_threads=1, logits_all=True, verbose=False
    )
    model, tok = GPT.from_pretrained(learned), Tokenizer.from_file(learned)
    prompt = "She carried two wooden buckets, don't fall in: 3 stones\n\n"
    ids = tok.encode(prompt)
    assert llama.tokenize(prompt.encode(), add_bos=False) == ids
    llama.eval(ids)
    logits = model(torch.tensor([ids]))[0].detach()
    difference = (torch.tensor(llama.scores[: len(ids)]) - logits).abs().max()
    assert difference <= error * logits.abs().max()
    if dtype == "f32":
        llama.reset()
        tokens = list(itertools.islice(llama.generate(ids, temp=0.0, repeat_penalty=1.0), 64))
        assert generate(model, ids, 64, temperature=0.0) == [*ids, *tokens]


def test_gguf_refuses_what_llamacpp_would_misread(tmp_path: Path) -> None:
    random_gpt(exact_gelu=True).save_pretrained(tmp_path / "exact")
    with pytest.raises(PygptError, match="trained with erf's"):
        convert(tmp_path / "exact", tmp_path / "m.gguf")
    GPT(GPTConfig(259, T, 24, 4, 1)).save_pretrained(tmp_path / "narrow")
    with pytest.raises(PygptError, match="q8_0 needs rows of a multiple of 32, got 24"):
        convert(tmp_path / "narrow", tmp_path / "m.gguf", dtype="q8_0")
    chinese = {"type": "Split", "pattern": {"Regex": r"\p{Han}|\s"}, "behavior": "Isolated"}
    bare = {**TOKENIZER["pre_tokenizer"], "use_regex": False}
    whole = {**TOKENIZER["model"], "merges": [["a", "b"]], "ignore_merges": True}
    sequence = {"type": "Sequence", "pretokenizers": [chinese, bare]}
    for change, message in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no ByteLevel pre-tokenizer"),
        ({"pre_tokenizer": sequence}, "llama.cpp splits text as GPT-2 does"),
        ({"normalizer": {"type": "NFC"}}, "a normalizer of type 'NFC'"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "a model of type 'WordPiece'"),
        ({"model": whole}, "llama.cpp splits text as GPT-2 does"),
    ):
        (tmp_path / "narrow/tokenizer.json").write_text(json.dumps({**TOKENIZER, **change}))
        with pytest.raises(PygptError, match=re.escape(message)):
            convert(tmp_path / "narrow", tmp_path / "m.gguf")
    (tmp_path / "exact/tokenizer.json").write_text(json.dumps(TOKENIZER))
    with pytest.raises(PygptError, match="the tokenizer's 259 words do not fit the model's 61"):
        convert(tmp_path / "exact", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


# --- convert and describe ------------------------------------------------------------------------


def test_exact_gelu_survives_the_round_trip_and_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = random_gpt(exact_gelu=True, init_std=0.05)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert GPT.from_pretrained(tmp_path).config == model.config
    ids = torch.arange(T)[None]
    assert (model(ids) - theirs(ids).logits).abs().max() < 1e-5


def test_convert_says_what_it_did_and_takes_the_tokenizer_along(tmp_path: Path) -> None:
    random_gpt().save_pretrained(tmp_path / "in")
    (tmp_path / "in/tokenizer.json").write_text(json.dumps(TOKENIZER))
    said = convert(tmp_path / "in", tmp_path / "out", dtype="bf16")
    assert said == (
        f"read {tmp_path}/in (Hugging Face, 29,952 parameters), "
        f"wrote {tmp_path}/out (Hugging Face, bf16, with its tokenizer)"
    )
    assert GPT.from_pretrained(tmp_path / "out").tok_emb.weight.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == TOKENIZER
    with pytest.raises(PygptError, match="dtype must be one of f32, f16, bf16, f64, got 'q8_0'"):
        convert(tmp_path / "in", tmp_path / "out", dtype="q8_0")
    (tmp_path / "file").touch()
    with pytest.raises(PygptError, match="file is a file; give a folder, or a name that ends in"):
        convert(tmp_path / "in", tmp_path / "file")


def test_a_conversion_that_is_terminated_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_gpt().save_pretrained(tmp_path / "in")
    before = signal.getsignal(signal.SIGTERM)

    def terminate(*_: object) -> None:
        assert [*tmp_path.glob("out/*.part")]
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("pygpt.weights.files.to_bytes", terminate)
    try:
        with pytest.raises(SystemExit, match="143"):
            main(["convert", str(tmp_path / "in"), str(tmp_path / "out")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not [*tmp_path.glob("out/*")]


def test_describe_tells_size_and_memory(tmp_path: Path) -> None:
    model = random_gpt(qkv_bias=True)
    model.half().save_pretrained(tmp_path)
    facts = describe(read(tmp_path))
    assert facts["parameters"] == model.num_params and facts["dtype"] == "float16"
    assert facts["weight_bytes"] == 2 * model.num_params
    assert facts["inference_bytes"] == 2 * model.num_params + 2 * 2 * L * T * C
    assert facts["training_bytes"] == 16 * model.num_params
    assert {key: facts[key] for key in model.config.to_dict()} == model.config.to_dict()
    json.dumps(facts)


@pytest.mark.parametrize("content", [b"", b"hello", b"GGUF" + bytes(60), b"\x80", bytes(2000)])
def test_files_of_no_known_format_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    for function in (read, GPT.from_pretrained):
        with pytest.raises(PygptError, match=f"{tmp_path}/file is"):
            function(tmp_path / "file")


def test_loading_holds_the_weights_once(tmp_path: Path) -> None:
    """Private memory grows by the model's own size, not by that of the file as well."""
    model = GPT(GPTConfig(vocab_size=4096, emb_dim=512, n_heads=8, n_layers=6, tie_weights=True))
    model.save_pretrained(tmp_path)
    size = sum(p.numel() * 4 for p in model.parameters())

    def private() -> int:
        text = Path("/proc/self/smaps_rollup").read_text()
        found = re.search(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)
        assert found
        return int(found[1]) * 1024

    del model
    before = private()
    loaded = GPT.from_pretrained(tmp_path)
    assert private() - before <= 2**21  # mapped
    assert loaded.train().blocks[0].ff.up.weight.isfinite().all()
    assert private() - before <= 1.1 * size + 2**21
    with torch.no_grad():
        for p in loaded.parameters():
            p.mul_(2)
    assert private() - before <= 1.1 * size + 2**21
