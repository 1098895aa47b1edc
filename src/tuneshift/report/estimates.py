"""What `tuneshift plan` and `tuneshift size` print."""

from __future__ import annotations

from typing import Any

from tuneshift.estimate import MOST_DEVICES
from tuneshift.evaluate.verdict import detectable_sentence


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


def plan_lines(estimate: dict[str, Any]) -> list[str]:
    """Return a plan as lines for a terminal."""
    needed, interval = estimate["candidates_needed"], estimate["keep_rate_interval"]
    seconds, tokens = estimate["synthesis_seconds"], estimate["generated_tokens"]
    evaluation, unknown = estimate["evaluation_seconds"], estimate["evaluation_reason"]
    reasons = ", ".join(f"{reason} {count}" for reason, count in estimate["reasons"].items())
    return [
        *(f"warning: {warning}" for warning in estimate["checks"]["warnings"]),
        f"adapter effect on the seeds: {estimate['checks']['adapter_effect']:.2f} nats",
        f"probe: {estimate['probe']['candidates']} candidates: {reasons}",
        f"keep rate: {estimate['keep_rate']:.0%} (95 % interval {interval['low']:.0%} to {interval['high']:.0%})",
        f"candidates needed: {needed if needed is not None else 'n/a (' + estimate['note'] + ')'}",
        f"synthesis: {f'about {seconds:.0f} s, {tokens} generated tokens' if seconds is not None else 'n/a'}",
        *_api_lines(estimate["generator_usage"]),
        f"training: about {estimate['training_seconds']:.0f} s for {estimate['training_steps']} steps",
        f"evaluation: {f'n/a ({unknown})' if evaluation is None else f'about {evaluation:.0f} s'}",
        *([detectable_sentence(estimate["questions"])] if estimate["questions"] else []),
        f"peak memory so far: {estimate['peak_memory_bytes'] / 2**30:.1f} GiB",
    ]


def _api_lines(usage: dict[str, float | None] | None) -> list[str]:
    if usage is None:
        return []
    prompt, written, cost = usage["prompt_tokens"], usage["completion_tokens"], usage["cost"]
    if prompt is None or written is None:
        return ["generator's API: n/a"]
    price = "no prices are configured" if cost is None else f"cost {cost:.4g} in the currency of the prices"
    return [f"generator's API: about {prompt:.0f} prompt tokens and {written:.0f} written tokens; {price}"]
