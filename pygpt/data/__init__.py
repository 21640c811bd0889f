"""From files to token shards and the windows that training reads; numpy only."""

from pygpt.data.dataset import Dataset, Split, prepare, prepare_texts, split_documents
from pygpt.data.permutation import mix, shuffled
from pygpt.data.readers import list_files, read_documents, read_rows, read_text

__all__ = [
    "Dataset",
    "Split",
    "list_files",
    "mix",
    "prepare",
    "prepare_texts",
    "read_documents",
    "read_rows",
    "read_text",
    "shuffled",
    "split_documents",
]
