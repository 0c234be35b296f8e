"""benchmark/comparison.py: interquartile means, probabilities of improvement and their intervals."""

import re
from itertools import product

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from benchmark import comparison
from benchmark.comparison import Task, difference, improvement, iqm, resampled, verdict


def tasks(shift, places=(0, 0, 0), sizes=((5, 5), (3, 4), (5, 3))):
    """Tasks around different places, on which ours is ahead by a shift."""
    generator = np.random.default_rng(1)
    return [
        Task(str(place), generator.normal(place + shift, 1, n), generator.normal(place, 1, m))
        for place, (n, m) in zip(places, sizes)
    ]


def test_interquartile_mean():
    scores = np.array([100.0, 1, 2, 3, 4, 5, 6, -50])
    assert iqm(scores) == np.mean([2, 3, 4, 5])  # two of eight cut at each end
    assert np.array_equal(iqm(np.stack([scores, 2 * scores])), [3.5, 7])


def test_seeds_are_resampled_within_their_task():
    samples = resampled([np.array([1.0, 2.0]), np.array([10.0, 20.0, 30.0])], seed=0)
    assert samples.shape == (comparison.REPEATS, 5)
    assert set(samples[:, :2].flat) == {1, 2} and set(samples[:, 2:].flat) == {10, 20, 30}
    assert (samples == 30).mean() == pytest.approx(1 / 5, abs=0.01)


def test_probability_of_improvement_is_the_mean_of_mann_whitneys():
    compared = tasks(0.5, places=(0, 100, 0))  # only within a task may seeds be compared
    compared[0].theirs[0] = compared[0].ours[0]  # a tie counts half
    expected = [mannwhitneyu(t.ours, t.theirs).statistic / (len(t.ours) * len(t.theirs)) for t in compared]
    mean, (low, high) = improvement(compared)
    assert mean == pytest.approx(np.mean(expected))
    assert low < mean < high


def test_difference_is_that_of_the_pooled_scores():
    compared = tasks(1.0)
    mean, (low, high) = difference(compared)
    ours, theirs = (np.concatenate([getattr(task, arm) for task in compared]) for arm in ("ours", "theirs"))
    assert mean == iqm(ours) - iqm(theirs) and low < mean < high


def test_normalised_scores():
    task = Task("", np.array([3.0, 5.0]), np.array([1.0, 7.0])).normalised(random=-6.0)
    assert np.array_equal(task.ours, [0.9, 1.1]) and np.array_equal(task.theirs, [0.7, 1.3])


@pytest.mark.parametrize(
    "shift, said", [(3, "ahead"), (-3, "behind"), (0, "no difference to be told")], ids=["up", "down", "none"]
)
def test_verdicts(shift, said):
    assert verdict(tasks(shift)) == said


def test_a_verdict_needs_both_intervals():
    """Far ahead on one task and a little behind on two: the interquartile mean is above, the probability below."""
    compared = [
        Task("", np.full(5, ours), np.full(5, theirs)) for ours, theirs in ((10.0, 0.0), (0.0, 0.1), (0.0, 0.1))
    ]
    for one in (compared, [Task("", task.theirs, task.ours) for task in compared]):
        (_, (low, high)), (_, (rarely, often)) = difference(one), improvement(one)
        assert (low > 0 and often < 0.5) or (high < 0 and rarely > 0.5)
        assert verdict(one) == "no difference to be told"


def test_intervals_hold_the_truth_about_as_often_as_they_say(monkeypatch):
    """Sixty pairs of eight scores each from one distribution: 85 to 99 % of the 95 % intervals hold 0."""
    monkeypatch.setattr(comparison, "REPEATS", 1000)
    held, generator = 0, np.random.default_rng(0)
    for _ in range(60):
        ours, theirs = generator.normal(size=(2, 3, 8))
        _, (low, high) = difference([Task("", a, b) for a, b in zip(ours, theirs)])
        held += low <= 0 <= high
    assert 51 <= held <= 59


def test_a_row_has_the_numbers_of_all_resamples_there_are():
    """Every choice of seeds within the tasks and both arms, apart from each other, is listed once."""
    ours, theirs = [[4.4, 8.9, 11.9], [1.6, 6.6, 3.1]], [[6.0, 3.3], [4.4, 7.9, 7.9]]

    def choices(scores):
        return np.array(list(product(scores, repeat=len(scores))))

    def iqms(arm):  # of five or six scores: without the lowest and the highest
        return [np.sort(np.concatenate(parts))[1:-1].mean() for parts in product(*map(choices, arm))]

    def probabilities(a, b):
        return [(np.sign(x[:, None] - y).mean() + 1) / 2 for x, y in product(choices(a), choices(b))]

    of_ours, of_theirs = np.array(iqms(ours)), np.array(iqms(theirs))
    improvements = np.add.outer(*map(probabilities, ours, theirs)) / 2
    of_all = [of_ours, of_theirs, np.subtract.outer(of_ours, of_theirs), improvements]
    *_, row = comparison.table({"both": [Task("", np.array(a), np.array(b)) for a, b in zip(ours, theirs)]})
    cells = [[float(number) for number in re.findall(r"[-+.\d]+", cell)] for cell in row.split("|")[4:8]]
    assert [mean for mean, _, _ in cells] == [5.75, 6.1, -0.35, 0.47]  # 5 of 6 pairs are won, and 1 of 9
    for (_, *said), samples, tolerance in zip(cells, of_all, (0.1, 0.1, 0.1, 0.03)):
        assert said == pytest.approx(np.percentile(samples, [2.5, 97.5]), abs=tolerance)


def test_a_line_of_the_figure_is_of_its_own_tasks(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison.plt, "close", lambda _: None)
    near = Task("near", np.array([1.0, 2, 2, 9]), np.array([0.0, 1, 2]))
    far = Task("far", np.arange(5.0), np.arange(9.0, 13))
    comparison.plot(tmp_path / "comparison.png", {"mpe": [near, far], "far": [far], "all": [near, far]})
    (axes,) = comparison.plt.gcf().axes
    names = [label.get_text() for label in axes.get_yticklabels()][::-1]
    assert names == ["mpe", "near (4)", "far (5)", "far (5)", "all"]
    lines = [line.get_xdata() for line in axes.lines[:-1]]
    pooled = np.mean([1, 2, 2, 2, 3]) - np.mean([1, 2, 9, 10, 11])
    assert [mean for (mean,) in lines[1::2]][::-1] == pytest.approx([pooled, 2.5, -8.5, -8.5, pooled])
    intervals = lines[::2][::-1]
    assert intervals[1][0] >= -1 and intervals[2][1] <= -5
    monkeypatch.undo()
    comparison.plt.close("all")


def test_figure_and_table(tmp_path):
    groups = {"one": tasks(1.0), "other": tasks(0.0)[:1], "all": tasks(1.0)}
    comparison.plot(tmp_path / "comparison.png", groups)
    assert (tmp_path / "comparison.png").stat().st_size > 5000
    rows = comparison.table(groups)
    assert len(rows) == 5 and all(row.count("|") == 9 for row in rows)
    assert rows[2].startswith("| one | 3 | 25 |")
