"""The verb demo."""

from __future__ import annotations

from tyro.conf import OmitArgPrefixes

from pygpt.config import DemoConfig
from pygpt.demo.run import run_demo

DEFAULTS = DemoConfig()


def demo(config: OmitArgPrefixes[DemoConfig] = DEFAULTS) -> int:
    """Train, fine-tune and talk to a small GPT, on the documentation that comes with Python.

    Example: pygpt demo --minutes 1

    Nothing is downloaded. The same command goes on where an earlier one was stopped.
    """
    run_demo(config)
    return 0
