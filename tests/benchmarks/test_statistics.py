import pytest

from benchmarks.statistics import percentile, spread


def test_a_spread_has_the_median_and_the_ends() -> None:
    measured = spread([3.0, 1.0, 2.0, 10.0])
    assert (measured.num_values, measured.median, measured.min, measured.max) == (4, 2.5, 1.0, 10.0)
    assert measured.text() == "2.5 (1.0 to 10.0)"
    assert measured.text(0, factor=1000) == "2,500 (1,000 to 10,000)"


def test_one_measurement_has_no_spread_to_show() -> None:
    assert spread([2.0]).text() == "2.0"


def test_percentiles_of_one_value_and_of_many() -> None:
    assert percentile([7.0], 99) == 7.0
    assert percentile([float(value) for value in range(101)], 99) == pytest.approx(99.0)
