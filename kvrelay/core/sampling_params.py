"""The table of sampling parameters: a field of `SamplingParams` is a row, and all others read
`PARAMETERS`.
"""

# ruff: noqa: RUF009 - `row` makes a dataclass field

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

from kvrelay.core.bounds import check_count
from kvrelay.core.quoting import quoted
from kvrelay.core.response_format import ResponseFormat
from kvrelay.errors import InvalidRequestError

MAX_SEQUENCES = 8
DEFAULT_MAX_TOKENS = 256
_UNBOUNDED = 2**31
"""A range up to here is shown without its end."""


@dataclass(frozen=True, slots=True)
class Range:
    """[low, high], or (low, high] with `open_low`. Whole numbers where `low` is an int."""

    low: float
    high: float
    open_low: bool = False
    unit: str = ""

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.open_low else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        start = f"above {self.low:g}," if self.open_low else f"{self.low:g}"
        return f"{start} {'or more' if self.high >= _UNBOUNDED else f'to {self.high:g}'} {self.unit}".rstrip()

    def check(self, name: str, value: float) -> None:
        kind, wanted = (Integral, "a whole number") if isinstance(self.low, int) else (Real, "a number")
        if not isinstance(value, kind):
            raise InvalidRequestError(name, f"is {quoted(value)}; it must be {wanted}")
        if value not in self:
            raise InvalidRequestError(
                name, f"is {value}; it must lie in {'(' if self.open_low else '['}{self.low}, {self.high}]"
            )


_TOKEN_IDS = Range(0, 2**32 - 1)


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    type: Any
    default: Any
    help: str
    range: Range | None
    """Bounds a number, each of several numbers, or the bytes of each text."""
    max_entries: int | None
    shown_default: str

    @property
    def limits(self) -> str:
        entries = f"at most {self.max_entries} entries" if self.max_entries else ""
        return ", ".join(filter(None, [str(self.range or ""), entries]))

    @property
    def default_text(self) -> str:
        own = self.shown_default or f"{self.default:g}"
        return f"the model's, else {own}" if self.name in DEFAULTED_PARAMETERS else own

    def check_count(self, value: Any) -> None:
        """Before `value` is converted, which walks it."""
        if self.max_entries is not None:
            check_count(self.name, value, self.max_entries)

    def check(self, value: Any) -> None:
        """Raises InvalidRequestError for a wrong value, TypeError or AttributeError for a wrong
        type.
        """
        if value is None and self.default is None:
            return
        if self.max_entries is not None:
            self._check_entries(value, self.max_entries)
        elif self.range is not None:
            self.range.check(self.name, value)
        elif self.type is bool and value not in (True, False):
            raise InvalidRequestError(self.name, f"is {quoted(value)}; it must be true or false")

    def _check_entries(self, entries: Any, maximum: int) -> None:
        check_count(self.name, entries, maximum)
        keyed = isinstance(entries, Mapping)
        for key, entry in entries.items() if keyed else enumerate(entries):
            name = f"{self.name}[{key}]"
            if keyed:
                _TOKEN_IDS.check(name, key)
            assert self.range is not None, "a row with entries bounds each"
            if self.type != tuple[str, ...]:
                self.range.check(name, entry)
            elif (num_bytes := _num_bytes(name, entry)) not in self.range:
                raise InvalidRequestError(name, f"has {num_bytes} bytes; it must have {self.range}")


