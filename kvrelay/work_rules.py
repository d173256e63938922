"""What a worker can serve: checks of one work against the served model, before anything is set aside for it. Pure."""

from kvrelay.errors import InvalidRequestError
from kvrelay.model_spec import ModelSpec
from kvrelay.sampling_params import MAX_SEQUENCES
from kvrelay.work import Work


def check_work(work: Work, model: ModelSpec) -> None:
    """Checks that the work can be run by this model at all.

    A gateway checks its clients' requests; this protects the engine, where one bad index would fail everybody's step.

    Raises:
        InvalidRequestError: names the field.
    """
    num_tokens = len(work.token_ids)
    if not work.work_id.request_id or work.work_id.attempt < 1:
        raise InvalidRequestError("work_id", "needs a request_id, and an attempt from 1 on")
    if not 1 <= work.num_prompt_tokens <= num_tokens:
        raise InvalidRequestError("num_prompt_tokens", f"is {work.num_prompt_tokens}; it must lie in [1, {num_tokens}]")
    if max(work.token_ids) >= model.vocab_size or min(work.token_ids) < 0:
        raise InvalidRequestError("token_ids", f"has ids outside of the vocabulary of {model.vocab_size}")
    if num_tokens >= model.max_context_tokens:
        raise InvalidRequestError("token_ids", f"has {num_tokens} tokens; the model's context holds {model.max_context_tokens}")
    if not 1 <= work.num_sequences <= MAX_SEQUENCES:
        raise InvalidRequestError("num_sequences", f"is {work.num_sequences}; it must lie in [1, {MAX_SEQUENCES}]")
    if work.num_sequences > 1 and work.first_index > 0:
        raise InvalidRequestError("num_sequences", "must be 1 when tokens were emitted already")
    _check_sampling(work, model)


def ends_with_first_token(work: Work, model: ModelSpec) -> bool:
    """Whether the work is known to end with the next token whatever it is, so that its KV cache is needed nowhere else."""
    assert work.sampling.max_tokens is not None, "checked"
    return work.first_index + 1 >= work.sampling.max_tokens or len(work.token_ids) + 1 >= model.max_context_tokens


def _check_sampling(work: Work, model: ModelSpec) -> None:
    sampling = work.sampling
    sampling.validate()
    if sampling.max_tokens is None or sampling.max_tokens <= work.first_index:
        raise InvalidRequestError("sampling.max_tokens", f"must be set and above the {work.first_index} tokens emitted already")
    if sampling.seed is None and not sampling.greedy:
        raise InvalidRequestError("sampling.seed", "must be set by the gateway")
    if any(not 0 <= token_id < model.vocab_size for token_id in (*sampling.logit_bias, *sampling.stop_token_ids)):
        raise InvalidRequestError("sampling", f"names a token outside of the vocabulary of {model.vocab_size}")
