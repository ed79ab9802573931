"""How well a model predicts text it has not seen: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.errors import DataError
from llmtrain.loader.batches import Batch
from llmtrain.loader.dataset import NO_TARGET
from llmtrain.model.transformer import Transformer


@torch.no_grad()
def held_out_loss(
    model: Transformer, batches: Iterable[Batch], *, device: torch.device | str = "cpu"
) -> tuple[float, int]:
    """Return the summed loss in nats and the number of targets: sums, so that parts can be added up."""
    loss_sum, num_targets = 0.0, 0
    for batch in batches:
        there = batch.to(torch.device(device))
        loss_sum += float(
            model(there.tokens_BS, there.positions_BS, there.segments_BS, targets_BS=there.targets_BS)
        )
        num_targets += there.num_valid
    return loss_sum, num_targets


@torch.no_grad()
def losses_of_tokens(model: Transformer, batch: Batch, *, device: torch.device | str = "cpu") -> Tensor:
    """Return the loss of each target in nats, [B, S] on the CPU in fp32; 0 where there is no target.

    A row at a time, because logits of a whole batch would not fit where its loss does.
    """
    there, rows = batch.to(torch.device(device)), []
    for row in range(len(batch.tokens_BS)):
        one = slice(row, row + 1)
        logits_SV = model(there.tokens_BS[one], there.positions_BS[one], there.segments_BS[one])[0].float()
        rows.append(
            F.cross_entropy(logits_SV, there.targets_BS[row], ignore_index=NO_TARGET, reduction="none").cpu()
        )
    return torch.stack(rows)


def perplexity(loss_sum: float, num_targets: int) -> float:
    """exp of the mean loss; infinite when that is past what a float holds."""
    if num_targets < 1:
        raise DataError("the held-out rows have no targets; run `llmtrain data` with a larger held-out share")
    mean = loss_sum / num_targets
    return math.exp(mean) if mean < 700 else math.inf


def bits_per_byte(loss_sum: float, *, num_documents: int, vocab_size: int, text_bytes: int) -> float:
    """Bits that a coder driven by the model spends on a byte of the text.

    A document's first token has nothing before it and so no prediction. It is charged log2(vocab_size) bits,
    the price of any token under a uniform code: without that the model would get a share of the text for
    nothing, which gzip does not. The ends of documents are paid for too (EOS is a target), which gzip does
    not pay.
    """
    if text_bytes < 1:
        raise DataError("the held-out split has no text; run `llmtrain data` with a larger held-out share")
    return (loss_sum / math.log(2) + num_documents * math.log2(vocab_size)) / text_bytes
