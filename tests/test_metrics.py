"""Figures of written answers that are Veneer's own to read."""

import pytest

from veneer.train import metrics


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("6 * 4 = 24\n#### 24", "She has 30-6=24.\n#### 24", True),
        ("So there are 24.0 forks.", "#### 24", True),
        ("It costs $1,250.50.", "#### 1250.5", True),
        ("5-29=-24", "#### -24", True),
        ("That is 29-24", "#### 24", True),
        ("That is 29 - 5", "#### 24", False),
        ("24 forks, and 3 spoons", "#### 24", False),
        ("Many.", "#### 24", False),
        ("Many.", "Many.", False),
    ],
)
def test_a_final_number_is_the_last_one_whatever_form_it_has(answer, reference, right):
    answers, references = [answer, "#### 1"], [reference, "#### 1"]
    assert metrics.of_answers(answers, references, ["final_number"]) == {"final_number": (1 + right) / 2}
