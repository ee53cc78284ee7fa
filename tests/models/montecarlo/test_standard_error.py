"""The standard error against the true error, for a network all of whose masks can be listed."""

import pytest

from bench.standard_error import study


@pytest.fixture(scope="module")
def rows():
    return list(study("stratified"))


def test_its_root_mean_square_is_the_true_error_at_any_rate_and_any_number_of_samples(rows):
    assert len(rows) == 42
    for row in rows:
        assert row["reported/true"] == pytest.approx(1, abs=0.04), row


def test_students_interval_covers_the_mean_where_the_normal_one_does_not(rows):
    for row in rows:
        if row["p"] >= 0.2:  # below, the means of so few units are far from a normal distribution
            assert row["covered"] > 0.9, row
        if row["samples"] == 20:
            assert row["covered_normal"] < 0.7, row


def test_the_variance_and_the_bias_of_mutual_information_are_as_documented(rows):
    for row in rows:
        assert row["unbiased/true"] == pytest.approx(1, abs=0.01), row
        if row["samples"] == 20:
            assert row["variance/true"] > 1.02, row
        if row["p"] <= 0.5:  # above, the noise of so many seeds is as large as the bias
            gap = row["information_bias"] - row["predicted_bias"]
            assert abs(gap) < 2e-4 + 0.3 * abs(row["predicted_bias"]), row
