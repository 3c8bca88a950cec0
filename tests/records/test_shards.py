"""Records on disk: a damaged index is made again, a damaged array is named, older tars and indexes load."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from perceiver_cli.errors import DataError, IntegrityError
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.records.format import Facts, Header
from perceiver_cli.records.npy import npy_bytes
from perceiver_cli.records.shards import Shards, open_shards
from perceiver_cli.records.stream import Writer, pack

HEADER = Header({"image": ImageSpec(size=(4, 4), color="grey", mean=(0.5,), std=(0.25,))}, ("cat", "dog"))
COUNT = 5


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    with (tmp_path / "x.tar").open("wb") as file:
        writer = Writer(file.write, HEADER)
        for number in range(COUNT):
            facts = Facts(f"d/{number}.png", f"{number}.png", ("train", "val")[number % 2], ("cat", "dog")[:1])
            array = npy_bytes(rng.integers(0, 256, (300, 300, 1), dtype=np.uint8))
            writer.packed(pack(facts, {"image": array}, number, HEADER))
        writer.close()
    return tmp_path / "x.tar"


def same(one: Shards, two: Shards) -> bool:
    tables = [{name: column.tolist() for name, column in shards.columns.items()} for shards in (one, two)]
    return tables[0] == tables[1] and (one.names, one.header, one.errors) == (two.names, two.header, two.errors)


def test_a_damaged_index_is_made_again(tar: Path) -> None:
    shards = open_shards([str(tar)])
    index = tar.with_name("x.tar.index")
    sound = index.read_bytes()
    rng = np.random.default_rng(1)
    for place in rng.integers(0, len(sound), 100).tolist():
        flipped = bytearray(sound)
        flipped[place] ^= 1 << int(rng.integers(8))
        index.write_bytes(flipped)
        assert same(shards, open_shards([str(tar)]))
        assert index.read_bytes() in (sound, flipped)  # a flip may leave JSON of the same meaning


def test_an_index_without_digests_serves_a_tar_without_them(tar: Path) -> None:
    shards, index = open_shards([str(tar)]), tar.with_name("x.tar.index")
    facts = {
        "format": 2, "size": tar.stat().st_size, "mtime_ns": tar.stat().st_mtime_ns,
        "header": HEADER.to_json().decode(), "names": shards.names, "errors": [],
    }  # fmt: skip
    columns = {
        name: column for name, column in shards.columns.items() if name not in ("sums", "sums_at_image", "files")
    }
    index.write_bytes(save(columns, {"index": json.dumps(facts)}))
    assert same(shards, open_shards([str(tar)]))  # a sealed tar has digests: its index is made again
    assert b'"digest' in index.read_bytes()


def test_a_damaged_array_is_named_with_or_without_an_index(tar: Path) -> None:
    stored = open_shards([str(tar)]).stored(3, "3.png", ["image"])["image"]
    at = tar.read_bytes().index(stored.read())
    before = tar.stat().st_mtime_ns
    with tar.open("r+b") as file:
        file.seek(at + 80_000)
        byte = file.read(1)[0]
        file.seek(at + 80_000)
        file.write(bytes([byte ^ 4]))
    os.utime(tar, ns=(before, before))
    for _ in range(2):
        shards = open_shards([str(tar)])
        shards.stored(2, "2.png", ["image"])["image"].array()
        with pytest.raises(DataError, match=r"x\.tar': image of the record '3\.png' is damaged"):
            shards.stored(3, "3.png", ["image"])["image"].array()
        tar.with_name("x.tar.index").unlink()


def test_an_array_is_compared_once(tar: Path) -> None:
    shards = open_shards([str(tar)])
    first, second = (shards.stored(row, "x", ["image"])["image"] for row in (0, 1))
    assert first.digests
    first.array()
    assert not shards.stored(0, "x", ["image"])["image"].digests
    assert shards.stored(1, "x", ["image"])["image"].digests == second.digests != b""


def named(folder: Path, name: str) -> str:
    """Return a tar of one record with this path, id and label."""
    path = folder / "named.tar"
    with path.open("wb") as file:
        writer = Writer(file.write, HEADER)
        writer.packed(pack(Facts(name, name, labels=(name,)), {}, 0, HEADER))
        writer.close()
    return str(path)


def test_a_name_has_no_half_characters_but_may_have_any_byte(tmp_path: Path) -> None:
    shards = open_shards([named(tmp_path, "\udcff")])
    assert (shards.id(0), shards.names) == ("\udcff", ("\udcff",))
    for name in ("\ud800", "a\udc00", "\udfff"):
        with pytest.raises(IntegrityError, match=r"00000000\.json: not JSON"):
            open_shards([named(tmp_path, name)])
