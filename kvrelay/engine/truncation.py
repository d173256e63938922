"""Finds the least logit that top-k, top-p and min-p keep, without sorting the vocabulary.

    chunks      | 64 logits | 64 logits | ...      a row in pieces, each with its maximum
    candidates  the 64 greatest logits             nearly always enough; else 1,024, else all

Ties with the last kept token are kept too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK_LOGITS = 64
CANDIDATE_STEPS = (64, 1024)


@dataclass(frozen=True, slots=True)
class Truncation:
    top_k: int
    top_p: float
    min_p: float


@dataclass(frozen=True, slots=True)
class ChunkedLogits:
    chunks: Tensor  # float32 [num_rows, num_chunks, CHUNK_LOGITS], padded with -inf
    chunk_maxima: Tensor  # float32 [num_rows, num_chunks]
    maxima: Tensor  # float32 [num_rows]
    temperatures: Tensor  # float32 [num_rows], above 0

    @property
    def num_tokens(self) -> int:
        return self.chunks.shape[1] * CHUNK_LOGITS

    def weights(self, rows: Tensor | None = None) -> Tensor:
        """exp((logit - greatest) / temperature), shaped like `chunks`."""
        if rows is None:
            return (self.chunks - self.maxima[:, None, None]).div_(self.temperatures[:, None, None]).exp_()
        shifted = self.chunks[rows].sub_(self.maxima[rows, None, None])
        return shifted.div_(self.temperatures[rows, None, None]).exp_()


def in_chunks(logits: Tensor, temperatures: Tensor) -> ChunkedLogits:
    """A view if possible."""
    num_missing = -logits.shape[1] % CHUNK_LOGITS
    if num_missing:
        logits = torch.nn.functional.pad(logits, (0, num_missing), value=-math.inf)
    chunks = logits.reshape(logits.shape[0], -1, CHUNK_LOGITS)
    chunk_maxima = chunks.amax(dim=-1)
    return ChunkedLogits(chunks, chunk_maxima, chunk_maxima.amax(dim=-1), temperatures)


def least_kept(logits: ChunkedLogits, rows: Sequence[int], truncations: Sequence[Truncation]) -> Tensor:
    """float32 [len(rows)].

    top-k (Fan et al. 2018), then top-p of the rest (Holtzman et al. 2020, "The curious case of
    neural text degeneration"), then min-p (Nguyen et al. 2024, "Turning up the heat").
    """
    index = torch.tensor(rows, device=logits.chunks.device)
    log_min_p = [math.log(item.min_p) if item.min_p > 0.0 else -math.inf for item in truncations]
    by_min_p = logits.maxima[index].double() + logits.temperatures[index].double() * _floats(log_min_p, index)
    least = by_min_p.float()
    totals = _totals(logits, index, truncations)
    undecided = [place for place, item in enumerate(truncations) if item.top_k > 0 or item.top_p < 1.0]
    for num_candidates in (*CANDIDATE_STEPS, logits.num_tokens):
        if not undecided:
            break
        places = torch.tensor(undecided, device=index.device)
        chosen = [truncations[place] for place in undecided]
        by_rank, decided = _by_rank(logits, index[places], chosen, totals[places], num_candidates)
        least[places] = torch.maximum(least[places], by_rank)
        undecided = [place for place, is_decided in zip(undecided, decided.tolist(), strict=True) if not is_decided]
    return least


def _totals(logits: ChunkedLogits, rows: Tensor, truncations: Sequence[Truncation]) -> Tensor:
    """float64 [len(rows)]: 0 unless a row has top-p but no top-k."""
    totals = torch.zeros(len(truncations), dtype=torch.float64, device=rows.device)
    of_all = [
        place for place, item in enumerate(truncations) if item.top_p < 1.0 and not 0 < item.top_k < logits.num_tokens
    ]
    if of_all:
        places = torch.tensor(of_all, device=rows.device)
        totals[places] = logits.weights(rows[places]).sum(dim=-1).double().sum(dim=-1)
    return totals


def _by_rank(
    logits: ChunkedLogits, rows: Tensor, truncations: Sequence[Truncation], totals: Tensor, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """Least logits by top-k and top-p, -inf if the candidates do not suffice."""
    num_tokens = logits.num_tokens
    num_candidates = min(num_candidates, num_tokens)
    # [len(rows), num_candidates], falling
    candidates = _greatest_logits(logits, rows, num_candidates)
    top_ks = torch.tensor([min(item.top_k or num_tokens, num_tokens) for item in truncations], device=rows.device)
    top_ps = _floats([item.top_p for item in truncations], rows)
    is_limited, has_top_p = top_ks < num_tokens, top_ps < 1.0
    shifted = candidates.double().sub_(logits.maxima[rows, None]).div_(logits.temperatures[rows, None])
    cumulated = shifted.exp_().cumsum(dim=-1)
    last_k = top_ks.sub(1).clamp_(max=num_candidates - 1)[:, None]
    mass = torch.where(is_limited, cumulated.gather(1, last_k)[:, 0], totals)
    # First place where the cumulated mass reaches the needed mass.
    last_p = torch.searchsorted(cumulated, (mass * top_ps)[:, None])
    decided = (~is_limited | (top_ks <= num_candidates)) & (~has_top_p | (last_p[:, 0] < num_candidates))
    decided |= num_candidates == num_tokens
    by_top_k = torch.where(is_limited, candidates.gather(1, last_k)[:, 0], -math.inf)
    by_top_p = torch.where(has_top_p, candidates.gather(1, last_p.clamp_(max=num_candidates - 1))[:, 0], -math.inf)
    return torch.where(decided, torch.maximum(by_top_k, by_top_p), -math.inf), decided


def _greatest_logits(logits: ChunkedLogits, rows: Tensor, num_candidates: int) -> Tensor:
    """[len(rows), num_candidates], falling."""
    if num_candidates >= logits.chunks.shape[1]:
        return _greatest(logits.chunks[rows].flatten(1), num_candidates)
    # A chunk outside of the best `num_candidates` by maximum has no candidate, except for ties.
    likeliest = logits.chunk_maxima[rows].topk(num_candidates, dim=-1, sorted=False).indices
    return _greatest(logits.chunks[rows[:, None], likeliest].flatten(1), num_candidates)


def _greatest(values: Tensor, number: int) -> Tensor:  # [num_rows, number], falling
    if values.device.type != "cpu":
        return values.topk(number, dim=-1).values
    # NumPy's partition and sort are vectorised: a tenth of torch's time on a CPU.
    array = values.numpy()
    begin = array.shape[1] - number
    if begin > 0:
        array = np.partition(array, begin, axis=-1)[:, begin:]
    return torch.from_numpy(np.sort(array, axis=-1)[:, ::-1].copy())


def _floats(values: Sequence[float], like: Tensor) -> Tensor:  # float64 [len(values)]
    return torch.tensor(values, dtype=torch.float64, device=like.device)
