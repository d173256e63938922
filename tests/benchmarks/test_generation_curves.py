import pytest

from benchmarks.generation_curves import GenerationCurve, interpolated, median_curve, num_equal, sampled_steps


def curve(*token_ms: float) -> GenerationCurve:
    return GenerationCurve("m", "kvrelay", True, 0, False, num_prompt_tokens=16, token_ms=token_ms)


def test_a_curve_adds_up_its_tokens() -> None:
    measured = curve(500.0, 100.0, 400.0)
    assert measured.total_s == pytest.approx(1.0)
    assert measured.tokens_per_s == pytest.approx(3.0)
    assert measured.lengths == [17, 18, 19]
    assert measured.cumulated_s == pytest.approx([0.5, 0.6, 1.0])


def test_sampled_steps_hold_the_first_and_the_last() -> None:
    assert sampled_steps(100, 50) == [0, 50, 99]
    assert sampled_steps(101, 50) == [0, 50, 100]
    assert sampled_steps(1, 50) == [0]


def test_what_was_not_timed_is_linear_between_what_was() -> None:
    assert interpolated([0, 2, 6], [10.0, 20.0, 60.0]) == pytest.approx([10, 15, 20, 30, 40, 50, 60])
    assert interpolated([0], [3.0]) == [3.0]


def test_interpolating_a_linear_cost_loses_nothing() -> None:
    cost = [5.0 + 2.0 * step for step in range(1000)]
    steps = sampled_steps(1000, 50)
    assert sum(interpolated(steps, [cost[step] for step in steps])) == pytest.approx(sum(cost))


def test_equal_tokens_are_counted_up_to_the_first_that_differs() -> None:
    assert num_equal([1, 2, 3], [1, 2, 4]) == 2
    assert num_equal([1, 2], [1, 2]) == 2
    assert num_equal([9], [1]) == 0


def test_the_median_curve_is_one_that_was_measured() -> None:
    curves = [curve(3000.0), curve(1000.0), curve(2000.0), curve(9000.0)]
    assert median_curve(curves) is curves[2]
