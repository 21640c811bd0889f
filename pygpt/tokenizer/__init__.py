"""Byte-level BPE: text to ids and back, training, and the formats that hold a vocabulary.

`Tokenizer` offers the methods of `tiktoken.Encoding`, with the same arguments, results and errors.
"""

from pygpt.tokenizer.encoding import StreamDecoder, Tokenizer
from pygpt.tokenizer.patterns import PATTERNS
from pygpt.tokenizer.published import EOT

__all__ = ["EOT", "PATTERNS", "StreamDecoder", "Tokenizer"]
