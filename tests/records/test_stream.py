"""Records as a tar: written the same every time, read by other tools, cut or hostile streams noticed."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import tarfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_cli.data.inputs import Pipe, examples_of
from perceiver_cli.errors import DataError, IntegrityError, LimitError, PerceiverError
from perceiver_cli.preprocess.audio import AudioSpec
from perceiver_cli.preprocess.image import ImageSpec
from perceiver_cli.preprocess.points import PointsSpec
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.records.digests import digests, num_digests
from perceiver_cli.records.format import Facts, Header, Record, Stored
from perceiver_cli.records.npy import npy_bytes, parse_npy
from perceiver_cli.records.stream import BLOCK, END, ERROR, HEADER, ZEROS, Feed, Writer, pack, read_records, tar_members

SPEC = ImageSpec(size=4, color="grey", mean=(0.5,), std=(0.5,))
SPOKEN = Header({"image": SPEC, "audio": AudioSpec(rate_hz=1000)}, ("cat", "dog"))


def stream_of(count: int, header: Header = SPOKEN, first: int = 0) -> bytes:
    """Return a stream of pictures, each second one with a sound."""
    out = io.BytesIO()
    writer = Writer(out.write, header)
    rng = np.random.default_rng(first)
    for number in range(first, first + count):
        arrays = {"image": npy_bytes(rng.integers(0, 256, (4, 5, 1), dtype=np.uint8))}
        seconds = {}
        if number % 2:
            arrays["audio"] = npy_bytes(rng.normal(0, 0.1, 20).astype(np.float32))
            seconds = {"audio": 0.02}
        name = f"{'cat' if number % 3 else 'dog'}/{number}.png"
        facts = Facts(f"data/{name}", name, "train", (name[:3],), seconds)
        writer.packed(pack(facts, arrays, number, header))
    writer.close()
    return out.getvalue()


def read(data: bytes, limits: Limits | None = None) -> list[Record[bytes]]:
    feed = Feed(io.BytesIO(data), "'stdin'")
    return [record for _, record in read_records(feed, limits or Limits(), feed.take)]


def member(name: str, content: bytes = b"{}", **changes: Any) -> bytes:
    """Return one member made by the standard library, with anything in its header."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    kind = changes.pop("format", tarfile.USTAR_FORMAT)
    for key, value in changes.items():
        setattr(info, key, value)
    header = info.tobuf(kind)
    return header + content + bytes(-len(content) % BLOCK)


START = tar_members([(HEADER, SPOKEN.to_json())])
STOP = tar_members([(END, b'{"records": 1, "errors": 0}')]) + 2 * ZEROS
JSON = tar_members([("00000000.json", Facts("a.png", "a.png").to_json(False))])


def test_a_stream_gives_back_what_was_written() -> None:
    records = read(stream_of(7))
    assert [record.key for record in records] == [f"{i:08d}" for i in range(7)]
    assert records[3].facts == Facts("data/dog/3.png", "dog/3.png", "train", ("dog",), {"audio": 0.02})
    assert [sorted(record.arrays) for record in records[:2]] == [["image"], ["audio", "image"]]
    assert parse_npy(records[2].arrays["image"], "x").shape == (4, 5, 1)


