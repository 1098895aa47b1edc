"""The loss of step 4 (paper, eq. 1: NLL of the response tokens) in bounded memory.

The language-model head is evaluated on response rows only: with 262k words it is most of the work, and on every row it
would be several times that. Where these rows are more than fit into `HEAD_BYTES`, their logits are made piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LOGIT_BYTES = 12  # of a logit in training: bf16 value and gradient, fp32 value (kept as log-softmax) and gradient
HEAD_BYTES = 2**30  # for the logits of one piece: 341 rows of a 262k vocabulary; a guess


def response_loss(model: Any, inputs: Mapping[str, torch.Tensor], items: torch.Tensor | int | None) -> torch.Tensor:
    """Return the mean NLL in nats per labelled token (paper, eq. 1).

    Pieces cost a second forward pass of the head; rows that fit into one are computed in one go.

    Args:
        model: a causal language model, with LoRA layers or without.
        inputs: `input_ids`, `attention_mask` and `labels`, each of shape [batch, tokens]; -100 is no label.
        items: how many labelled tokens the whole optimizer step has; `None` for those of this batch.
    """
    from torch.nn.functional import cross_entropy, pad
    from torch.utils.checkpoint import checkpoint

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    next_labels = pad(inputs["labels"][:, 1:], (0, 1), value=-100)  # [batch, tokens]
    rows = next_labels != -100
    outputs = causal.base_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

    def piece_loss(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = head(causal, type(outputs)(last_hidden_state=hidden[None]))[0]
        return cross_entropy(logits.float(), labels, reduction="sum")

    size = rows_at_once(causal.get_output_embeddings().weight.shape[0])
    pieces = list(zip(outputs.last_hidden_state[rows].split(size), next_labels[rows].split(size), strict=True))
    if len(pieces) == 1:
        total = piece_loss(*pieces[0])
    else:
        total = sum(checkpoint(piece_loss, *piece, use_reentrant=False) for piece in pieces)
    return total / (rows.sum() if items is None else items)


def rows_at_once(vocabulary: int) -> int:
    """Return for how many rows logits of `vocabulary` words are held at once."""
    return max(1, HEAD_BYTES // (LOGIT_BYTES * vocabulary))


def logit_bytes(rows: int, vocabulary: int) -> int:
    """Return the bytes that the logits of `rows` labelled rows take in training; trl's head on CUDA holds less."""
    return min(rows, rows_at_once(vocabulary)) * vocabulary * LOGIT_BYTES


def head(causal: Any, outputs: Any) -> torch.Tensor:
    """Return the logits [batch, rows, words] that a model makes of its backbone's outputs.

    It is the model's own forward pass from there on: what a family does to its logits (a scale, a soft cap) is its own.
    """
    with _done(causal.base_model, outputs):
        logits: torch.Tensor = causal(inputs_embeds=outputs.last_hidden_state, use_cache=False).logits
    return logits


@contextmanager
def _done(backbone: Any, outputs: Any) -> Iterator[None]:
    """Let `backbone` return these outputs without computing anything."""
    own = vars(backbone).get("forward")
    backbone.forward = lambda *_, **__: outputs
    try:
        yield
    finally:
        del backbone.forward
        if own is not None:
            backbone.forward = own
