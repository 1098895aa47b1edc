"""Loading models and tokenizers from the Hub, from folders and from GGUF files, with checks.

Nothing here runs code that a model repository ships unless `trust_remote_code` was asked for, and weights are
read from safetensors only. A GGUF file is converted once into a folder of the cache.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneshift.errors import MemoryLimitError, ModelError, UserError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True)
class LoadOptions:
    """How weights are placed and run: device and dtype by name, a repository's own code or not, compiled or not."""

    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    compile: bool = False


def pick_device(name: str) -> torch.device:
    """Return the named torch device; `auto` is the first CUDA device, else the CPU.

    Raises:
        ModelError: torch knows no such device, or this machine has none.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"run.device: {name!r} cannot be used ({first_line(error)}). Set auto, cpu or cuda."
        ) from error
    if torch.device(name).index:
        raise ModelError(
            f"run.device: {name!r}: the trainer uses the first visible device. Set run.device: cuda, and "
            f"CUDA_VISIBLE_DEVICES={device.index} in the environment."
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the named torch dtype; `auto` is bf16 where the processor computes it in hardware, else fp32.

    Without hardware support bf16 is slower than fp32 on a CPU.
    """
    import torch

    if name == "auto":
        hardware = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else torch.cpu._is_avx512_bf16_supported()
        )
        return torch.bfloat16 if hardware else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"dtype {name!r} is not a torch dtype. Use auto, float32, bfloat16 or float16.")
    return dtype


def cache_folder() -> Path:
    """Return the folder for what is made once, as converted models: `$TUNESHIFT_CACHE`, else `~/.cache/tuneshift`."""
    return Path(os.environ.get("TUNESHIFT_CACHE", "~/.cache/tuneshift")).expanduser()