def test_the_same_records_give_the_same_bytes_in_posix_ustar() -> None:
    data = stream_of(3)
    assert data == stream_of(3)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        infos = tar.getmembers()
    assert {(i.mtime, i.uid, i.gid, i.uname, i.mode, i.type) for i in infos} == {(0, 0, 0, "", 0o644, b"0")}
    assert not any(i.pax_headers for i in infos)
    ours = tar_members([("a.npy", b"12")])
    theirs = tarfile.TarInfo("a.npy")
    theirs.size = 2
    assert ours[:BLOCK] == theirs.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    ("name", "size", "checksum", "seal"),
    [
        ("__perceiver__/header", b"00000000001", b"013026", b"d202ef8d"),
        ("00000000.json", b"00000000000", b"010305", b"00000000"),
        ("00000017.image.npy", b"00000001001", b"010435", bytes(8)),
        ("a" * 100, b"00000000010", b"031712", b"6522df69"),
    ],
)
def test_headers_are_these_bytes(name: str, size: bytes, checksum: bytes, seal: bytes) -> None:
    data = tar_members([(name, bytes(int(size, 8)))])
    fields = b"0000644\x000000000\x000000000\x00" + size + b"\x0000000000000\x00" + checksum + b"\0 0"
    unused = bytes(235) + seal + bytes(4)
    assert data[:BLOCK] == name.encode().ljust(100, b"\0") + fields + bytes(100) + b"ustar\00000" + unused
    theirs = tarfile.TarInfo.frombuf(data[:BLOCK], "ascii", "strict")
    assert (theirs.name, theirs.size, theirs.type) == (name, int(size, 8), tarfile.REGTYPE)
    assert len(data) == BLOCK + -(-theirs.size // BLOCK) * BLOCK


def test_a_name_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PerceiverError, match="does not fit into a tar"):
        tar_members([("a" * 101, b"")])


def test_stock_tar_and_numpy_read_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(stream_of(4))
    listed = subprocess.run(["tar", "tf", "x.tar"], cwd=tmp_path, capture_output=True, check=True)
    assert listed.stderr == b""
    names = listed.stdout.decode().split()
    assert (names[0], names[-1], len(names)) == (HEADER, END, 2 + 3 * 4 + 2)
    subprocess.run(["tar", "xf", "x.tar"], cwd=tmp_path, capture_output=True, check=True)
    assert np.load(tmp_path / "00000001.audio.npy").shape == (20,)
    assert json.loads((tmp_path / "00000001.json").read_text())["label"] == "cat"
    assert (tmp_path / "00000000.cls").read_text() == "1"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its file to the collector
def test_webdataset_reads_what_is_written(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    error = pack(Facts("a.png", "a.png", error="'a.png': the file is empty"), {}, 0, SPOKEN)  # which is passed over
    (tmp_path / "x.tar").write_bytes(START + error + stream_of(4)[len(START) :])
    data = webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False, empty_check=False).decode()
    samples = list(data)
    assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(4)]
    assert [sample["cls"] for sample in samples] == [1, 0, 0, 1]
    assert samples[1]["image.npy"].dtype == np.uint8
    assert samples[1]["json"]["id"] == "cat/1.png"
    assert [("audio.npy" in sample) for sample in samples] == [False, True, False, True]


# ---------------------------------------------------------------- cut short, joined


def test_a_cut_anywhere_is_noticed_and_counted() -> None:
    data = stream_of(3)
    ends = []  # of each record: it counts once the next member was seen
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offsets = [(info.name, info.offset) for info in tar.getmembers()]
    for key in ("00000001.json", "00000002.json", END):
        ends.append(dict(offsets)[key] + BLOCK)
    last = dict(offsets)[END] + 2 * BLOCK
    for cut in [*range(0, last, 97), *range(BLOCK, last, BLOCK), last - 1]:
        seen: list[object] = []
        feed = Feed(io.BytesIO(data[:cut]), "'stdin'")
        with pytest.raises(PerceiverError) as caught:
            seen.extend(read_records(feed, Limits(), feed.take))
        assert len(seen) == sum(end <= cut for end in ends)
        if cut >= BLOCK:
            assert isinstance(caught.value, IntegrityError)
            assert f"cut short after {len(seen)} records" in str(caught.value)
    assert len(read(data[:last])) == 3  # without the zeros after it, it is still whole


def test_streams_may_follow_each_other() -> None:
    joined = stream_of(2) + bytes(10 * BLOCK) + stream_of(3, first=5) + bytes(BLOCK)
    assert [record.facts.id[4:5] for record in read(joined)] == ["0", "1", "5", "6", "7"]
    other = Header({**SPOKEN.inputs, "image": SPEC.model_copy(update={"size": (8, 8)})}, ("cat",))
    with pytest.raises(DataError, match=r"inputs.image.size = \[8, 8\], but the previous stream has \[4, 4\]"):
        read(stream_of(2) + stream_of(2, other))
    with pytest.raises(IntegrityError, match="cut short after 3 records"):
        read(stream_of(2) + stream_of(3)[:6000])


