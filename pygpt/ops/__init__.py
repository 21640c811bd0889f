"""The tensor door to native code: every check, allocation and native call of an op stands here.

Backends: "native" is pygpt's own kernel, "torch" the same result from torch's ops, "reference" the
slow twin in `pygpt.reference`. "auto" takes native where a kernel for the tensor exists.
"""

from pygpt.ops.activation import gelu, gelu_linear
from pygpt.ops.attention import causal_attention
from pygpt.ops.dispatch import Impl, backend, chosen_backend
from pygpt.ops.embedding import tied_embedding
from pygpt.ops.heads import unbind_heads
from pygpt.ops.linear_loss import linear_cross_entropy
from pygpt.ops.loss import Reduction, cross_entropy
from pygpt.ops.native import keep_memory, native_info
from pygpt.ops.norm import add_norm
from pygpt.ops.product import assume_own_products, linear, own_products
from pygpt.ops.sampling import Sampled, sample

__all__ = [
    "Impl",
    "Reduction",
    "Sampled",
    "add_norm",
    "assume_own_products",
    "backend",
    "causal_attention",
    "chosen_backend",
    "cross_entropy",
    "gelu",
    "gelu_linear",
    "keep_memory",
    "linear",
    "linear_cross_entropy",
    "native_info",
    "own_products",
    "sample",
    "tied_embedding",
    "unbind_heads",
]
