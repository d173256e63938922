"""Verifies drafts against sampled tokens, and applies the finish rules. Pure.

    sampled       a   b   c   d
    drafts        a   b   x
    next tokens   a   b   c        c is not x: drop x's row

A row after right drafts has the same context as without drafts, so speculation changes no token.
Leviathan et al. 2023, "Fast inference from transformers via speculative decoding", keep only the
distribution.
"""

from collections.abc import Sequence

from kvrelay.core.finish_rules import finish_reason
from kvrelay.core.job import SequenceToken, Token
from kvrelay.core.model_spec import ModelSpec
from kvrelay.worker.step import StepEntry


def accept_tokens(entries: Sequence[StepEntry], sampled: Sequence[Token], model: ModelSpec) -> list[SequenceToken]:
    """One token in and out for each continued sequence, in the order of entries.

    An entry with drafts takes one for each row, and returns one more for each right draft. No token
    follows one that ends its sequence.
    """
    tokens: list[SequenceToken] = []
    row = 0
    for entry in entries:
        index = entry.sequence.next_index
        if not entry.drafts:
            for number in entry.continued:
                tokens.append(_next_token(entry, number, index, sampled[row], model))
                row += 1
            continue
        (number,) = entry.continued
        tokens.extend(_verified(entry, number, sampled[row : row + entry.num_logits], model))
        row += entry.num_logits
    assert row == len(sampled), "one token per row"
    return tokens


def _verified(entry: StepEntry, number: int, sampled: Sequence[Token], model: ModelSpec) -> list[SequenceToken]:
    """Stops at the first that differs from its draft, or ends the sequence."""
    tokens: list[SequenceToken] = []
    for offset, token in enumerate(sampled):
        following = _next_token(entry, number, entry.sequence.next_index + offset, token, model)
        tokens.append(following)
        matches_draft = offset < len(entry.drafts) and entry.drafts[offset] == token.token_id
        if following.finish_reason is not None or not matches_draft:
            break
    return tokens


def _next_token(entry: StepEntry, number: int, index: int, token: Token, model: ModelSpec) -> SequenceToken:
    job = entry.sequence.job
    reason = finish_reason(token.token_id, index, job.num_prompt_tokens, job.sampling, model)
    return SequenceToken(job.job_id, number, index, token, reason)


def group_by_entry(entries: Sequence[StepEntry], tokens: Sequence[SequenceToken]) -> list[Sequence[SequenceToken]]:
    """Splits the result of `accept_tokens` by entry."""
    parts: list[Sequence[SequenceToken]] = []
    begin = 0
    for entry in entries:
        end = begin + len(entry.continued)
        if entry.drafts:
            first = tokens[begin]
            while end < len(tokens) and tokens[end].job_id == first.job_id and tokens[end].sequence == first.sequence:
                end += 1
        parts.append(tokens[begin:end])
        begin = end
    assert begin == len(tokens), "every token belongs to an entry"
    return parts