def test_another_count_than_the_end_says() -> None:
    data = stream_of(3)[: -2 * BLOCK - 2 * BLOCK]
    with pytest.raises(IntegrityError, match="3 records, but its end says 4"):
        read(data + tar_members([(END, b'{"records": 4, "errors": 0}')]))
    with pytest.raises(IntegrityError, match="0 errors, but its end says 1"):
        read(data + tar_members([(END, b'{"records": 3, "errors": 1}')]))
    with pytest.raises(IntegrityError, match="end' is damaged: its bytes are not those that were written"):
        read(stream_of(3).replace(b'{"records": 3', b'{"records": 4'))


def test_an_input_that_could_not_be_read_has_a_member_in_its_place(tmp_path: Path) -> None:
    facts = Facts("d/\udcff.png", "\udcff.png", "test", ("cat",), error="'d/\\xff.png': the file is empty")
    error = pack(facts, {}, 0, SPOKEN)
    good = stream_of(1)[len(START) : -len(STOP)]
    end = tar_members([(END, b'{"records": 1, "errors": 2}')]) + 2 * ZEROS
    data = START + error + good + error + end
    assert [record.facts.error is None for record in read(data)] == [False, True, False]
    assert read(data)[0].facts == facts
    (tmp_path / "x.tar").write_bytes(data)
    shown = subprocess.run(["tar", "xOf", "x.tar", ERROR], cwd=tmp_path, capture_output=True, check=True).stdout
    assert [json.loads(line)["path"] for line in shown.splitlines()] == [facts.path] * 2


