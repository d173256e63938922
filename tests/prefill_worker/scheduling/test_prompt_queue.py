"""The order of prompts, which are computed in steps of a budget as the scheduler does it."""

from dataclasses import dataclass
from random import Random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from prefill_worker.scheduling.prompt_queue import PromptQueue


@dataclass(slots=True, eq=False)
class Prompt:
    number: int
    num_tokens: int
    num_remaining_tokens: int
    num_overtaken: int = 0
    share: str = ""
    share_weight: int = 1


def push(queue: PromptQueue[Prompt], number: int, num_tokens: int) -> Prompt:
    prompt = Prompt(number, num_tokens, num_tokens)
    queue.push(prompt)
    return prompt


def step(queue: PromptQueue[Prompt], budget: int) -> list[tuple[int, int]]:
    """(number, tokens) of those that got some."""
    given_tokens = []
    waiting = list(queue.in_order())
    for prompt in waiting:
        num_tokens = min(budget, prompt.num_remaining_tokens)
        if num_tokens == 0:
            break
        budget -= num_tokens
        prompt.num_remaining_tokens -= num_tokens
        queue.count_scheduled(prompt, num_tokens)
        given_tokens.append((prompt.number, num_tokens))
        for other in waiting:
            if other.number < prompt.number and other.num_remaining_tokens:
                other.num_overtaken += num_tokens
        if prompt.num_remaining_tokens == 0:
            queue.remove(prompt)
    return given_tokens


def test_short_prompts_are_computed_together_before_a_long_one() -> None:
    queue: PromptQueue[Prompt] = PromptQueue()
    for number, num_tokens in enumerate([20, 3, 2]):
        push(queue, number, num_tokens)
    assert step(queue, 8) == [(2, 2), (1, 3), (0, 3)]


def test_a_short_prompt_overtakes_a_long_one_between_two_chunks() -> None:
    queue: PromptQueue[Prompt] = PromptQueue()
    push(queue, 0, 40)
    assert step(queue, 8) == [(0, 8)]
    push(queue, 1, 5)
    assert step(queue, 8) == [(1, 5), (0, 3)]


def test_a_prompt_that_is_nearly_done_is_not_overtaken() -> None:
    queue: PromptQueue[Prompt] = PromptQueue()
    push(queue, 0, 10)
    step(queue, 8)
    push(queue, 1, 5)
    assert step(queue, 8) == [(0, 2), (1, 5)]


def test_prompts_of_equal_length_go_in_order_of_arrival() -> None:
    queue: PromptQueue[Prompt] = PromptQueue()
    for number in range(4):
        push(queue, number, 8)
    assert [step(queue, 8)[0][0] for _ in range(4)] == [0, 1, 2, 3]


def test_a_stream_of_short_prompts_does_not_starve_a_long_one() -> None:
    queue: PromptQueue[Prompt] = PromptQueue()
    long = push(queue, 0, 64)
    number = 0
    while long.num_remaining_tokens:
        for _ in range(4):  # twice what a step computes
            number += 1
            push(queue, number, 4)
        step(queue, 8)
    assert long.num_overtaken <= 64 + 8


@given(seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None, phases=[Phase.generate])
def test_nobody_is_overtaken_by_more_tokens_than_it_has_itself_and_one_step(seed: int) -> None:
    random = Random(seed)
    queue: PromptQueue[Prompt] = PromptQueue()
    budget = random.randint(1, 32)
    prompts: list[Prompt] = []
    for _ in range(60):
        for _ in range(random.choice([0, 0, 1, 3])):
            prompts.append(push(queue, len(prompts), random.choice([1, 2, 5, 30, 100])))
        before = [prompt.num_remaining_tokens for prompt in queue.in_order()]
        given_tokens = step(queue, budget)
        assert sum(num_tokens for _, num_tokens in given_tokens) == min(budget, sum(before)), "no token is left over"
    while step(queue, budget):
        pass
    assert all(prompt.num_overtaken <= prompt.num_tokens + budget for prompt in prompts)
    assert list(queue.in_order()) == []


def push_for(queue: PromptQueue[Prompt], share: str, number: int, num_tokens: int, weight: int = 1) -> Prompt:
    prompt = Prompt(number, num_tokens, num_tokens, share=share, share_weight=weight)
    queue.push(prompt)
    return prompt


def test_many_aged_prompts_of_one_share_do_not_go_before_a_short_one_of_another() -> None:
    queue: PromptQueue[Prompt] = PromptQueue()
    for number in range(50):
        push_for(queue, "greedy", number, 100)
    for number in range(100, 300):  # overtake all of them by more than they have
        push_for(queue, f"small {number}", number, 2)
        assert step(queue, 8)[0] == (number, 2)


def test_shares_get_tokens_by_their_weights() -> None:
    queue: PromptQueue[Prompt] = PromptQueue()
    heavy = push_for(queue, "heavy", 0, 10_000, weight=3)
    light = push_for(queue, "light", 1, 10_000)
    for _ in range(100):
        step(queue, 8)
    assert 10_000 - heavy.num_remaining_tokens == 600
    assert 10_000 - light.num_remaining_tokens == 200


def test_prompts_of_equal_shares_are_computed_shortest_first() -> None:
    queue: PromptQueue[Prompt] = PromptQueue()
    push_for(queue, "a", 0, 20)
    push_for(queue, "b", 1, 3)
    assert step(queue, 8) == [(1, 3), (0, 5)]
