"""Chooses one token per row of logits. The same row gives the same token alone, in any batch, and whenever it is run again.

Order: penalties, logit bias, no ending before min_tokens, temperature, top-k, top-p, min-p, choice. Log probabilities are those
of the model: of the logits before any of this. Knows nothing of sequences' ends; `kvrelay.finish_rules` does.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from kvrelay.errors import InternalError
from kvrelay.sampling_params import SamplingParams
from kvrelay.work import Token, TopLogprob

NUM_CANDIDATES = 1024
"""So many of the likeliest tokens are looked at first for top-p; all of them are sorted only where these do not reach it."""


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """What the choice of one row's token depends on, besides its logits."""

    sampling: SamplingParams
    """With its seed resolved, unless greedy."""
    sequence: int
    """Number of the sequence within its request."""
    index: int
    """Output index of the token to choose."""
    prompt_token_ids: Sequence[int] = ()
    """The client's prompt; for the repetition penalty."""
    output_counts: Mapping[int, int] | None = None
    """How often each token was generated."""
    ending_token_ids: frozenset[int] = frozenset()
    """Not chosen before `min_tokens`."""


def sample(logits: Tensor, inputs: Sequence[SamplingInput]) -> list[Token]:
    """Chooses a token for every row.

    Args:
        logits: float [len(inputs), vocab_size], as the model gave them; not changed.
        inputs: one per row.

    Returns:
        One token per row, with log probabilities where they were asked for.

    Raises:
        InternalError: a row holds no usable numbers.
    """
    assert logits.shape[0] == len(inputs), "one input per row"
    if not inputs:
        return []
    raw = logits.float()
    chosen = _choose(_adjust(raw, inputs), inputs)  # int64 [num_rows]
    token_ids: list[int] = chosen.tolist()
    _check_finite(raw.gather(1, chosen.unsqueeze(1)))
    tokens = [Token(token_id) for token_id in token_ids]
    rows = [row for row, item in enumerate(inputs) if item.sampling.logprobs is not None]
    if rows:
        _attach_logprobs(tokens, rows, raw, inputs)
    return tokens


def uniform(seed: int, sequence: int, index: int) -> float:
    """A number in [0, 1) that depends on the three alone, uniform over any of them.

    Counter-based, as in Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"), with xxh3-64 as the mixing function:
    there is no state that a retry would have to restore.
    """
    return (xxhash.xxh3_64_intdigest(struct.pack("<QQQ", seed, sequence, index)) >> 11) * 2.0**-53


