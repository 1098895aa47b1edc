"""The table that `tuneshift size` prints."""

from __future__ import annotations

from typing import Any

from tuneshift.estimate import MOST_DEVICES


def estimate_lines(found: dict[str, Any]) -> list[str]:
    """Return an estimate as the lines of a table."""
    assumed, serving, training = found["assumed"], found["synthesis"], found["distillation"]
    copies = f" in each of {serving['copies']} copies" if serving["copies"] > 1 else ""

    def gib(values: dict[str, Any], key: str) -> str:
        return f"{values[key] / 2**30:.1f} GiB" if key in values else "-"

    rows = [("", "synthesis (F, B, G)", "distillation (T)")]
    rows.append(("devices", f"{serving['devices']}{copies}", str(training["devices"])))
    billions = [f"{part['parameters'] / 1e9:.2f} billion" for part in (serving, training)]
    rows.append(("parameters of B, of T", billions[0], billions[1]))
    for label, key in (
        ("weights", "weight_bytes"), ("key-value cache of a batch", "kv_cache_bytes"), ("logits", "logit_bytes"),
        ("adapter and its optimizer", "adapter_bytes"), ("activations of a device", "activation_bytes"),
        ("layers gathered on a device", "gathered_bytes"), ("each device needs", "bytes_per_device"),
        ("each device has", "available_bytes"),
    ):  # fmt: skip
        rows.append((label, gib(serving, key), gib(training, key)))
    fits = ["yes" if part["fits"] else "no" for part in (serving, training)]
    rows.append(("fits", fits[0], fits[1]))
    fewest = [str(part["fewest_devices"] or f"more than {MOST_DEVICES}") for part in (serving, training)]
    rows.append(("fewest devices", fewest[0], fewest[1]))
    table = [f"{label:<30}{one:<26}{two}".rstrip() for label, one, two in rows]
    times = ", ".join(f"{stage} {'n/a' if s is None else f'{s / 60:.1f}'}" for stage, s in found["seconds"].items())
    return [
        f"{assumed['device']}; prompts of {assumed['prompt_tokens']} tokens, "
        f"responses of {assumed['response_tokens']}, {assumed['keep_rate']:.0%} of candidates kept",
        *table,
        f"minutes: {times}",
    ]
