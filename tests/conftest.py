"""Tiny models of two architectures with a real tokenizer: everything runs for real, in seconds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tuneshift.run.directory import RunDirectory

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CORPUS = [
    "play some jazz by miles davis",
    "book a table for two in boston tonight",
    "what is the weather in paris tomorrow",
    "rate this novel five stars",
    "add this song to my workout playlist",
    "Request: find me the movie times nearby\nIntent: SearchScreeningEvent\n- play a song\n",
]
HOSTILE = [
    "<script>window.hit=1</script>", "</script><script>window.hit=1</script>", "<img src=x onerror=window.hit=1>",
    "<svg onload=window.hit=1>", "\"><img src=x onerror='window.hit=1'>", "' onmouseover='window.hit=1", "<!--", "-->",
    "<![CDATA[", "]]>", "{{ 7 * 7 }}", "{% raw %}", "{{ ''.__class__.__mro__ }}", "${window.hit=1}",
    "`${window.hit=1}`",
    "javascript:window.hit=1", "<a href='javascript:window.hit=1'>click</a>", "<iframe srcdoc='<script>1</script>'>",
    "<style>*{display:none}</style>", "<meta http-equiv=refresh content='0;url=https://example.com'>",
    "<base href='https://example.com/'>", "<link rel=stylesheet href='https://example.com/x.css'>",
    "\\u003cscript\\u003ewindow.hit=1", "\x1b[2J\x1b]0;title\x07\x9b31m", "\u202egpj.exe\u2066\u2069", "\u2028\u2029",
    "__proto__", "&lt;b&gt; &amp; &#x3c;", "\U000e0041\U000e0042\u200b\ufeff", "A" * 60_000,
]  # fmt: skip
"""What a model, or a name, may say to take over a page or a terminal: thirty ways."""


LONGEST_FILES = ("test_real_vllm", "test_launch", "test_real_models", "test_kill", "test_ray", "test_site")
"""Longest first, so that of two processes none has to wait long for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST_FILES.index(item.path.stem) if item.path.stem in LONGEST_FILES else 99)


@dataclass(frozen=True)
class Tiny:
    """Folders of tiny models: a Llama with an adapter, and a Gemma 3 with another vocabulary."""

    llama: Path
    adapter: Path
    gemma: Path


def make_tokenizer(vocab_size: int, *, bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    # Few characters, so that a random model writes a line break now and then.
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, *, scale: float, seed: int = 1) -> Path:
    """Save a LoRA whose B matrices are random with standard deviation `scale` (0: changes nothing)."""
    model = LlamaForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale) if scale else torch.nn.init.zeros_(parameter)
    peft_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("models")
    llama_tokenizer, gemma_tokenizer = make_tokenizer(44, bos=False), make_tokenizer(60, bos=True)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            num_hidden_layers=2,
            vocab_size=len(llama_tokenizer),
            max_position_embeddings=256,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )
    gemma = Gemma3ForCausalLM(
        Gemma3TextConfig(
            **sizes,
            head_dim=8,
            num_hidden_layers=6,
            vocab_size=len(gemma_tokenizer),
            max_position_embeddings=256,
            sliding_window=16,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
            initializer_range=0.2,
        )
    )
    save(llama, llama_tokenizer, root / "tiny-llama")
    save(gemma, gemma_tokenizer, root / "tiny-gemma")
    make_adapter(root / "tiny-llama", root / "adapter", scale=0.5)
    return Tiny(root / "tiny-llama", root / "adapter", root / "tiny-gemma")


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_project(folder: Path, tiny: Tiny, **sections: object) -> Path:
    """Write seeds, evaluation items and a configuration for a transfer between the tiny models."""
    write_jsonl(folder / "seeds.jsonl", [{"prompt": f"Request: {text}\nIntent:"} for text in CORPUS[:5]])
    write_jsonl(
        folder / "test.jsonl", [{"prompt": f"Request: {text} now\nIntent:", "reference": "x"} for text in CORPUS[:5]]
    )
    config: dict[str, object] = {
        "source": {"base": str(tiny.llama), "adapter": str(tiny.adapter)},
        "target": {"model": str(tiny.gemma)},
        "generator": {"model": "base", "max_new_tokens": 32},
        "seeds": "seeds.jsonl",
        "prompt_template": "Request: {text}\nIntent:",
        "synthesis": {
            "preset": "paper",
            "target_size": 12,
            "per_call": 5,
            "calls_per_round": 2,
            "demos": 3,
            "max_new_tokens": 24,
            "stop": ["\n"],
            "max_candidates": 400,
        },
        "criterion": {"name": "random", "keep_rate": 0.5},
        "distill": {"num_train_epochs": 2, "r": 2, "per_device_train_batch_size": 4},
        "evaluation": {"data": "test.jsonl"},
        "run": {"dtype": "float32"},
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values} if isinstance(values, dict) else values  # type: ignore[dict-item]
    path = folder / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


# --- a browser ---

PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
Open = Callable[..., "Page"]


@pytest.fixture(scope="module")  # no longer: while Playwright is open, asyncio cannot run anything else
def browser() -> Iterator[Browser]:
    """Debian's chromium; where there is none, the test is skipped."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        unsafe = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium refuses its own sandbox to root
        browser = playwright.chromium.launch(executable_path=chromium, args=unsafe)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open a run's page, or a file; prove at the end that it asked for nothing and that nothing went wrong in it."""
    contexts, seen = [], []

    def opened(run: RunDirectory | Path, viewport: Any = DESKTOP, **options: Any) -> Page:
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        address = (run if isinstance(run, Path) else run.page).resolve().as_uri()
        page.on("console", lambda message: seen.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url) if request.url != address else None)
        page.on("dialog", lambda dialog: (seen.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(address)
        page.wait_for_selector("html[data-ready=true]", state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert seen == []
