"""Final answers are found where they are marked, compared fairly, and hostile text takes no time."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actor.tasks.answers import last_boxed, marked, normalised, read_number


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3} but \boxed{unclosed", "3"),
        (r"\fbox{a} \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \boxed{b}}", "b"),
        ("<answer> Ann </answer> then <ANSWER>Bob\n</ANSWER></answer>", "Bob"),
        (r"<answer>7</answer> \boxed{8}", "8"),
        ("step #### 41\n#### 42 \n", "42"),
        ("The answer is 7.", "7"),
        ("Answer: x = 5\n", "x = 5"),
        ("final answer = y", "y"),
        ("**Answer:** 42", "42"),
        ("#### **42**.", "42"),
        ("<answer>\n**42.**\n</answer>", "42"),
        ("#### 42\nThe answer is 43", "42"),
        ("it is 42", None),
        ("<answer>open", None),
        ("", None),
    ],
)
def test_the_last_mark_of_the_strongest_kind_counts(text: str, found: str | None) -> None:
    assert marked(text) == found


@settings(max_examples=50)
@given(st.text(alphabet="ab{}\\ ", max_size=30))
def test_a_box_with_balanced_braces_is_read_whole(inner: str) -> None:
    depth, at = 0, 0
    while at < len(inner) and depth >= 0:
        at += inner[at] == "\\"
        depth += 0 if at >= len(inner) or (at and inner[at - 1] == "\\") else {"{": 1, "}": -1}.get(inner[at], 0)
        at += 1
    if depth == 0 and at == len(inner) and not inner.endswith("\\"):
        assert last_boxed(f"\\boxed{{x}} \\boxed{{{inner}}}") == inner.strip()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234 people", 1234), ("-3.5", Fraction(-7, 2)), ("= 2/3", Fraction(2, 3)), ("10 / 4", Fraction(5, 2)),
        ("$12.50", Fraction(25, 2)), ("first 3 then 4.", 4), ("−4", -4), ("x=.5", Fraction(1, 2)), ("5-3", 3),
        ("1.5e-7", Fraction(3, 20_000_000)), ("1e5", 100_000), ("-2.5E+3", -2500), ("3e−2", Fraction(3, 100)),
        ("1e5/2", 50_000), (".5e1", 5), ("2e^x", 2), ("1e999999999", None), ("1e" + "0" * 5000, None),
        ("1/0", None), ("v2", None), ("none", None), ("9" * 5000, None), ("", None),
    ],
)  # fmt: skip
def test_the_last_number_is_read_exactly(text: str, number: Fraction | int | None) -> None:
    assert read_number(text) == number


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The Eiffel  Tower.", "eiffel tower"), ("'Jean-Luc Picard'", "jean luc picard"), ("3,000", "3000"), ("A", "a"),
        ("−5", "-5"), ("5%", "5"), ("12:30", "12:30"), ("ﬁve", "five"), ("the", "The"),
        ("½", "1/2"), ("1½", "1 1/2"), ("caf\u00e9", "cafe\u0301"), ("किताब।", "किताब"),
        ("Paris \u2764\ufe0f", "paris"),
    ],
)  # fmt: skip
def test_what_does_not_count_in_a_comparison(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("-5", "5"), ("3.14", "314"), ("vitamin A", "vitamin"), ("!!", "??"), ("", "a"), ("1½", "11/2"),
        ("कि", "की"), ("सीता", "सूता"), ("ปี", "ปู"),
    ],
)  # fmt: skip
def test_what_counts_in_a_comparison(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 3000,
        "{" * 20_000,
        "<answer>" * 2500,
        "answer " * 3000,
        "#### " * 4000,
        "1" * 20_000,
        "1 " * 10_000 + "/",
    ],
)
def test_hostile_text_is_read_in_linear_time(text: str) -> None:
    marked(text * 10)  # a quadratic pattern would take minutes
    read_number(text * 10)