def resolve_model(reference: str) -> str:
    """Return what transformers can load: an existing folder, a converted GGUF file's folder, or a Hub id.

    Raises:
        ModelError: the path does not exist and is no Hub id, or a folder holds no safetensors model.
    """
    path = Path(reference).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(convert_gguf(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path}: no config.json in this folder. Point at a model in Hugging Face's layout.")
        if not any(path.glob("*.safetensors")):
            raise ModelError(
                f"{path}: no .safetensors file in this folder. TuneShift does not read pickled weights; convert "
                "them with `model.save_pretrained(folder)`."
            )
        return str(path)
    if path.is_absolute() or not HUB_ID.match(reference):
        raise ModelError(
            f"{reference}: there is no such model folder or .gguf file. Relative paths start at the configuration "
            "file's folder; a Hub id has the form owner/name."
        )
    return reference


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer and make sure that it can pad and end a text.

    Raises:
        ModelError: it cannot be loaded, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    with loading(path, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: the tokenizer has no EOS token, so a response could never end. Set eos_token.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(path: str, options: LoadOptions) -> PreTrainedModel:
    """Load a causal language model in evaluation mode.

    Raises:
        ModelError: it cannot be loaded, it is no decoder-only model, or weights are missing.
    """
    device = pick_device(options.device)
    model = _from_pretrained(path, trust_remote_code=options.trust_remote_code, dtype=pick_dtype(options.dtype, device))
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    return model


def read_config(reference: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return a model's configuration, for which a folder needs no weights; see `load_causal_lm` for what is raised."""
    from transformers import AutoConfig

    path = resolve_model(reference) if reference.endswith(".gguf") else reference
    with loading(reference, "model"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return config


def inspect_causal_lm(path: str, options: LoadOptions) -> PreTrainedModel:
    """Return a model without its values, on torch's meta device, in a moment whatever its size.

    Its weight files are opened and their names and shapes checked, so a damaged model is found before it is needed; see
    `load_causal_lm` for what is raised.
    """
    return _from_pretrained(path, trust_remote_code=options.trust_remote_code, device_map="meta")


def _from_pretrained(path: str, *, trust_remote_code: bool, **placement: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    if read_config(path, trust_remote_code=trust_remote_code).is_encoder_decoder:
        raise ModelError(f"{path}: an encoder-decoder model. TuneShift moves decoder-only language models.")
    with loading(path, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True, **placement
        )
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} weights are missing from its files (first: {missing[0]}), so they would be "
            "random. Copy the model anew."
        )
    return model


def text_ends(configs: Sequence[GenerationConfig | None], tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every id that ends a text: the tokenizer's EOS and those of the models' generation configurations."""
    listed = [tokenizer.eos_token_id]
    for config in configs:
        configured = config.eos_token_id if config else None
        listed += configured if isinstance(configured, list) else [configured]
    return frozenset(int(eos) for eos in listed if eos is not None)


def read_generation_config(path: str) -> GenerationConfig | None:
    """Return a model's generation configuration, `None` where it has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return None


def compile_layers(model: PreTrainedModel) -> None:
    """Let torch compile each layer at its first use; equal layers share the machine code, whatever the batch's shape.

    Raises:
        ModelError: the model runs on a CPU and there is no C++ compiler.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # what transformers' layers have in common

    compiler = os.environ.get("CXX", "g++")
    if model.device.type == "cpu" and shutil.which(compiler) is None:
        raise ModelError(f"run.compile: there is no C++ compiler {compiler!r}. Install one, or set run.compile: false.")
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)


def context_length(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model can attend to, or `None` where its configuration does not say."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return how many token ids a model has embeddings for; a tokenizer may know more, or fewer."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]


def convert_gguf(path: Path, folder: Path | None = None) -> Path:
    """Convert a GGUF file into a safetensors folder, once, and return the folder.

    transformers refuses to save a model that it read from GGUF, so the weights are copied into a fresh model of
    the same configuration.

    Raises:
        ModelError: the `gguf` package is missing or the file cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder or cache_folder() / "models" / f"{path.stem}-{_gguf_digest(path, path.stat())[:16]}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("converting %s to safetensors (once)", path.name)
    with loading(str(path), "GGUF model"):
        source = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    del source.config.quantization_config
    source.config._name_or_path = folder.name
    fresh = AutoModelForCausalLM.from_config(source.config).to(torch.bfloat16)
    fresh.load_state_dict(source.state_dict())
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        fresh.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.chmod(0o755)
        part.replace(folder)
    except OSError as error:
        if not (folder / "config.json").is_file():  # else another process was quicker
            raise ModelError(f"{folder}: the converted model cannot be written ({error.strerror}).") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


@functools.cache
def _gguf_digest(path: Path, stat: os.stat_result) -> str:
    return file_sha256(path)  # gigabytes: read once a process, as long as the file does not change


def free_memory() -> None:
    """Return the memory of models that nobody holds any more."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_cuda_memory() -> int | None:
    """Return this process's largest CUDA allocation in bytes, `None` without CUDA."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None


@contextmanager
def enough_memory(what: str, remedy: str) -> Iterator[None]:
    """Translate an error for want of memory into a `MemoryLimitError` that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryLimitError(
            f"{what} does not fit into memory ({first_line(error)}). {remedy} `tuneshift size` tells what fits. The "
            "same command continues the run, until the training is done with other `distill` settings, too; another "
            "setting needs another --run-dir."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a device or the machine had no more memory; torch's own errors of that kind are `RuntimeError`."""
    signs = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def loading(path: str, kind: str) -> Iterator[None]:
    """Translate what the loading libraries raise into a `ModelError`, or into a `MemoryLimitError`."""
    try:
        with enough_memory(f"{path}: the {kind}", "Set run.dtype: bfloat16, or take a larger device."):
            yield
    except UserError:
        raise
    except ImportError as error:
        raise ModelError(f"{path}: loading this {kind} needs a package: {first_line(error)}") from error
    except Exception as error:  # a damaged file makes the libraries raise anything
        raise ModelError(
            f"{path}: the {kind} cannot be loaded ({first_line(error)}). Check the path or Hub id, and that the "
            "download is complete."
        ) from error


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