def _num_bytes(name: str, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequestError(name, "is not valid Unicode text: it has a lone surrogate") from None


def row(
    default: Any, help: str, range: Range | None = None, *, max_entries: int | None = None, shown_default: str = ""
) -> Any:  # Any: a type checker takes it as the default of any field
    """A callable default makes the value."""
    extra = {"help": help, "range": range, "max_entries": max_entries, "shown_default": shown_default}
    return (
        field(default_factory=default, metadata=extra) if callable(default) else field(default=default, metadata=extra)
    )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The gateway resolves `seed` and `max_tokens`."""

    temperature: float = row(1.0, "0 is greedy; otherwise logits are divided by it.", Range(0.0, 100.0))
    top_k: int = row(0, "Keep the k likeliest tokens; 0 keeps all.", Range(0, 2**31))
    # Nucleus sampling: Holtzman et al. 2020.
    top_p: float = row(1.0, "Keep the smallest set whose probability reaches this.", Range(0.0, 1.0, open_low=True))
    # Nguyen et al. 2024.
    min_p: float = row(0.0, "Drop tokens less likely than this share of the likeliest one's.", Range(0.0, 1.0))
    # CTRL: Keskar et al. 2019. Divides positive and multiplies negative logits.
    repetition_penalty: float = row(
        1.0, "Above 1 makes tokens of prompt and output less likely.", Range(0.0, 100.0, open_low=True)
    )
    presence_penalty: float = row(0.0, "Subtracted once from logits of generated tokens.", Range(-2.0, 2.0))
    frequency_penalty: float = row(0.0, "Subtracted from a token's logit each time it is generated.", Range(-2.0, 2.0))
    logit_bias: Mapping[int, float] = row(
        dict,
        "Added to the logits of single tokens, by token id.",
        Range(-100.0, 100.0),
        max_entries=1024,
        shown_default="none",
    )
    # A token's randomness is a function of (seed, sequence, index).
    seed: int | None = row(
        None, "Makes sampling repeatable.", Range(0, 2**64 - 1), shown_default="drawn by the gateway"
    )
    # The gateway applies it; workers know only tokens.
    stop: tuple[str, ...] = row(
        (),
        "Output ends before the first of these texts.",
        Range(1, 256, unit="bytes"),
        max_entries=16,
        shown_default="none",
    )
    stop_token_ids: tuple[int, ...] = row(
        (), "Output ends with the first of these tokens.", _TOKEN_IDS, max_entries=64, shown_default="none"
    )
    min_tokens: int = row(0, "No end of sequence and no stop token before this many tokens.", Range(0, 2**31))
    max_tokens: int | None = row(
        None,
        "Most tokens to generate per sequence.",
        Range(1, 2**31),
        shown_default=f"{DEFAULT_MAX_TOKENS}, or what the context has room for",
    )
    ignore_eos: bool = row(False, "Go on after the end-of-sequence token.", shown_default="off")
    logprobs: int | None = row(
        None, "Log probabilities of tokens, with this many alternatives.", Range(0, 20), shown_default="none"
    )
    n: int = row(1, "How many sequences to generate from the one prompt.", Range(1, MAX_SEQUENCES))
    response_format: ResponseFormat | None = row(
        None, "JSON schema, regular expression or grammar that the output follows.", shown_default="any text"
    )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def validate(self) -> None:
        """Makes the checks that need no model."""
        for name, parameter in PARAMETERS.items():
            parameter.check(getattr(self, name))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError("min_tokens", f"is {self.min_tokens}; it must lie between 0 and max_tokens")
        if self.response_format is not None:
            self._validate_response_format(self.response_format)

    def _validate_response_format(self, response_format: ResponseFormat) -> None:
        response_format.validate()
        if self.min_tokens > 0:
            raise InvalidRequestError(
                "min_tokens",
                f"is {self.min_tokens}; with a response_format it must be 0, "
                "because the response format says where output may end",
            )
        if self.ignore_eos:
            raise InvalidRequestError(
                "ignore_eos", "must be off with a response_format: nothing can follow the response format's end"
            )


PARAMETERS = {
    each.name: Parameter(each.name, each.type, each.default, **each.metadata) for each in fields(SamplingParams)
}


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a model's authors recommend. None: kvrelay's own default holds."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def apply(self, sampling: SamplingParams, given: Collection[str]) -> SamplingParams:
        """Replaces the parameters that are not in `given`."""
        return replace(sampling, **{name: value for name, value in self.stated().items() if name not in given})

    def stated(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


DEFAULTED_PARAMETERS = tuple(each.name for each in fields(SamplingDefaults))
