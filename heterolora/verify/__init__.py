"""What proves the kernels on this machine: `heterolora verify`."""

from heterolora.verify.command import add_arguments, run

__all__ = ["add_arguments", "run"]
