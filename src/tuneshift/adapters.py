"""PEFT adapters: finding, checking, attaching and merging them.

Only safetensors are read, and every weight of an adapter is accounted for.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneshift.errors import ModelError
from tuneshift.models import HUB_ID, LoadOptions, first_line, load_causal_lm, load_tokenizer, loading

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def resolve_adapter(reference: str) -> str:
    """Return a local adapter folder; a Hub id is downloaded, without any file but the adapter's own.

    Raises:
        ModelError: there is no such folder, or the Hub does not have it.
    """
    path = Path(reference)
    if path.exists() or path.is_absolute() or not HUB_ID.match(reference):
        return str(path)
    from huggingface_hub import snapshot_download

    with loading(reference, "adapter"):
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


def weight_names(adapter: str) -> set[str]:
    """Return the names of a local adapter's weights, such as "base_model.model.lm_head.lora_A.weight".

    Raises:
        ModelError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(adapter) / "adapter_model.safetensors"
    try:
        with safe_open(file, framework="np") as weights:
            return set(weights.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: is damaged ({first_line(error)}). Copy the adapter anew.") from error


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


def changes_its_base(config: Mapping[str, Any]) -> bool:
    """Tell whether loading the adapter of this configuration changes the base's own weights.

    PiSSA, OLoRA, CorDA and LoftQ take a part out of them, trained biases stand in their place, and layers may be
    repeated: with such an adapter switched off the base is another model than before.
    """
    start, bias = config.get("init_lora_weights"), config.get("bias")
    own_start = isinstance(start, str) and start.lower() not in ("gaussian", "eva", "orthogonal")
    return own_start or bias not in (None, "none") or bool(config.get("layer_replication"))


def attach_adapter(model: PreTrainedModel, adapter: str) -> PeftModel:
    """Load a PEFT adapter onto `model`, with every weight accounted for.

    PEFT only warns when weights of the adapter are missing or unused, and the adapter then works in part.

    Raises:
        ModelError: weights are missing, left over or of another shape; or the adapter has no weights inside the model
            but puts tokens of its own before each prompt.
    """
    from peft import PeftModel, get_peft_model_state_dict

    read_adapter_config(adapter)
    found = weight_names(adapter)
    try:
        peft_model = PeftModel.from_pretrained(model, adapter)
    except Exception as error:  # a damaged file makes the libraries raise anything
        raise ModelError(
            f"{adapter}: does not fit {model.config._name_or_path!r}, or is damaged ({first_line(error)}). "
            "Set source.base to the model the adapter was trained for, or copy the adapter anew."
        ) from error
    if peft_model.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"{adapter}: a {peft_model.active_peft_config.peft_type.value} adapter puts tokens of its own before each "
            "prompt, which TuneShift does not run. Give an adapter whose weights are inside the model, such as a LoRA."
        )
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

    Where layers share weights, an adapter of one of them is of that kind, since added in it would change both: where
    the output layer is the embeddings, and where layers are repeated. See `attach_adapter` for what is raised.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = attach_adapter(copy.deepcopy(model), adapter)
    ends = (adapted.get_input_embeddings(), adapted.get_output_embeddings())
    tied = model.config.get_text_config().tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends)
    if tied or read_adapter_config(adapter).get("layer_replication"):
        logger.info("%s: changes one of several layers that share weights, so it is not merged", adapter)
        return None
    try:
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except (AttributeError, ValueError, NotImplementedError) as error:
        logger.info("%s: cannot be merged (%s); it is switched on and off instead", adapter, first_line(error))
        return None
    merged.eval()
    return merged


def save_merged(base: str, adapter: str, folder: Path, options: LoadOptions) -> str:
    """Save a model with its adapter added in, tokenizer included, and return the folder.

    Raises:
        ModelError: see `attach_adapter`; or the adapter is of a kind that cannot be merged.
    """
    merged = merged_copy(load_causal_lm(base, replace(options, device="cpu")), adapter)
    if merged is None:
        raise ModelError(f"{adapter}: cannot be merged into its base, which this engine needs. Set engine.kind: hf.")
    merged.save_pretrained(folder)
    load_tokenizer(base, trust_remote_code=options.trust_remote_code).save_pretrained(folder)
    return str(folder)
