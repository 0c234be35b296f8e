"""benchmark/speed.py still fits the scripts that it measures; that its numbers are right, nobody can test."""

import pytest

from benchmark import speed


@pytest.mark.parametrize(
    "measure",
    [speed.measure_mpe, speed.measure_mamujoco, speed.measure_compiled],
    ids=lambda measure: measure.__name__,
)
def test_every_part_is_measured(measure, monkeypatch, capsys):
    def once(repeats, warm_up=5, **functions):
        return {name: (function(), 1.0)[1] for name, function in functions.items()}

    monkeypatch.setattr(speed, "medians", once)
    monkeypatch.setattr(speed.ddpl_mpe, "compiled", lambda function, *_: function)
    measure()
    printed = capsys.readouterr().out
    assert "one update" in printed and "1.00" in printed
