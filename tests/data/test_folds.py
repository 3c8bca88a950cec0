"""Folds: every example is held out once, classes are spread evenly, groups stay whole."""

from __future__ import annotations

from collections import Counter

import pytest

from perceiver_cli.config import Config, DataConfig, load_preset
from perceiver_cli.data.catalog import Catalog
from perceiver_cli.data.examples import Example, Examples
from perceiver_cli.data.splits import validated, whole
from perceiver_cli.errors import DataError, UsageError


def catalog_of(counts: dict[str, int], groups: int = 0) -> Catalog:
    examples = [
        Example(f"{name}/{i:03d}.png", {}, (k,), group=f"{name}-{i % groups}" if groups else "")
        for k, (name, count) in enumerate(counts.items())
        for i in range(count)
    ]
    own = Examples(examples[:-4]), Examples(examples[-4:])
    splits = {"train": own[0], "val": own[1], "test": Examples([Example("t", {}, (0,))])}
    return Catalog("data", ("image",), ("image",), tuple(counts), splits, group_by="speaker" if groups else None)


def held(catalog: Catalog, folds: int) -> list[set[str]]:
    parts = [validated(catalog, DataConfig(fold=f"{i}/{folds}")) for i in range(1, folds + 1)]
    for part in parts:
        assert len(part.splits["test"]) == 1
        names = [{e.id for e in part.splits[split]} for split in ("train", "val")]
        assert names[0].isdisjoint(names[1])
        assert len(names[0] | names[1]) == len(whole(catalog).splits["train"])
    return [{e.id for e in part.splits["val"]} for part in parts]


def test_each_example_is_held_out_once_and_classes_are_spread() -> None:
    parts = held(catalog_of({"a": 23, "b": 10, "c": 7}), 5)
    assert Counter(name for part in parts for name in part).most_common(1)[0][1] == 1
    assert sum(map(len, parts)) == 40
    assert [len(part) for part in parts] == [8] * 5
    for name, (low, high) in {"a": (4, 5), "b": (2, 2), "c": (1, 2)}.items():
        assert {sum(each.startswith(name) for each in part) for part in parts} <= set(range(low, high + 1))
    assert parts == held(catalog_of({"a": 23, "b": 10, "c": 7}), 5)


def test_groups_stay_in_one_fold() -> None:
    parts = held(catalog_of({"a": 20, "b": 20}, groups=4), 2)
    groups = [{(name[0], int(name[2:5]) % 4) for name in part} for part in parts]
    assert groups[0].isdisjoint(groups[1])
    assert [len(part) for part in parts] == [20, 20]
    with pytest.raises(DataError, match="too few groups by 'speaker' for 9 folds"):
        held(catalog_of({"a": 20, "b": 20}, groups=4), 9)


@pytest.mark.parametrize("text", ["0/5", "6/5", "1/1", "2", "1/9999", "a/b"])
def test_a_fold_is_a_part_of_several(text: str) -> None:
    with pytest.raises(UsageError, match=r"data\.fold"):
        load_preset("tiny-image").override([f'data.fold="{text}"'])
    assert isinstance(load_preset("tiny-image").override(["data.fold=2/5"]), Config)
