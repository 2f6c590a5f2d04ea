"""Prompts as the template has them, and answers as they are read back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from shared.config import UserError
from shared.data.tabular import make_table
from shared.evaluation.tabular import NO_ANSWER

from ..config import PromptSettings
from ..prompts import (
    candidate_answers,
    metadata_text,
    read_answer,
    read_answers,
    read_class_answers,
    serialize_rows,
    write_answers,
    write_class_answers,
    write_prompts,
)
from ..speed import serialize_in_a_loop
from .helpers import people

PUBLISHED = PromptSettings()


def test_a_prompt_has_the_parts_of_the_template_in_order() -> None:
    heavy = write_prompts(people(), ("low", "high"), PUBLISHED, heavy=True)
    text = heavy.whole(0)
    parts = (
        "Dataset description: People at work. The target of the dataset is income.",
        "age: Age in years.; job title: What they do.; score.",
        "Object description: age is ",
        "You should return the probability of each class by: class 0: xxx; class 1: xxx; ",
        'where class 0 stands for "low"; class 1 stands for "high".',
        "Answer:",
    )
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert text.endswith("Answer:")


def test_light_prompts_lack_the_metadata_alone() -> None:
    heavy = write_prompts(people(), ("low", "high"), PUBLISHED, heavy=True)
    light = write_prompts(people(), ("low", "high"), PUBLISHED, heavy=False)
    assert light.rows == heavy.rows
    assert light.suffix == heavy.suffix
    assert heavy.prefix.replace(f"Dataset description: {metadata_text(people(), PUBLISHED)}\n", "") == light.prefix


def test_classes_first_is_shared_by_the_rows() -> None:
    parts = write_prompts(people(), ("low", "high"), PromptSettings(classes_first=True), heavy=False)
    assert 'class 1 stands for "high"' in parts.prefix
    assert parts.suffix == ".\nAnswer:"


def test_cells_are_written_as_the_paper_has_them() -> None:
    data = pa.table(
        {
            "a_b": [1.0, 2.5, 0.123456, None, -1e-7],
            "whole": [3, None, 5, 6, 7],
            "day-of": pa.array(["2024-01-31", None, "2023-12-01", "2020-02-29", "2021-01-01"]),
            "y": ["u", "v", "u", "v", "u"],
        }
    )
    rows = serialize_rows(make_table(data, "y", name="t"), PUBLISHED)
    assert rows[0] == "a b is 1; whole is 3; day of is 2024-01-31"
    assert rows[1] == "a b is 2.5; whole is unknown; day of is unknown"
    assert rows[2] == "a b is 0.1235; whole is 5; day of is 2023-12-01"
    assert rows[3].startswith("a b is unknown; whole is 6")
    assert rows[4].startswith("a b is 0;")


def test_significant_digits_and_fewer_columns() -> None:
    data = pa.table({"x": [1234.5, 0.00123456, 0.0, -56.789], "z": [1, 2, 3, 4], "y": ["u", "v", "u", "v"]})
    settings = PromptSettings(significant_digits=3, max_columns=1)
    assert serialize_rows(make_table(data, "y", name="t"), settings) == [
        "x is 1230",
        "x is 0.00123",
        "x is 0",
        "x is -56.8",
    ]


def test_columns_at_a_time_say_what_a_loop_over_rows_says() -> None:
    table = people(200)
    assert serialize_rows(table, PUBLISHED) == serialize_in_a_loop(table, PUBLISHED)
    assert serialize_rows(table, PUBLISHED, [5, 3]) == [serialize_rows(table, PUBLISHED)[row] for row in (5, 3)]


def test_ten_thousand_categories_and_long_text() -> None:
    names = [f"name {number}" for number in range(10_000)]
    table = make_table(pa.table({"name": names, "y": ["a", "b"] * 5000}), "y", name="t")
    rows = serialize_rows(table, PUBLISHED)
    assert len(set(rows)) == 10_000
    assert rows[-1] == "name is name 9999"


def test_metadata_are_cut_at_a_word() -> None:
    text = metadata_text(people(), PromptSettings(max_metadata_characters=40))
    assert len(text) <= 40
    assert metadata_text(people(), PUBLISHED).startswith(text + " ")


def test_a_table_without_features_cannot_be_written_out() -> None:
    table = make_table(pa.table({"y": ["a", "b"]}), "y", name="bare")
    with pytest.raises(UserError, match="'bare' has no features"):
        serialize_rows(table, PUBLISHED)


# --- Answers ----------------------------------------------------------------------------------------------------------


def test_answers_have_two_decimals_as_numpy_prints_them() -> None:
    written = write_answers(np.array([[0.8333, 0.1667], [1.0, 0.0], [0.1, 0.9]]))
    assert written == [" class 0: 0.83; class 1: 0.17.", " class 0: 1.0; class 1: 0.0.", " class 0: 0.1; class 1: 0.9."]


def test_what_was_written_is_read_back() -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), 50).round(2)
    read, classes = read_answers(write_answers(probabilities), 4)
    assert np.allclose(read, probabilities)
    assert (classes == probabilities.argmax(axis=1)).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" class 0: 0.2; class 1: 0.8.", 1),
        ("class 0: 0.5; class 1: 0.5.", 0),
        ("nonsense 0.9\n class 0: 0.3; class 1: 0.7.", 1),
        ("0.9 0.1", 0),
        (" class 0: 0.2; class 1: 0.", NO_ANSWER),
        (" class 0: 0.2; class 1: 0.8; class 2: 0.0.", NO_ANSWER),
        ("class 0: 1; class 1: 0", NO_ANSWER),
        ("", NO_ANSWER),
        ("\n", NO_ANSWER),
    ],
)
def test_only_answers_with_a_decimal_for_each_class_are_read(text: str, expected: int) -> None:
    probabilities, label = read_answer(text, 2)
    assert label == expected
    assert (probabilities.sum() == 0) == (expected == NO_ANSWER)


def test_class_answers() -> None:
    assert write_class_answers(np.array([2, 0])) == [" class 2.", " class 0."]
    probabilities, classes = read_class_answers([" class 2.", "class 7", "no", " class 0; class 1"], 3)
    assert classes.tolist() == [2, NO_ANSWER, NO_ANSWER, 0]
    assert probabilities.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0], [1, 0, 0]]


def test_candidates_say_each_class_for_certain() -> None:
    read, classes = read_answers(candidate_answers(3, per_table=False), 3)
    assert classes.tolist() == [0, 1, 2]
    assert (read == np.eye(3)).all()
