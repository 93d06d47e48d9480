"""What proves the kernels on this machine: `heterolora verify`, five rungs, each of which takes for
granted what the one below it proves.

`rungs` lists them; their checks (`checks`, `fused_models`) judge the ops (`operations`) on groups
of operands (`groups`), which the tests of the kernels use too.
"""

from heterolora.verify.command import add_arguments, run

__all__ = ["add_arguments", "run"]