# ---------------------------------------------------------------- what a reader refuses


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"", DataError, "empty"),
        (b"\x89PNG\r\n" + bytes(600), DataError, "not a tar"),
        (b"\x1f\x8b\x08" + bytes(600), DataError, "compressed; unpack it: zcat FILE"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), DataError, "compressed; unpack it: zstd -dc"),
        (member("photo.jpg", b"x"), DataError, "a tar that begins with 'photo.jpg'"),
        (member(HEADER, b"[]"), IntegrityError, "the header: not a JSON object"),
        (member(HEADER, b'{"format": 9}'), IntegrityError, "records of format 9, expected 1"),
        (member(HEADER, b"[" * 100_000), IntegrityError, "not JSON"),
        (member(HEADER, SPOKEN.to_json().replace(b'"bands"', b'"bonds"', 1)), IntegrityError, "unknown key"),
        (START + member("../x.json"), IntegrityError, r"'\.\./x\.json'"),
        (START + member("/etc/passwd"), IntegrityError, "'/etc/passwd'"),
        (START + member("a/b.json"), IntegrityError, "'a/b.json'"),
        (START + member("00000000.exe"), IntegrityError, r"expected one each of json, cls, audio\.npy, image\.npy"),
        (START + member("0.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"), IntegrityError, "type b'2'"),
        (START + member("0.json", type=tarfile.LNKTYPE, linkname="x"), IntegrityError, "type b'1'"),
        (START + member("0.json", type=tarfile.CHRTYPE), IntegrityError, "type b'3'"),
        (START + member("0.json", type=tarfile.FIFOTYPE), IntegrityError, "type b'6'"),
        (START + member("0.json", type=tarfile.DIRTYPE), IntegrityError, "type b'5'"),
        (START + member("x" * 300 + ".json", format=tarfile.GNU_FORMAT), IntegrityError, "type b'L'"),
        (START + member("x" * 300 + ".json", format=tarfile.PAX_FORMAT), IntegrityError, "type b'x'"),
        (START + member("0.json", size=8**12, format=tarfile.GNU_FORMAT), IntegrityError, "damaged tar header"),
        (START + member("0.json", size=-1, format=tarfile.GNU_FORMAT), IntegrityError, "damaged tar header"),
        (START + member("0.json", size=1 << 30), IntegrityError, "of 1073741824 bytes, expected 1048576 at most"),
        (START + member("0.image.npy", size=5 << 30), LimitError, "--limit decoded_bytes=5368709120"),
        (START + member(ERROR, b'{"path": "a"}') + STOP, IntegrityError, "__perceiver__/error without an error"),
        (START + member(ERROR, b'{"path": "a", "error": 1}') + STOP, IntegrityError, "an error that is not text"),
        (START + JSON + member(ERROR, b'{"path": "a", "error": ""}') + JSON, IntegrityError, "rising keys"),
        (START + JSON[:200] + b"9" + JSON[201:], IntegrityError, "damaged tar header"),
        (START + JSON + JSON + STOP, IntegrityError, "expected one each of json"),
        (START + member("5.json", b'{"path": "a"}') + member("4.json"), IntegrityError, "rising keys"),
        (START + member("0.image.npy", b"") + STOP, IntegrityError, "no 0.json"),
        (START + member("0.json", b'{"path": 5}') + STOP, IntegrityError, "expected path"),
        (START + member("0.json", b'{"path": "a", "split": "mine"}') + STOP, IntegrityError, "expected path"),
        (START + member("0.json", b'{"path": "a", "label": 3}') + STOP, IntegrityError, "labels that are not names"),
        (START + member("0.json", b'{"path": "a", "seconds": {"audio": -1}}') + STOP, IntegrityError, "not lengths"),
    ],
)  # fmt: skip
def test_hostile_tars_are_refused_in_one_line(data: bytes, kind: type[PerceiverError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        read(data)
    assert "\n" not in str(caught.value)


def test_bytes_of_strangers_never_end_in_another_error() -> None:
    rng = np.random.default_rng(0)
    data = bytearray(stream_of(3))
    for _ in range(3000):
        changed = data.copy()
        for place in rng.integers(0, len(data), rng.integers(1, 4)).tolist():
            changed[place] = rng.integers(256)
        try:
            for record in read(bytes(changed)):
                for name, npy in record.arrays.items():
                    Stored("x", SPOKEN, name, 0.0, partial(bytes, npy)).array()
        except PerceiverError:
            pass


def faults_of(data: bytes, header: Header = SPOKEN) -> str:
    """Return the error of reading a stream and all its arrays, or an empty text."""
    try:
        for example in examples_of(Pipe("-", io.BytesIO(data)), header.inputs, Limits()):
            for stored in example.sources.values():
                assert isinstance(stored, Stored)
                stored.array()
    except (DataError, IntegrityError) as error:
        return str(error)
    return ""


def test_a_flipped_bit_is_found_wherever_it_matters() -> None:
    """Flips that are not found lie in zeros that fill blocks: the records are those that were written."""
    data = stream_of(2)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        ends = [(info.offset_data + info.size, info.offset_data + -(-info.size // BLOCK) * BLOCK) for info in tar]
    assert not faults_of(data)
    unused = {place for begin, end in ends for place in range(begin, end)} | {*range(ends[-1][1], len(data))}
    rng = np.random.default_rng(0)
    for place in [*rng.integers(0, len(data), 600).tolist(), *(begin - 1 for begin, _ in ends)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        fault = faults_of(bytes(flipped))
        ends_checksum = flipped[place] in b" \0"  # in a tar header
        assert "'stdin'" in fault or place in unused or ends_checksum


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 65535, 65536, 65537, 200_001])
def test_digests_are_of_pages_and_chunks(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    found, wanted = digests(data), b""
    for at in range(0, size, 65536):
        chunk = data[at : at + 65536]
        pages = [chunk[page : page + 4096] for page in range(0, len(chunk), 4096)]
        rest = pages.pop() if len(pages[-1]) < 4096 else b""
        sums = [sum(int.from_bytes(page[i : i + 8], "little") for i in range(0, 4096, 8)) for page in pages]
        digest = zlib.crc32(b"".join((each % 2**64).to_bytes(8, "little") for each in sums) + rest)
        wanted += digest.to_bytes(4, "little")
    assert (found, len(found)) == (wanted, num_digests(size))


def test_a_span_is_compared_by_the_chunks_it_touches() -> None:
    header = Header({"audio": AudioSpec(rate_hz=100_000)})
    array = npy_bytes(np.linspace(-1, 1, 100_000, dtype=np.float32))

    def stored(place: int) -> Stored:
        damaged = bytearray(array)
        damaged[place] ^= 1
        return Stored("a.wav", header, "audio", 1.0, lambda: bytes(damaged), digests(array), "'x.tar'")

    assert np.array_equal(stored(300_000).array((0.1, 0.1)), np.frombuffer(array[-400_000:], "<f4")[10_000:20_000])
    for place, span in ((300_000, None), (50_000, (0.1, 0.1)), (80_000, (0.1, 0.1)), (100, (0.5, 0.1))):
        with pytest.raises(DataError, match=r"'x.tar': audio of the record 'a.wav' is damaged"):
            stored(place).array(span)
    with pytest.raises(DataError, match="is damaged"):
        b"".join(stored(300_000).content())


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/tmp/pickled").touch, ())


def npy(array: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


PICKLED = npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)
CLAIM = npy_bytes(np.zeros(4, np.float32)).replace(b"(4,), }", b"(10**12,)"[:7])


@pytest.mark.parametrize(
    ("modality", "data", "message"),
    [
        ("image", pickle.dumps(Evil()), "not an array in NPY format"),
        ("image", PICKLED, "an array of object, expected numbers"),
        ("image", npy(np.zeros((2, 2, 1), "U3")), "expected numbers"),
        ("image", npy(np.zeros((2, 2, 1), [("a", "u1")])), "expected numbers"),
        ("image", npy(np.zeros((2, 2, 1), ">i2")), "expected numbers"),
        ("image", npy(np.asfortranarray(np.zeros((3, 2, 1), np.uint8))), "Fortran"),
        ("image", npy(np.zeros((2, 2, 3), np.uint8)), r"uint8 \(2, 2, 3\), expected uint8 \(n, n, 1\)"),
        ("image", npy(np.zeros((2, 2, 1), np.float32)), "expected uint8"),
        ("image", npy(np.zeros((2, 2), np.uint8)), "expected uint8"),
        ("image", npy(np.zeros((0, 2, 1), np.uint8)), "no values"),
        ("image", npy(np.zeros((2, 2, 1), np.uint8))[:-1], "in 3 bytes"),
        ("image", b"\x93NUMPY\x01\x00\xff\xff" + bytes(100), "not an array in NPY format"),
        ("image", b"\x93NUMPY\x01\x00\x10\x00{'descr': [((((" + bytes(20), "damaged NPY header"),
        ("audio", npy(np.full(9, np.nan, np.float32)), "not finite"),
        ("audio", npy(np.full(9, 1e30, np.float32)), "above 1e"),
        ("audio", npy(np.zeros(9, np.float64)), "expected float32"),
        ("points", npy(np.zeros((9, 4), np.float32)), r"expected float32 \(n, 3\)"),
    ],
)  # fmt: skip
def test_arrays_are_held_to_what_decoding_gives(modality: str, data: bytes, message: str) -> None:
    header = Header({**SPOKEN.inputs, "points": PointsSpec()})
    with pytest.raises(DataError, match=message):
        Stored("a", header, modality, 0.0, partial(bytes, data)).array()


def test_a_recipe_that_decodes_otherwise_is_refused_by_name() -> None:
    same = {"image": SPEC.model_copy(update={"flip": 1.0, "crop_area": (0.5, 1.0), "bands": 3})}
    SPOKEN.check("'x'", same, "the model")  # crops and features come after
    with pytest.raises(DataError, match=r"inputs\.audio\.rate_hz = 1000, but the model has 8000; .*preprocess -m"):
        SPOKEN.check("'x'", {"audio": AudioSpec(rate_hz=8000)}, "the model")
    assert SPOKEN.hash == Header({**same, "audio": SPOKEN.inputs["audio"]}).hash
    assert SPOKEN.hash != Header({"image": SPEC}).hash
