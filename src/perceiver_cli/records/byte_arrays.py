"""Byte arrays in files: the paper's M x C as .npy or .safetensors."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import Any

from perceiver_cli.errors import DataError, IntegrityError
from perceiver_cli.files import show_text
from perceiver_cli.preprocess import modality
from perceiver_cli.preprocess.base import Array
from perceiver_cli.preprocess.detection import METADATA, is_safetensors
from perceiver_cli.preprocess.point_tables import shape_of
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits, stemless
from perceiver_cli.records.format import HEAD_BYTES, Header, Stored, json_object
from perceiver_cli.records.npy import npy_bytes, parse_npy


def is_byte_array(source: Source, spec: InputSpec) -> bool:
    """Return whether an .npy that could be a file of the modality has the shape of the byte array of `spec`."""
    if not source.is_table or not (head := source.head()).startswith(b"\x93NUMPY"):
        return False
    layout = modality(spec.modality).layout(spec)
    return shape_of(head) == (layout.num_inputs, layout.num_channels)


def stored_rows(source: Source, name: str, spec: InputSpec, limits: Limits) -> Stored:
    """Return a file's byte array as the array of a record. Raises DataError if it is damaged or does not fit `spec`."""
    layout = modality(name).layout(spec)
    if layout.learned_channels or layout.permutation is not None or layout.stem != "none":
        fault = f"{source.shown}: a byte array, but {name} is read with learned or permuted positions, or with a stem"
        raise DataError(fault, "pass the file that it was made from")
    npy, header = _rows_in(source, limits)
    if header is not None:
        header.check(source.shown, {name: spec}, "the model")
    shape = parse_npy(npy, source.shown).shape
    if shape != (layout.num_inputs, layout.num_channels):
        sizes, wanted = " x ".join(map(str, shape)), f"{layout.num_inputs} x {layout.num_channels}"
        raise DataError(f"{source.shown}: a byte array of {sizes}, expected {wanted} for {name}")
    return Stored(source.name, Header({name: spec}, content="fourier"), name, 0.0, partial(bytes, npy))


def settled_by_rows(source: Source, name: str, spec: InputSpec, limits: Limits) -> InputSpec:
    """Return a spec without a stem; the file's header, if any, gives the value of each "auto". Raises DataError."""
    _, header = _rows_in(source, limits)
    return stemless(spec) if header is None else header.settled({name: spec})[name]


def safetensors_rows(rows: Array, name: str, spec: InputSpec) -> bytes:
    """Return a byte array (M, C) float32 as .safetensors, with its preparation in the metadata."""
    from safetensors.numpy import save

    facts = json.loads(Header({name: spec}, content="fourier").to_json())
    facts["sha256"] = _sha256(facts, npy_bytes(rows))
    return bytes(save({name: rows}, metadata={METADATA: json.dumps(facts)}))


def _sha256(facts: dict[str, Any], npy: bytes) -> str:
    return hashlib.sha256(json.dumps(facts).encode() + npy).hexdigest()


def _rows_in(source: Source, limits: Limits) -> tuple[bytes, Header | None]:
    """Return a file's byte array in NPY format, and its header; an .npy has none."""
    data = source.read(limits)
    if not is_safetensors(data[:HEAD_BYTES]):
        return data, None
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        (rows,) = load(data).values()
        length, npy = int.from_bytes(data[:8], "little"), npy_bytes(rows)
        header = json.loads(data[8 : 8 + length])["__metadata__"][METADATA].encode()
        facts = json_object(header, "its metadata")
        if facts.pop("sha256", None) not in (None, _sha256(facts, npy)):  # version 0.1.0 wrote none
            raise ValueError("its bytes are not those that were written")
        return npy, Header.parse(header, "its metadata")
    except (SafetensorError, IntegrityError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{source.shown}: a damaged byte array: {show_text(str(error))}") from error
