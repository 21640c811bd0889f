"""Fine-tuning: a pretrained model learns to classify, to follow instructions, to prefer answers."""

from pygpt.config import LoRAConfig
from pygpt.finetune.classification import Classifier, Report, classify
from pygpt.finetune.instruction import TEMPLATES, InstructModel, Template, instruct
from pygpt.finetune.preference import prefer
from pygpt.finetune.records import (
    Instruction,
    Labelled,
    Preference,
    read_instructions,
    read_labelled,
    read_preferences,
)

__all__ = [
    "TEMPLATES",
    "Classifier",
    "InstructModel",
    "Instruction",
    "Labelled",
    "LoRAConfig",
    "Preference",
    "Report",
    "Template",
    "classify",
    "instruct",
    "prefer",
    "read_instructions",
    "read_labelled",
    "read_preferences",
]
