"""From the tokens sampled in a step to the sequences' next tokens: keeps or drops drafts and applies the finish rules. Pure.

    rows of an entry     last token   draft 0   draft 1   draft 2
    sampled there             a          b         c         d
    drafts                    a          b         x
    next tokens               a          b         c                  c differs from x, so the row of x computed something else

A token is a function of the tokens before it and of (seed, sequence, index). As long as the drafts are what was sampled, each row
has seen what it would have seen without drafts, and so its token is the same: speculation changes no output, greedy or sampled.
(Leviathan et al. 2023, "Fast inference from transformers via speculative decoding", keep the distribution; this keeps the
tokens.)
"""

from collections.abc import Sequence

from kvrelay.finish_rules import finish_reason
from kvrelay.model_spec import ModelSpec
from kvrelay.step import StepEntry
from kvrelay.work import SequenceToken, Token


def next_tokens(entries: Sequence[StepEntry], sampled: Sequence[Token], model: ModelSpec) -> list[SequenceToken]:
    """The one place where both workers apply the finish rules.

    Args:
        entries: of a step.
        sampled: for each entry in order, one token for each of its continued sequences, or one for each row when it has drafts.
        model: the served model.

    Returns:
        For each entry in order, one token for each of its continued sequences; with drafts, one and as many more as were right.
        Nothing follows a token that ends its sequence.
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
    """Tokens up to the first that its draft does not foretell, or that ends the sequence."""
    tokens: list[SequenceToken] = []
    for offset, token in enumerate(sampled):
        following = _next_token(entry, number, entry.sequence.next_index + offset, token, model)
        tokens.append(following)
        is_foretold = offset < len(entry.drafts) and entry.drafts[offset] == token.token_id
        if following.finish_reason is not None or not is_foretold:
            break
    return tokens


def _next_token(entry: StepEntry, number: int, index: int, token: Token, model: ModelSpec) -> SequenceToken:
    work = entry.sequence.work
    reason = finish_reason(token.token_id, index, work.num_prompt_tokens, work.sampling, model)
    return SequenceToken(work.work_id, number, index, token, reason)


def tokens_of_entries(entries: Sequence[StepEntry], tokens: Sequence[SequenceToken]) -> list[Sequence[SequenceToken]]:
    """Which of the tokens that `next_tokens` gave belong to which entry."""
    parts: list[Sequence[SequenceToken]] = []
    begin = 0
    for entry in entries:
        end = begin + len(entry.continued)
        if entry.drafts:
            first = tokens[begin]
            while end < len(tokens) and tokens[end].work_id == first.work_id and tokens[end].sequence == first.sequence:
                end += 1
        parts.append(tokens[begin:end])
        begin = end
    assert begin == len(tokens), "every token belongs to an entry"
    return parts