def _adjust(raw: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    """Penalties, bias and min_tokens. Copies only when some row needs it."""
    rows = [row for row, item in enumerate(inputs) if _is_adjusted(item)]
    if not rows:
        return raw
    adjusted = raw.clone()
    for row in rows:
        _adjust_row(adjusted[row], inputs[row])
    return adjusted


def _is_adjusted(item: SamplingInput) -> bool:
    sampling = item.sampling
    penalised = sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
    return penalised or bool(sampling.logit_bias) or item.index < sampling.min_tokens


def _adjust_row(row: Tensor, item: SamplingInput) -> None:
    """Changes one row [vocab_size] in place."""
    sampling = item.sampling
    counts = item.output_counts or {}
    if sampling.repetition_penalty != 1.0:
        # Keskar et al. 2019, "CTRL", section 4.1; over prompt and output, and for negative logits a product, as is customary.
        seen = _token_tensor({*item.prompt_token_ids, *counts}, row)
        values = row[seen]
        penalty = sampling.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if counts and (sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0):
        generated = {token_id: count for token_id, count in counts.items() if token_id < row.shape[0]}
        amounts = torch.tensor([float(count) for count in generated.values()], device=row.device)
        row[_token_tensor(generated, row)] -= sampling.presence_penalty + sampling.frequency_penalty * amounts
    if sampling.logit_bias:
        biases = {token_id: bias for token_id, bias in sampling.logit_bias.items() if token_id < row.shape[0]}
        row[_token_tensor(biases, row)] += torch.tensor(list(biases.values()), device=row.device)
    if item.index < sampling.min_tokens:
        row[_token_tensor(item.ending_token_ids, row)] = -math.inf


def _token_tensor(token_ids: Mapping[int, object] | set[int] | frozenset[int], row: Tensor) -> Tensor:
    """Those of the token ids that the vocabulary has: int64 [any]."""
    return torch.tensor([token_id for token_id in token_ids if token_id < row.shape[0]], dtype=torch.int64, device=row.device)


def _choose(logits: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    """The chosen token of each row: int64 [num_rows]."""
    random_rows = [row for row, item in enumerate(inputs) if not item.sampling.greedy]
    if not random_rows:
        return logits.argmax(dim=-1)
    if len(random_rows) == len(inputs):
        return _choose_randomly(logits, inputs)
    chosen = logits.argmax(dim=-1)
    rows = torch.tensor(random_rows, device=logits.device)
    chosen[rows] = _choose_randomly(logits[rows], [inputs[row] for row in random_rows])
    return chosen


def _choose_randomly(logits: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    """Inverse transform sampling in float64 over the kept tokens in order of their ids: int64 [num_rows]."""
    shifted = logits.double()
    shifted -= shifted.max(dim=-1, keepdim=True).values
    shifted /= _column([item.sampling.temperature for item in inputs], logits)
    weights = shifted.exp()
    rows = [row for row, item in enumerate(inputs) if _is_truncated(item.sampling)]
    if rows:
        index = torch.tensor(rows, device=logits.device)
        kept = shifted[index]
        thresholds = _thresholds(kept, weights[index].sum(dim=-1), [inputs[row].sampling for row in rows])
        weights[index] = weights[index].masked_fill(kept < thresholds, 0.0)
    cumulated = weights.cumsum(dim=-1)  # [num_rows, vocab_size]
    total = cumulated[:, -1:]
    _check_finite(total)
    uniforms = _column([uniform(_seed(item), item.sequence, item.index) for item in inputs], logits)
    # Below the total even when the product rounds up to it, so that a token of some weight is found.
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    chosen = torch.searchsorted(cumulated, target, right=True).squeeze(1)
    return chosen.clamp(max=logits.shape[1] - 1)


def _check_finite(values: Tensor) -> None:
    """A row with a NaN or an infinity gives one here: as the likeliest logit, or in the sum of weights."""
    if not bool(torch.isfinite(values).all()):
        raise InternalError("the model gave logits that are not finite; its dtype may be too small: use bfloat16 or float32")


def _seed(item: SamplingInput) -> int:
    assert item.sampling.seed is not None, "the seed is resolved at the gateway"
    return item.sampling.seed


def _is_truncated(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _thresholds(shifted: Tensor, total: Tensor, samplings: Sequence[SamplingParams]) -> Tensor:
    """Least shifted logit that is kept, per row: [num_rows, 1]. Tokens that tie with the last one kept are kept too.

    top-k (Fan et al. 2018), then top-p of what is left (Holtzman et al. 2020, "The curious case of neural text degeneration"),
    then min-p (Nguyen et al. 2024, "Turning up the heat").

    Args:
        shifted: float64 [num_rows, vocab_size], logits over temperature with a maximum of 0.
        total: float64 [num_rows], sum of exp(shifted).
        samplings: one per row.
    """
    vocab_size = shifted.shape[1]
    top_ks = [min(sampling.top_k or vocab_size, vocab_size) for sampling in samplings]
    limited = [top_k for top_k in top_ks if top_k < vocab_size]
    num_candidates = min(vocab_size, max([NUM_CANDIDATES, *limited]))
    while True:
        candidates = shifted.topk(num_candidates, dim=-1).values  # [num_rows, num_candidates], falling
        cumulated = candidates.exp().cumsum(dim=-1)
        last_k = torch.tensor([min(top_k, num_candidates) - 1 for top_k in top_ks], device=shifted.device).unsqueeze(1)
        is_limited = torch.tensor([top_k < vocab_size for top_k in top_ks], device=shifted.device).unsqueeze(1)
        mass = torch.where(is_limited, cumulated.gather(1, last_k), total.unsqueeze(1))
        needed = mass * _column([sampling.top_p for sampling in samplings], shifted)
        last_p = torch.searchsorted(cumulated, needed)  # first position whose cumulated mass reaches what is needed
        has_top_p = torch.tensor([sampling.top_p < 1.0 for sampling in samplings], device=shifted.device).unsqueeze(1)
        if num_candidates == vocab_size or not bool((has_top_p & (last_p >= num_candidates)).any()):
            break
        num_candidates = vocab_size
    by_top_k = torch.where(is_limited, candidates.gather(1, last_k), -math.inf)
    by_top_p = torch.where(has_top_p, candidates.gather(1, last_p.clamp(max=num_candidates - 1)), -math.inf)
    by_min_p = _column([math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf for sampling in samplings], shifted)
    return torch.maximum(torch.maximum(by_top_k, by_top_p), by_min_p)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """float64 [len(values), 1]"""
    return torch.tensor(values, dtype=torch.float64, device=like.device).unsqueeze(1)


def _attach_logprobs(tokens: list[Token], rows: Sequence[int], raw: Tensor, inputs: Sequence[SamplingInput]) -> None:
    """Replaces the tokens of these rows by ones with log probabilities."""
    logprobs = raw[torch.tensor(rows, device=raw.device)].log_softmax(dim=-1)
    chosen = torch.tensor([[tokens[row].token_id] for row in rows], device=raw.device)
    chosen_logprobs: list[float] = logprobs.gather(1, chosen).squeeze(1).tolist()
    num_top = min(max(inputs[row].sampling.logprobs or 0 for row in rows), raw.shape[1])
    top = logprobs.topk(num_top, dim=-1)
    top_logprobs: list[list[float]] = top.values.tolist()
    top_token_ids: list[list[int]] = top.indices.tolist()
    for number, row in enumerate(rows):
        alternatives = tuple(
            TopLogprob(token_id, logprob) for token_id, logprob in zip(top_token_ids[number], top_logprobs[number], strict=True)
        )
        tokens[row] = Token(tokens[row].token_id, chosen_logprobs[number], alternatives[: inputs[row].sampling.logprobs])
