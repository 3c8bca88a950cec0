"""Formats that are not read: what a file is, by its first bytes, and how to make a readable file of it."""

from __future__ import annotations

import re
import struct

NEW_SUBFILE_TYPE, DNG_VERSION = 254, 50_706  # tags of TIFF
RAW_SUFFIXES = (
    ".cr2", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".dng", ".pef", ".srw", ".3fr", ".iiq", ".erf", ".mef", ".mos",
    ".dcr", ".kdc",
)  # fmt: skip
ZIP = "a ZIP archive"
_RAW = "a raw camera picture"
_TO_PNG, _TO_WAV, _TO_MP4 = (f"convert it: {command}" for command in (
    "magick IN OUT.png", "ffmpeg -i IN OUT.wav", "ffmpeg -i IN OUT.mp4",
))  # fmt: skip
_DEVELOP = "convert it: darktable-cli IN OUT.png"
_UNPACK = "unpack it: a folder of its files is read"
_TO_PLY = "convert it: assimp export IN OUT.ply"
_SCAN_TO_PLY = "convert it: CloudCompare -O IN -C_EXPORT_FMT PLY -SAVE_CLOUDS"
_ARRAYS = "save its arrays as pictures or sounds, or one array a file with numpy.save"
_SPACE = rb"\xef?\xbb?\xbf?\s*(?:<\?xml[^>]*>\s*)?(?:(?><!--.*?-->)\s*)*+"  # atomic: comments are not tried anew
# Signature, name, and how to make a readable file. The first signature that matches counts.
FOREIGN = (
    (rb"version https://git-lfs", "a Git LFS pointer in place of the file", "fetch the files: git lfs pull"),
    (rb"[./]*(?:\.git)?/annex/objects/", "a git-annex pointer in place of the file", "fetch the files: git annex get"),
    (_SPACE + rb"(?i:<!doctype svg[^>]*>\s*)?<svg", "an SVG drawing", "convert it: rsvg-convert -o OUT.png IN"),
    (_SPACE + rb"(?i:<!doctype html|<html|<head|<body|<title|<script)",
     "a web page in place of the file", "download it again: the page may name what went wrong"),
    (_SPACE + rb"<(?:COLLADA|X3D|amf)", "a 3-D scene of a format that is not read", _TO_PLY),
    (rb"Kaydara FBX Binary|; FBX \d|#VRML |#X3D |MM(?!\0[*+]).{4}(?:\x02\0|==)|\$MeshFormat",
     "a 3-D scene of a format that is not read", _TO_PLY),
    (rb"\s*\{.{0,3000}?\"asset\"\s*:\s*\{[^}]*\"version\"", "a glTF in text, whose numbers lie in other files",
     "convert it: gltf-transform copy IN OUT.glb"),
    (rb"PK\x03\x04.{26}[^\0]{1,200}?(?:\.usd[ac]|\.model)|PXR-USDC|#usda ", "a USD or 3MF scene", "export it as GLB"),
    (rb"BLENDER", "a Blender file", "export it as GLB"),
    (rb"ISO-10303-21;", "a STEP drawing", "export its surfaces as STL"),
    (rb"DRACO", "a mesh packed by Draco", "convert it: draco_decoder -i IN -o OUT.ply"),
    (rb"ASTM-E57|\d+\s*\n\d+\s*\n(?:\S+ \S+ \S+\s*\n){4}(?:\S+ \S+ \S+ \S+\s*\n){4}", "a scan in E57 or PTX",
     _SCAN_TO_PLY),
    (rb"#binvox|NRRD0|# vtk DataFile", "a volume or grid (binvox, NRRD, VTK)", "save its points as PLY"),
    (rb"#ROSBAG|\xd4\xc3\xb2\xa1|\xa1\xb2\xc3\xd4", "a recording of messages (ROS, pcap)", "write its clouds as PCD"),
    (rb"\xef?\xbb?\xbf?\s*<\?xml", "an XML document", ""),
    (rb"PK\x03\x04.{26}[^/]{1,200}/(?:data\.pkl|\.format_version|version|byteorder)", "a PyTorch file", _ARRAYS),
    (rb"PK\x03\x04.{26}[^\0]{1,200}?\.npy", "an .npz archive of arrays", _ARRAYS),
    (rb"PK\x03\x04.{26}\[Content_Types\]", "an Office document", ""),
    (rb"PK[\x03\x05\x07][\x04\x06\x08]", ZIP, _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (rb".{257}ustar", "a TAR archive", _UNPACK),
    (rb"\x1f\x8b\x08|\x28\xb5\x2f\xfd|BZh[1-9]1AY&SY|\xfd7zXZ\0", "a compressed file", _UNPACK),
    (rb"\x80\x02\x8a\x0al\xfc\x9cF", "a PyTorch file", _ARRAYS),
    (rb"\x80[\x02-\x05](?:\x95|[}\](c\x8a\x8c\x58])", "a pickle, which can run any program and is never read", _ARRAYS),
    (rb".{3}\0{5}\{\"", "a file of weights (.safetensors)", ""),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", _ARRAYS),
    (rb"MATLAB .{0,12}MAT-file", "a MATLAB file", _ARRAYS),
    (rb"PAR1|ARROW1|FEA1", "a table in Parquet or Arrow",
     "write its rows as files, and a manifest that names them; for numbers over time pass --preset tiny-series"),
    (rb"SQLite format 3\0", "an SQLite database", ""),
    (rb".{16}\xde\xc0\xef\xbe", "an LMDB database", "save each value as a file, with the package lmdb"),
    (rb".{128}DICM", "a DICOM image", "convert it: dcmj2pnm --write-png IN OUT.png"),
    (rb".{344}n[+i]1\0", "a NIfTI volume", "save its slices as pictures"),
    (rb"SIMPLE  =", "a FITS image", "save its arrays as TIFF or PNG"),
    (rb"%PDF-", "a PDF document", "convert it: pdftoppm -png IN OUT"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript document", "convert it: gs -sDEVICE=png16m -o OUT.png IN"),
    (rb"....ftypcrx |II\*\0\x10\0\0\0CR|FUJIFILMCCD-RAW|II[RU][OS\0]|MMO[RS]|FOVb|\0MRM", _RAW, _DEVELOP),
    (rb"\x89PNG\r?\n\x1a?\n", "a PNG whose line ends were changed", "copy it again, not in text mode"),
    (rb"8BPS", "a Photoshop document", _TO_PNG),
    (rb"gimp xcf", "a GIMP document", _TO_PNG),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture", "convert it: djxl IN OUT.png"),
    (rb"\x76\x2f\x31\x01|#\?R(?:ADIANC|GB)E", "a picture of high dynamic range (EXR, HDR)", _TO_PNG),
    (rb"\0\0[\x01\x02]\0[\x01-\x40]\0|icns", "an icon", _TO_PNG),
    (rb"DDS |qoif|\x01\xda[\0\1][\1\2]|\x0a[\0-\5]\x01[\x01\x02\x04\x08]|AT&TFORM|II\xbc|\x8aMNG|BPG\xfb",
     "a picture of a format that is not read", _TO_PNG),
    (rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", "a Windows metafile", _TO_PNG),
    (rb"MThd", "a MIDI file, notes without sound", "convert it: timidity -Ow -o OUT.wav IN"),
    (rb"MAC |TTA[12]|DSD |FRM8|MPCK|MP\+|ajkg|Creative Voice File|FORM....8SVX|2BIT|\.ra\xfd|#!SILK",
     "a sound of a format that is not read", _TO_WAV),
    (rb"\.RMF|[FCZ]WS[\x01-\x30]|YUV4MPEG2 |DKIF|nut/multimedia|\xb7\xd8\x00\x20\x37\x49\xda\x11",
     "a video of a format that is not read", _TO_MP4),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a database of thumbnails (Thumbs.db) or an old Office document", ""),
    (rb"\0\0\0\x01Bud1", "notes of the macOS Finder (.DS_Store)", ""),
    (rb"\0\x05\x16[\0\x07]", "a resource fork that macOS writes beside files", ""),
    (rb"\0{64}\0*\Z", "nothing but zeros at its start: a download or copy that was not finished", ""),
)  # fmt: skip


def described(head: bytes, name: str) -> tuple[str, str] | None:
    """Return what a file that begins with `head` is, and how to make a readable file of it; None if unknown."""
    if is_camera_raw(head, name):
        return _RAW, _DEVELOP
    if ".tfrecord" in name.lower():  # it begins with a length
        return "a TFRecord", "save each item as a file, with the package tensorflow"
    return next(((what, how) for each, what, how in FOREIGN if re.match(each, head, re.DOTALL)), None)


def is_camera_raw(head: bytes, name: str) -> bool:
    """Return whether a TIFF is a raw camera picture: a DNG, with a thumbnail as its first page, or by its suffix."""
    if head[:4] not in (b"II*\0", b"MM\0*"):
        return False
    if name.lower().endswith(RAW_SUFFIXES) or head[8:10] == b"CR":
        return True
    order = "<" if head[:1] == b"I" else ">"
    at = struct.unpack_from(f"{order}I", head.ljust(8, b"\0"), 4)[0]
    if at + 2 > len(head):
        return False
    for entry in range(at + 2, min(at + 2 + 12 * struct.unpack_from(f"{order}H", head, at)[0], len(head) - 11), 12):
        tag, _, _, number = struct.unpack_from(f"{order}HHII", head, entry)
        if tag == DNG_VERSION or (tag == NEW_SUBFILE_TYPE and number & 1):
            return True
    return False
