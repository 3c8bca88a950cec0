"""A file of a format that is not read says what it is, and what makes a readable one of it, in one short line."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import sqlite3
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from perceiver_cli.errors import DataError
from perceiver_cli.preprocess.detection import detected
from perceiver_cli.preprocess.foreign import FOREIGN
from perceiver_cli.preprocess.source import Source
from tests.conftest import Perceive
from tests.preprocess.test_picture_formats import tiff


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def zipped(*names: str) -> bytes:
    def write(file: io.BytesIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.writestr(name, b"x" * 100)

    return written(write)


def tarred(file: io.BytesIO) -> None:
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))


def database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table a (b)")
    return connection.serialize()


def raw(make: bytes = b"", subfile: int = 1, tag: int = 254) -> bytes:
    """Return a TIFF whose first page is a thumbnail, as NEF, ARW and DNG have it."""
    pixels = tiff(np.zeros((4, 6, 3), np.uint8))
    count = struct.unpack_from("<H", pixels, 8)[0]
    entry = struct.pack("<HHII", tag, 4, 1, subfile)
    entries = b"".join(sorted([entry, *(pixels[10 + 12 * n : 22 + 12 * n] for n in range(count))]))
    return pixels[:8] + struct.pack("<H", count + 1) + entries + pixels[10 + 12 * count :] + make


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>"
CASES = [
    ("cat.jpg", LFS, "Git LFS pointer", "git lfs pull"),
    ("cat.jpg", b"../../.git/annex/objects/aa/bb/SHA256E-s1--x.jpg", "git-annex pointer", "git annex get"),
    ("cat.jpg", HTML, "web page", "download it again"),
    ("cat.jpg", b"\xef\xbb\xbf\r\n <HTML><body>no", "web page", "download it again"),
    ("cat.jpg", b"<?xml version='1.0'?>\n<!-- a --> <!-- b -->\n<!doctype HTML><html>", "web page", "download"),
    ("cat.jpg", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML document", ""),
    ("a.fbx", b"Kaydara FBX Binary  \0\x1a\0", "3-D scene", "assimp export"),
    ("a.dae", b"<?xml version='1.0'?>\n<COLLADA xmlns='x'>", "3-D scene", "assimp export"),
    ("a.3ds", b"MM\x10\0\0\0\2\0\x0a\0", "3-D scene", "assimp export"),
    ("a.wrl", b"#VRML V2.0 utf8\n", "3-D scene", "assimp export"),
    ("a.msh", b"$MeshFormat\n2.2 0 8\n$EndMeshFormat\n", "3-D scene", "assimp export"),
    ("a.gltf", b'{\n "asset" : { "generator": "x", "version" : "2.0" }, "buffers": []}', "glTF", "gltf-transform copy"),
    ("a.usdz", zipped("model.usdc"), "USD or 3MF", "GLB"),
    ("a.3mf", zipped("3D/3dmodel.model"), "USD or 3MF", "GLB"),
    ("a.blend", b"BLENDER-v293RENDH", "Blender file", "GLB"),
    ("a.step", b"ISO-10303-21;\nHEADER;", "STEP drawing", "STL"),
    ("a.drc", b"DRACO\2\2\1\1", "Draco", "draco_decoder"),
    ("a.e57", b"ASTM-E57\1\0\0\0", "scan in E57 or PTX", "CloudCompare"),
    ("a.ptx", b"8\n10\n" + b"1 0 0\n" * 4 + b"1 0 0 0\r\n" * 4 + b"1 2 3 0.5\n", "E57 or PTX", "CloudCompare"),
    ("a.binvox", b"#binvox 1\ndim 32 32 32\n", "volume or grid", "PLY"),
    ("a.bag", b"#ROSBAG V2.0\n", "recording of messages", "PCD"),
    ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG drawing", "rsvg-convert"),
    ("a.svg", b"<?xml version='1.0'?>\n<!-- Inkscape -->\n<!DOCTYPE svg PUBLIC 'x' 'y'>\n<svg/>", "SVG", "rsvg"),
    ("a.pt", written(lambda file: torch.save({"a": torch.zeros(3)}, file)), "PyTorch file", "numpy.save"),
    ("a.pth", written(lambda f: torch.save([1], f, _use_new_zipfile_serialization=False)), "PyTorch file", ""),
    *[(f"a{n}.pkl", pickle.dumps({"a": [1]}, n), "pickle, which can run any program", "") for n in (2, 3, 4, 5)],
    ("a.npz", written(lambda file: np.savez(file, a=np.zeros(3))), ".npz archive", "numpy.save"),
    ("a.npz", written(lambda file: np.savez_compressed(file, np.zeros(3))), ".npz archive", "numpy.save"),
    ("a.zip", zipped("cat/1.jpg"), "ZIP archive", "unpack it"),
    ("a.docx", zipped("[Content_Types].xml"), "Office document", ""),
    ("a.7z", b"7z\xbc\xaf\x27\x1c\0\4", "7z archive", "unpack it"),
    ("a.rar", b"Rar!\x1a\x07\x01\0", "RAR archive", "unpack it"),
    ("a.tar.gz", gzip.compress(written(tarred)), "compressed file", "unpack it"),
    ("a.gz", gzip.compress(b"x"), "compressed file", "unpack it"),
    ("a.pdf", b"%PDF-1.7\n%\xe2\xe3", "PDF document", "pdftoppm"),
    ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0", "PostScript", "gs -sDEVICE"),
    ("a.dcm", bytes(128) + b"DICM\2\0", "DICOM image", "dcmj2pnm"),
    ("a.nii", struct.pack("<i", 348) + bytes(340) + b"n+1\0", "NIfTI", ""),
    ("a.fits", b"SIMPLE  =                    T", "FITS", ""),
    ("a.h5", b"\x89HDF\r\n\x1a\n\0\0", "HDF5", "numpy.save"),
    ("a.mat", written(lambda file: scipy.io.savemat(file, {"a": np.zeros(3)})), "MATLAB", "numpy.save"),
    ("a.parquet", b"PAR1\x15\x04", "Parquet", "manifest"),
    ("a.sqlite", database(), "SQLite", ""),
    ("Thumbs.db", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(16), "Thumbs.db", ""),
    (".DS_Store", b"\0\0\0\x01Bud1\0", "macOS Finder", ""),
    ("a.cr2", b"II*\0\x10\0\0\0CR\2\0" + bytes(40), "raw camera picture", "darktable-cli"),
    ("a.tif", raw(), "raw camera picture", "darktable-cli"),
    ("a.tif", raw(tag=50_706, subfile=0x0401), "raw camera picture", "darktable-cli"),
    ("a.NEF", tiff(np.zeros((4, 6, 3), np.uint8)), "raw camera picture", "darktable-cli"),
    ("a.cr3", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "raw camera picture", "darktable-cli"),
    ("a.raf", b"FUJIFILMCCD-RAW 0201", "raw camera picture", "darktable-cli"),
    ("a.orf", b"IIRO\x08\0\0\0", "raw camera picture", "darktable-cli"),
    ("a.psd", b"8BPS\0\1", "Photoshop", "magick"),
    ("a.jxl", b"\xff\x0a\xfa\x7f", "JPEG XL", "djxl"),
    ("a.exr", b"\x76\x2f\x31\x01\2\0", "high dynamic range", "magick"),
    ("a.ico", written(lambda file: Image.new("RGB", (16, 16)).save(file, "ICO")), "icon", "magick"),
    ("a.dds", written(lambda file: Image.new("RGB", (16, 16)).save(file, "DDS")), "not read", "magick"),
    ("a.pcx", written(lambda file: Image.new("RGB", (16, 16)).save(file, "PCX")), "not read", "magick"),
    ("a.png", b"\x89PNG\n\x1a\n\0\0\0\rIHDR", "line ends were changed", "copy it again"),
    ("a.png", bytes(4096), "nothing but zeros", ""),
    ("a.mid", b"MThd\0\0\0\6", "MIDI", "timidity"),
    ("a.ape", b"MAC \x96\x0f", "sound of a format", "ffmpeg"),
    ("a.rm", b".RMF\0\0\0\x12", "video of a format", "ffmpeg"),
    ("a.safetensors", struct.pack("<Q", 60) + b'{"w":{"dtype":"F32"', "weights", ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "what", "how"), CASES, ids=[f"{name}-{what}" for name, _, what, _ in CASES])
def test_what_is_not_read_says_what_it_is(name: str, data: bytes, what: str, how: str) -> None:
    with pytest.raises(DataError) as caught:
        detected(Source(name, data))
    message = str(caught.value)
    assert message.startswith(f"'{name}': ")
    assert what in message
    assert how in message
    assert len(message) < 200
    assert "\n" not in message


def test_unknown_bytes_are_unknown_in_few_words() -> None:
    for data in (b"\x01\x02\x03", b"some words", b"{}", b"PK", b"BM"):
        with pytest.raises(DataError) as caught:
            detected(Source("x.bin", data))
        assert str(caught.value) == "'x.bin': unknown format"


def test_what_is_read_is_not_foreign() -> None:
    pyramid = raw(subfile=0)
    assert detected(Source("a.tif", pyramid)).kinds == ("image",)
    assert detected(Source("a.tif", tiff(np.zeros((4, 6, 3), np.uint8), big=True))).kinds == ("image",)


def test_no_signature_is_slow() -> None:
    heads = [b"<!-- -->" * 512, b"<!--" * 1024, b" " * 4096, b"<?xml" * 800, b"PK\x03\x04" + b"a/" * 2000, bytes(4096)]
    for data in heads:
        for signature, _, _ in FOREIGN:
            begun = time.process_time()
            re.match(signature, data, re.DOTALL)
            assert time.process_time() - begun < 0.05


def test_a_run_lists_the_formats_once_and_only_those_of_its_model(
    perceive: Perceive, trained: Path, tmp_path: Path
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"some words")
    done = perceive("predict", *sorted(map(str, tmp_path.glob("*.png"))), "-m", str(trained), "--device", "cpu")
    assert done.returncode == 3
    assert done.stderr.count(b"JPEG 2000") == 1
    assert b"audio" not in done.stderr
    for line in done.stdout.splitlines():
        assert json.loads(line)["error"].endswith(": unknown format")
