"""Checks a job before a worker reserves anything for it. Pure."""

from kvrelay.core.job import Job
from kvrelay.core.model_spec import ModelSpec
from kvrelay.core.sampling_params import MAX_SEQUENCES
from kvrelay.errors import InvalidRequestError

MAX_ATTEMPT = 1_000_000


def validate_job(job: Job, model: ModelSpec) -> None:
    """Protects the engine, where one bad index fails a whole step. Raises InvalidRequestError."""
    num_tokens = len(job.token_ids)
    check_num_tokens(num_tokens, model)
    if not job.job_id.request_id or not 1 <= job.job_id.attempt <= MAX_ATTEMPT:
        raise InvalidRequestError("job_id", f"needs a request_id, and an attempt in [1, {MAX_ATTEMPT}]")
    if not 1 <= job.num_prompt_tokens <= num_tokens:
        raise InvalidRequestError("num_prompt_tokens", f"is {job.num_prompt_tokens}; it must lie in [1, {num_tokens}]")
    if max(job.token_ids) >= model.vocab_size or min(job.token_ids) < 0:
        raise InvalidRequestError("token_ids", f"has ids outside of the vocabulary of {model.vocab_size}")
    if not 1 <= job.num_sequences <= MAX_SEQUENCES:
        raise InvalidRequestError("num_sequences", f"is {job.num_sequences}; it must lie in [1, {MAX_SEQUENCES}]")
    if job.num_sequences > 1 and job.first_index > 0:
        raise InvalidRequestError("num_sequences", "must be 1 when tokens were emitted already")
    _check_sampling(job, model)


def check_num_tokens(num_tokens: int, model: ModelSpec) -> None:
    """Before the tokens are looked at."""
    if num_tokens >= model.max_context_tokens:
        raise InvalidRequestError(
            "token_ids", f"has {num_tokens} tokens; the model's context holds {model.max_context_tokens}"
        )


def ends_with_first_token(job: Job, model: ModelSpec) -> bool:
    """Whether the next token surely is the last: then the KV is needed nowhere else."""
    assert job.sampling.max_tokens is not None, "checked"
    return job.first_index + 1 >= job.sampling.max_tokens or len(job.token_ids) + 1 >= model.max_context_tokens


def _check_sampling(job: Job, model: ModelSpec) -> None:
    sampling = job.sampling
    sampling.validate()
    if sampling.max_tokens is None or sampling.max_tokens <= job.first_index:
        raise InvalidRequestError(
            "sampling.max_tokens", f"must be set and above the {job.first_index} tokens emitted already"
        )
    if sampling.seed is None and not sampling.greedy:
        raise InvalidRequestError("sampling.seed", "must be set by the gateway")
    if any(not 0 <= token_id < model.vocab_size for token_id in (*sampling.logit_bias, *sampling.stop_token_ids)):
        raise InvalidRequestError("sampling", f"names a token outside of the vocabulary of {model.vocab_size}")
