"""Intervals and rank correlations against what is known about them."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given

from kvpolicy.evaluation.statistics import Ratio, rank_correlation
from strategies import PAIRS_WITH_TIES


def mean_of(values):
    """A mean, one value per sample."""
    return Ratio(np.asarray(values, float), np.ones(len(values)))


def test_the_interval_of_a_normal_mean_is_the_textbooks():
    """Two hundred draws: the ends lie 1.96 standard errors beside the mean, within a tenth."""
    values = np.random.default_rng(1).normal(3.0, 2.0, 200)
    low, high = mean_of(values).interval
    error = values.std() / np.sqrt(200)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Of 400 experiments with 30 samples each, between 90 and 97 % cover the true mean."""
    generator = np.random.default_rng(2)
    intervals = [mean_of(generator.exponential(1.0, 30)).interval for _ in range(400)]
    covered = sum(low <= 1.0 <= high for low, high in intervals) / 400
    assert 0.90 <= covered <= 0.97


def test_pairing_takes_out_what_samples_have_in_common():
    """A constant difference is certain, however much the samples themselves vary."""
    values = np.random.default_rng(3).normal(0.0, 100.0, 20)
    shifted = mean_of(values + 0.5)
    assert shifted.difference_interval(mean_of(values)) == pytest.approx((0.5, 0.5))
    low, high = shifted.interval
    assert high - low > 40


def test_samples_weigh_by_their_tokens():
    """A ratio is pooled: nine tokens of one sample count nine times one token of the other."""
    ratio = Ratio(np.array([9.0, 0.0]), np.array([9.0, 1.0]))
    assert ratio.value == 0.9
    assert ratio.interval == (0.0, 1.0)


def test_one_sample_has_no_interval():
    """Nothing can be drawn again from a single sample."""
    assert mean_of([1.0]).interval is None
    assert mean_of([1.0]).difference_interval(mean_of([2.0])) is None


def test_intervals_repeat():
    """The draws are the same in every process and every call."""
    values = np.arange(10.0)
    assert mean_of(values).interval == mean_of(values).interval == (2.7, 6.2)


@given(PAIRS_WITH_TIES)
def test_rank_correlation_is_spearmans(pairs):
    """Ties included, equal to scipy's; NaN where one side has no order."""
    first, second = zip(*pairs, strict=True)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert np.isnan(rank_correlation(first, second))
    else:
        expected = scipy.stats.spearmanr(first, second).statistic
        assert rank_correlation(first, second) == pytest.approx(expected, abs=1e-12)
