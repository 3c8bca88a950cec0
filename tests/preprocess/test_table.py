"""Tables: kinds of columns, training statistics, missing cells, inputs of the model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.preprocess.table import MODALITY, TableSpec, inferred

KINDS = {"price": "number", "city": "category", "sold": "date"}


def row(**cells: object) -> Source:
    """Return the cells of a row as a source."""
    data = MODALITY.of_cells([(name, KINDS[name], cell) for name, cell in cells.items()])
    assert data is not None
    return Source("row 1", data, ("table",))


ROWS = [
    row(price="1", city="Rome", sold="2024-01-01"),
    row(price=2, city="Rome", sold="2024-02-01"),
    row(price=3.0, city="Oslo", sold="2024-02-02T10:00:00"),
    row(price="nan", city="Oslo", sold="2024/02/03"),
    row(price="", city="Paris", sold="2024-02-04"),
]
SPEC = MODALITY.resolve(TableSpec(frequencies=1, longest=4.0), ROWS, Limits())


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "2.5", "", "-3e4", "nan"], "number"),
        ([1, 2, None, 4], "number"),
        (["01067", "80331"], "category"),  # post codes
        (["yes", "no", "yes"], "category"),
        ([True, False], "category"),
        (["2024-01-01", "2023/12/31"], "date"),
        (["a red shoe of leather", "two blue socks of wool"], "text"),
        (["", None, "NaN"], None),
        (["5", "5", "5"], None),
        ([str(number) for number in range(100)], None),  # counts the rows
        ([f"u{number}" for number in range(100)], None),  # names them
    ],
)
def test_the_kind_of_a_column_is_inferred(cells: list[object], kind: str | None) -> None:
    assert inferred("a", cells) == kind
    assert inferred("ID", cells) is None


def test_training_rows_settle_statistics() -> None:
    price, city, day, month, weekday, hour = SPEC.columns
    assert (price.mean, price.std, price.has_missing) == (2.0, 0.816497, True)
    assert (city.categories, city.has_rare, city.has_missing) == (("Oslo", "Rome"), True, False)
    assert [(column.name, column.part) for column in (day, month, weekday, hour)] == [
        ("sold", "day"), ("sold", "month"), ("sold", "weekday"), ("sold", "hour"),
    ]  # fmt: skip
    assert (month.categories, month.has_rare) == (("2",), True)
    assert TableSpec.model_validate(json.loads(SPEC.model_dump_json())) == SPEC


def test_values_are_standardised_and_missing_ones_stay_missing() -> None:
    values = MODALITY.load(row(price="3", city="Berlin"), SPEC, Limits())
    assert values[0].tolist() == pytest.approx([1.2247446, 1.0])
    assert values[1].tolist() == [0.0, 1.0]  # there, and unknown
    assert not values[2:].any()
    assert MODALITY.load(row(price="1e300"), SPEC, Limits())[0, 0] == 10.0  # no farther than that
    with pytest.raises(DataError, match="column 'price' has 'cheap', expected a number"):
        MODALITY.load(row(price="cheap"), SPEC, Limits())
    with pytest.raises(DataError, match="2024-12-31"):
        MODALITY.load(row(price="1", sold="yesterday"), SPEC, Limits())


def test_inputs_are_codes_and_weights() -> None:
    layout = MODALITY.layout(SPEC)
    raw = MODALITY.load(row(price="3", city="Rome"), SPEC, Limits())
    values = MODALITY.prepare(raw, SPEC, None).values
    assert values.shape == layout.prepared_shape == (6, 8)
    codes, weights = values[:, :4], values[:, 4:]
    z = 1.2247446
    angle = 2 * np.pi / 4 * z
    # A number: missing, constant, linear, sine, cosine.
    assert codes[0].tolist() == [1, 2, 3, 4]
    assert weights[0].tolist() == pytest.approx([1, z, np.sin(angle), np.cos(angle)], abs=1e-6)
    # A category: missing, unknown, Oslo, Rome.
    assert (codes[1, 0], weights[1].tolist()) == (5 + 3, [1, 0, 0, 0])
    assert not weights[2:].any()  # no training row lacks a date, so a missing one is hidden
    assert codes.max() < layout.codes
    missing = MODALITY.prepare(MODALITY.load(row(city="Berlin"), SPEC, Limits()), SPEC, None).values
    assert (missing[0, 0], missing[0, 4:].tolist()) == (0, [1, 0, 0, 0])  # training rows lack prices
    assert (missing[1, 0], missing[1, 4]) == (6, 1)  # Paris is rare


def test_a_category_that_training_never_had_is_hidden_without_rare_ones() -> None:
    spec = MODALITY.resolve(TableSpec(min_count=1), [row(city="Rome", price=1), row(city="Oslo", price=2)], Limits())
    price_alone = MODALITY.prepare(MODALITY.load(row(city="Berlin", price=1), spec, Limits()), spec, None).values
    assert price_alone[:, price_alone.shape[1] // 2 :].any(axis=1).tolist() == [False, True]


def test_training_hides_some_cells_and_never_all() -> None:
    spec = SPEC.model_copy(update={"drop": 0.9})
    raw = MODALITY.load(ROWS[2], spec, Limits())
    rng = np.random.default_rng(0)
    counts = [int(MODALITY.prepare(raw, spec, rng).values[:, 4:].any(axis=1).sum()) for _ in range(50)]
    assert min(counts) == 1
    assert max(counts) > 1


def test_a_table_without_a_value_is_refused() -> None:
    with pytest.raises(DataError, match="no value in any column"):
        MODALITY.load(Source("row 1", b'[["other", "number", "1"]]', ("table",)), SPEC, Limits())
    with pytest.raises(DataError, match="two different values"):
        MODALITY.resolve(TableSpec(), [row(price=1), row(price=1)], Limits())
    assert MODALITY.of_cells([("price", "number", "NaN"), ("city", "category", None)]) is None
    with pytest.raises(UsageError, match="still 'auto'"):
        MODALITY.layout(TableSpec())


@pytest.mark.parametrize("data", [b"[", b"{}", b"[1]", b"[[1, 2]]", b'[["a", "number"]]', b"[" * 100_000, b"\xff"])
def test_damaged_cells_are_one_error(data: bytes) -> None:
    with pytest.raises(DataError):
        MODALITY.load(Source("row 1", data, ("table",)), SPEC, Limits())


def test_columns_are_the_parts_of_a_table() -> None:
    raw = MODALITY.load(row(price="2.5", city="Rome", sold="2024-02-03"), SPEC, Limits())
    names = MODALITY.parts(raw, SPEC).names
    assert names == [
        "price = 2.5", "city = Rome", "sold, day = 2024-02-03", "sold, month = 2", "sold, weekday = unknown",
        "sold, hour = 0",
    ]  # fmt: skip
