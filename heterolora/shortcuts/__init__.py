"""LoRA-adapted shortcuts: earlier activations added at a projection, as branches of its operation.

`model` adds and removes them, `files` and `checkpoints` save them; import from these three, and the
names of the kinds, `KINDS`, from here.
"""

from heterolora.shortcuts.model import KINDS

__all__ = ["KINDS"]
