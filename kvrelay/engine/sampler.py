"""Chooses one token per row of logits, the same one alone and in any batch.

Order: penalties, logit bias, no ending before min_tokens, the grammar's mask, temperature, top-k,
top-p, min-p, choice. Log probabilities are of the model's logits, before all of this.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import xxhash
from torch import Tensor

from kvrelay.core.job import Token, TopLogprob
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.engine.truncation import CHUNK_LOGITS, ChunkedLogits, Truncation, in_chunks, least_kept
from kvrelay.errors import InternalError

MIN_TEMPERATURE = 1e-30  # colder is greedy anyway; float32 can divide by it
MIN_PENALTY = 1e-30
MAX_LOGIT = 1e30  # after repetition penalties: an infinite logit reports a broken model


@dataclass(frozen=True, slots=True)
class SamplingInput:
    sampling: SamplingParams  # seed resolved, unless greedy
    sequence: int  # its number within the request
    index: int  # output index of the token to choose
    prompt_token_ids: Sequence[int] = ()  # for the repetition penalty
    output_counts: Mapping[int, int] | None = None  # token -> times generated
    ending_token_ids: frozenset[int] = frozenset()  # forbidden before `min_tokens`
    allowed: bytes | None = None  # the grammar's mask, a bit per token; None: all


def sample(logits: Tensor, inputs: Sequence[SamplingInput]) -> list[Token]:
    """logits: float [len(inputs), vocab_size], not changed.

    Raises:
        InternalError: a row has no finite logits.
    """
    assert logits.shape[0] == len(inputs), "one input per row"
    if not inputs:
        return []
    with torch.inference_mode():
        raw = logits.float()
        chosen = _choose(_adjust(raw, inputs), inputs)  # int64 [num_rows]
        _check_finite(raw.gather(1, chosen.unsqueeze(1)))
        token_ids: list[int] = chosen.tolist()
        tokens = [Token(token_id) for token_id in token_ids]
        rows = [row for row, item in enumerate(inputs) if item.sampling.logprobs is not None]
        if rows:
            _attach_logprobs(tokens, rows, raw, inputs)
    return tokens


def uniform(seed: int, sequence: int, index: int) -> float:
    """A number in [0, 1) from the arguments alone, uniform over each of them.

    Counter-based, as in Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3"), with
    xxh3-64 as the mixing function. A retry has no state to restore.
    """
    return (xxhash.xxh3_64_intdigest(struct.pack("<QQQ", seed, sequence, index)) >> 11) * 2.0**-53


def _adjust(raw: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    rows = [row for row, item in enumerate(inputs) if _is_adjusted(item)]
    if not rows:
        return raw
    adjusted = raw.clone()
    for row in rows:
        _adjust_row(adjusted[row], raw[row], inputs[row])
    masks = {row: mask for row in rows if (mask := inputs[row].allowed) is not None}
    if masks:
        index = torch.tensor(list(masks), device=adjusted.device)
        allowed = _allowed(list(masks.values()), adjusted.shape[1]).to(adjusted.device)
        adjusted[index] = adjusted[index].masked_fill_(~allowed, -math.inf)
    return adjusted


def _allowed(masks: Sequence[bytes], vocab_size: int) -> Tensor:
    """bool [len(masks), vocab_size], False beyond a mask's end."""
    packed = np.zeros((len(masks), -(-vocab_size // 8)), dtype=np.uint8)
    for row, mask in enumerate(masks):
        num_bytes = min(len(mask), packed.shape[1])
        packed[row, :num_bytes] = np.frombuffer(mask, dtype=np.uint8, count=num_bytes)
    return torch.from_numpy(np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little").view(np.bool_))


def _is_adjusted(item: SamplingInput) -> bool:
    sampling = item.sampling
    is_masked = item.allowed is not None
    return is_masked or sampling.penalised or bool(sampling.logit_bias) or item.index < sampling.min_tokens


def _adjust_row(row: Tensor, raw: Tensor, item: SamplingInput) -> None:
    """In place; `raw` is the unchanged row."""
    sampling = item.sampling
    counts = item.output_counts or {}
    if sampling.repetition_penalty != 1.0:
        # Keskar et al. 2019, "CTRL", section 4.1, over prompt and output; negative logits are
        # multiplied. Computed from the raw row, so that a token in both is penalised once.
        for seen in (
            _prompt_tensor(tuple(item.prompt_token_ids), row.shape[0], row.device),
            _token_tensor(counts, row),
        ):
            values = raw[seen]
            penalty = max(sampling.repetition_penalty, MIN_PENALTY)
            row[seen] = torch.where(values > 0, values / penalty, values * penalty).clamp_(-MAX_LOGIT, MAX_LOGIT)
    if counts and (sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0):
        generated = {token_id: count for token_id, count in counts.items() if token_id < row.shape[0]}
        amounts = torch.tensor([float(count) for count in generated.values()], device=row.device)
        row[_token_tensor(generated, row)] -= sampling.presence_penalty + sampling.frequency_penalty * amounts
    if sampling.logit_bias:
        biases = {token_id: bias for token_id, bias in sampling.logit_bias.items() if token_id < row.shape[0]}
        row[_token_tensor(biases, row)] += torch.tensor(list(biases.values()), device=row.device)
    if item.index < sampling.min_tokens:
        row[_token_tensor(item.ending_token_ids, row)] = -math.inf


@lru_cache(maxsize=64)
def _prompt_tensor(token_ids: tuple[int, ...], vocab_size: int, device: torch.device) -> Tensor:
    return torch.tensor(
        sorted({token_id for token_id in token_ids if token_id < vocab_size}), dtype=torch.int64, device=device
    )


def _token_tensor(token_ids: Mapping[int, object] | set[int] | frozenset[int], row: Tensor) -> Tensor:
    """int64 [any], within the vocabulary."""
    return torch.tensor(
        [token_id for token_id in token_ids if token_id < row.shape[0]], dtype=torch.int64, device=row.device
    )


def _choose(logits: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:  # int64 [num_rows]
    random_rows = [row for row, item in enumerate(inputs) if item.sampling.temperature != 0.0]
    if not random_rows:
        return _likeliest(logits)
    if len(random_rows) == len(inputs):
        return _choose_randomly(logits, inputs)
    chosen = _likeliest(logits)
    rows = torch.tensor(random_rows, device=logits.device)
    chosen[rows] = _choose_randomly(logits[rows], [inputs[row] for row in random_rows])
    return chosen


def _likeliest(logits: Tensor) -> Tensor:
    """The first greatest logit, or the first NaN."""
    if logits.device.type == "cpu":
        # Vectorised, unlike torch's on a CPU: a tenth of its time.
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def _choose_randomly(logits: Tensor, inputs: Sequence[SamplingInput]) -> Tensor:
    """Inverse transform sampling over the kept tokens in order of their ids: int64 [num_rows].

    Weights are float32 like the logits, the rest is float64.
    """
    temperatures = _floats([max(item.sampling.temperature, MIN_TEMPERATURE) for item in inputs], logits).float()
    chunked = in_chunks(logits, temperatures)
    _check_finite(chunked.maxima)
    sums, least = _weigh(chunked, inputs)
    # [num_rows, 1 + num_chunks]: before each chunk
    cumulated = torch.nn.functional.pad(sums.cumsum(dim=-1), (1, 0))
    total = cumulated[:, -1:]
    uniforms = _floats([uniform(_seed(item), item.sequence, item.index) for item in inputs], logits)
    target = _below(uniforms[:, None] * total, total)
    # [num_rows, 1]
    chunk = torch.searchsorted(cumulated, target, right=True).clamp_(max=sums.shape[1]) - 1
    rows = torch.arange(len(inputs), device=logits.device)
    # [num_rows, CHUNK_LOGITS]
    inside = _kept_weights(chunked, rows, chunk[:, 0], least).double().cumsum(dim=-1)
    rest = _below(target - cumulated.gather(1, chunk), inside[:, -1:])
    token = torch.searchsorted(inside, rest, right=True).clamp_(max=CHUNK_LOGITS - 1)
    return (chunk * CHUNK_LOGITS + token).squeeze(1)


def _weigh(chunked: ChunkedLogits, inputs: Sequence[SamplingInput]) -> tuple[Tensor, Tensor]:
    """Kept weights by chunk, float64 [num_rows, num_chunks]; least kept logits, float32."""
    least = torch.full_like(chunked.maxima, -math.inf)
    truncated = [row for row, item in enumerate(inputs) if _is_truncated(item.sampling)]
    if not truncated:
        return chunked.weights().sum(dim=-1).double(), least
    sums = torch.zeros(chunked.chunk_maxima.shape, dtype=torch.float64, device=least.device)
    if len(truncated) < len(inputs):
        whole = torch.tensor(sorted(set(range(len(inputs))).difference(truncated)), device=least.device)
        sums[whole] = chunked.weights(whole).sum(dim=-1).double()
    index = torch.tensor(truncated, device=least.device)
    least[index] = least_kept(chunked, truncated, [_truncation(inputs[row].sampling) for row in truncated])
    # Few chunks have a kept token.
    places, chunks = (chunked.chunk_maxima[index] >= least[index, None]).nonzero(as_tuple=True)
    rows = index[places]
    sums[rows, chunks] = _kept_weights(chunked, rows, chunks, least).sum(dim=-1).double()
    return sums, least


def _kept_weights(chunked: ChunkedLogits, rows: Tensor, chunks: Tensor, least: Tensor) -> Tensor:
    """0 if not kept: float32 [len(rows), CHUNK_LOGITS]."""
    logits = chunked.chunks[rows, chunks]
    weights = (logits - chunked.maxima[rows, None]).div_(chunked.temperatures[rows, None]).exp_()
    return weights.masked_fill_(logits < least[rows, None], 0.0)


def _below(values: Tensor, limits: Tensor) -> Tensor:
    """Rounds down, so that a token with weight is found."""
    return torch.minimum(values, torch.nextafter(limits, torch.zeros_like(limits)))


def _check_finite(values: Tensor) -> None:
    if not all(map(math.isfinite, values.flatten().tolist())):
        raise InternalError(
            "the model gave logits that are not finite; its dtype may be too small: use bfloat16 or float32"
        )


def _seed(item: SamplingInput) -> int:
    assert item.sampling.seed is not None, "the seed is resolved at the gateway"
    return item.sampling.seed


def _is_truncated(sampling: SamplingParams) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _truncation(sampling: SamplingParams) -> Truncation:
    return Truncation(sampling.top_k, sampling.top_p, sampling.min_p)


def _floats(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)


def _attach_logprobs(tokens: list[Token], rows: Sequence[int], raw: Tensor, inputs: Sequence[SamplingInput]) -> None:
    logprobs = raw[torch.tensor(rows, device=raw.device)].log_softmax(dim=-1)
    chosen = torch.tensor([[tokens[row].token_id] for row in rows], device=raw.device)
    chosen_logprobs: list[float] = logprobs.gather(1, chosen).squeeze(1).tolist()
    num_top = min(max(inputs[row].sampling.logprobs or 0 for row in rows), raw.shape[1])
    top = logprobs.topk(num_top, dim=-1)
    top_logprobs: list[list[float]] = top.values.tolist()
    top_token_ids: list[list[int]] = top.indices.tolist()
    for number, row in enumerate(rows):
        alternatives = tuple(
            TopLogprob(token_id, logprob)
            for token_id, logprob in zip(top_token_ids[number], top_logprobs[number], strict=True)
        )
        tokens[row] = Token(
            tokens[row].token_id, chosen_logprobs[number], alternatives[: inputs[row].sampling.logprobs]
        )
