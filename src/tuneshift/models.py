"""Loading models, tokenizers and adapters from the Hub, from folders and from GGUF files, with checks.

Nothing here runs code that a model repository ships unless `trust_remote_code` was asked for, and weights are
read from safetensors only. A GGUF file is converted once into a folder of the cache.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneshift.errors import ModelError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True)
class LoadOptions:
    """How weights are placed: device and dtype by name, and whether a repository's own code may run."""

    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False


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
            f"run.device: {name!r} cannot be used ({_first_line(error)}). Set auto, cpu or cuda."
        ) from error
    if device.index:
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
    """Return the folder for converted models: `$TUNESHIFT_CACHE`, else `~/.cache/tuneshift`."""
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

    with _loading(path, "tokenizer"):
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


def inspect_causal_lm(path: str, options: LoadOptions) -> PreTrainedModel:
    """Return a model without its values, on torch's meta device, in a moment whatever its size.

    Its weight files are opened and their names and shapes checked, so a damaged model is found before it is needed; see
    `load_causal_lm` for what is raised.
    """
    return _from_pretrained(path, trust_remote_code=options.trust_remote_code, device_map="meta")


def _from_pretrained(path: str, *, trust_remote_code: bool, **placement: Any) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    with _loading(path, "model"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if config.is_encoder_decoder:
            raise ModelError(f"{path}: an encoder-decoder model. TuneShift moves decoder-only language models.")
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


def resolve_adapter(reference: str) -> str:
    """Return a local adapter folder; a Hub id is downloaded, without any file but the adapter's own.

    Raises:
        ModelError: there is no such folder, or the Hub does not have it.
    """
    path = Path(reference)
    if path.exists() or path.is_absolute() or not HUB_ID.match(reference):
        return str(path)
    from huggingface_hub import snapshot_download

    with _loading(reference, "adapter"):
        return snapshot_download(reference, allow_patterns=["adapter_config.json", "adapter_model.safetensors"])


def read_adapter_config(path: str) -> dict[str, Any]:
    """Return a local adapter's `adapter_config.json`.

    Raises:
        ModelError: the folder is no PEFT adapter in safetensors form.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{path}: there is no such adapter folder. A PEFT adapter holds adapter_config.json.")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{path}: {name} is missing. A PEFT adapter folder in safetensors form holds it.")
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{folder / 'adapter_config.json'}: not valid JSON ({error}). Save the adapter anew."
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'adapter_config.json'}: expected a JSON object. Save the adapter anew.")
    return config


def check_adapter_base(adapter: str, base: str) -> None:
    """Refuse an adapter whose configuration names another base model.

    Only the last part of the names is compared, since folders move: `org/SmolLM2-135M` equals `/m/SmolLM2-135M`.

    Raises:
        ModelError: the names differ.
    """
    named = str(read_adapter_config(adapter).get("base_model_name_or_path") or "")
    if named and Path(named).name.lower() != Path(base).name.lower():
        raise ModelError(
            f"{adapter}: this adapter was trained for {named!r}, not for {base!r}. Set source.base to that model; "
            "if it is the same model under another name, set source.same_base: true."
        )


def attach_adapter(model: PreTrainedModel, adapter: str) -> PeftModel:
    """Load a PEFT adapter onto `model`, with every weight accounted for.

    PEFT only warns when weights of the adapter are missing or unused, and the adapter then works in part.

    Raises:
        ModelError: weights are missing, left over or of another shape.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    read_adapter_config(adapter)
    try:
        with safe_open(Path(adapter) / "adapter_model.safetensors", framework="pt") as file:
            found = set(file.keys())
        peft_model = PeftModel.from_pretrained(model, adapter)
    except Exception as error:  # a damaged file makes the libraries raise anything
        raise ModelError(
            f"{adapter}: does not fit {model.config._name_or_path!r}, or is damaged ({_first_line(error)}). "
            "Set source.base to the model the adapter was trained for, or copy the adapter anew."
        ) from error
    expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    missing, unused = sorted(expected - found), sorted(found - expected - set(peft_model.state_dict()))
    if missing or unused:
        raise ModelError(
            f"{adapter}: {len(missing)} weights are missing (first: {missing[:1]}) and {len(unused)} fit no module "
            f"(first: {unused[:1]}) of {model.config._name_or_path!r}. The file is damaged or belongs to another "
            "base; copy the adapter anew or set source.base to its model."
        )
    peft_model.eval()
    return peft_model


def merged_copy(model: PreTrainedModel, adapter: str) -> PreTrainedModel | None:
    """Return a copy of `model` with an adapter added into its weights; `None` for a kind that cannot be merged.

    See `attach_adapter` for what is raised.
    """
    adapted = attach_adapter(copy.deepcopy(model), adapter)
    try:
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except (AttributeError, ValueError, NotImplementedError) as error:
        logger.info("%s: cannot be merged (%s); it is switched on and off instead", adapter, _first_line(error))
        return None
    merged.eval()
    return merged


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
    with _loading(str(path), "GGUF model"):
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


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _loading(path: str, kind: str) -> Iterator[None]:
    """Translate what the loading libraries raise into a `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(f"{path}: loading this {kind} needs a package: {_first_line(error)}") from error
    except Exception as error:  # a damaged file makes the libraries raise anything
        raise ModelError(
            f"{path}: the {kind} cannot be loaded ({_first_line(error)}). Check the path or Hub id, and that the "
            "download is complete."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
