"""From files to records, in the given order, by several processes: the work of `preprocess`."""

from __future__ import annotations

import mmap
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from perceiver_cli.config import READING, Config, DataConfig, load_preset, tiny_config
from perceiver_cli.data.account import Account
from perceiver_cli.data.archives import unpacked
from perceiver_cli.data.catalog import Catalog, of_listing, resolve_specs
from perceiver_cli.data.containers import kind_of_stream
from perceiver_cli.data.decoder import Decoder, seconds_of
from perceiver_cli.data.examples import Example, Examples
from perceiver_cli.data.folders import parent
from perceiver_cli.data.inputs import opened, piped
from perceiver_cli.data.listing import Listing, data_of_run, fitting, listed, listed_stream, ways_to_read
from perceiver_cli.data.manifest import EVERY, Labels, Row
from perceiver_cli.data.workers import in_order, in_progress, start_method
from perceiver_cli.errors import DataError, UsageError
from perceiver_cli.files import atomic_write, show_path
from perceiver_cli.model.checkpoint import read_info
from perceiver_cli.preprocess import modality, settled
from perceiver_cli.preprocess.base import ByteArray
from perceiver_cli.preprocess.detection import detected, identified, only, with_formats
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import InputSpec, Limits, stemless
from perceiver_cli.records.byte_arrays import safetensors_rows
from perceiver_cli.records.format import Content, Facts, Header
from perceiver_cli.records.npy import npy_bytes
from perceiver_cli.records.shards import UNLIMITED, open_shards
from perceiver_cli.records.stream import END_BYTES, Writer, pack
from perceiver_cli.run_folder import find_model

PLACE_BYTES = 4 << 20  # shared memory for the arrays of one input; the system allocates pages at the first write
UNITS = ((10**9, "G"), (10**6, "M"), (10**3, "k"))  # of --shard-size
_PATTERN = re.compile(r"%0?\d*d")
Dtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class Job:
    """The examples to prepare, and how.

    header: of the stream. examples: in order, each with its split. catalog: of the inputs. augment: number of variants
    of each training example; 0: the example itself. dtype: type of rows with Fourier features.
    """

    header: Header
    examples: Sequence[tuple[str, Example]]
    limits: Limits
    catalog: Catalog
    seed: int = 0
    augment: int = 0
    dtype: Dtype = "float32"


def plan(
    inputs: Sequence[str] | Source,
    *,
    model: str | None = None,
    preset: str | None = None,
    changes: Sequence[str] = (),
    raised: Mapping[str, float] | None = None,
    label_from_parent: bool = False,
    augment: int = 0,
    fourier: Dtype | None = None,
    part: tuple[int, int] = (0, 1),
) -> Job:
    """Return the job for inputs: files, folders and manifests, or the bytes of one.

    The recipe is a model's or a preset's, else the tiny preset for their modalities; the training files settle "auto"
    as in training. label_from_parent: a file's label is the name of its folder. part: (I, N) for the I-th of N parts
    of neighbouring examples, from 0; all examples settle the recipe. Raises UsageError for options that contradict each
    other, DataError if nothing is usable.
    """
    config = _recipe(model, preset)
    wanted = None if config is None else only(config.inputs)
    if isinstance(inputs, Source):
        root, listing = inputs.name, _listing_of_bytes(inputs, wanted)
        first = next(iter(listing.rows), Row()).file
        if first is not None and first.error is not None:
            raise with_formats(first.error, None if config is None else config.inputs)
    else:
        listing, root = _listing_of(inputs, label_from_parent, _ways_to_read(model, config, changes))
    catalog = of_listing(listing, root, reads=None if config is None else config.inputs)
    order = {name: n for n, row in enumerate(listing.rows) for name in row.names(listing.folder)}
    config = config or tiny_config(catalog.modalities)
    if fourier is not None and model is None and preset is None:
        config = config.model_copy(update={"inputs": {name: stemless(spec) for name, spec in config.inputs.items()}})
    config = config.override(list(changes))
    brought = {name: spec for name, spec in config.inputs.items() if name in catalog.modalities}
    if not brought:
        holds, wanted = "+".join(catalog.holds), "+".join(sorted(config.inputs))
        raise DataError(f"{show_path(catalog.root)}: holds {holds}, but {config.name} reads {wanted}")
    limits = config.data.limits.raised(raised)
    held = catalog.hold_out(config.data.val_fraction)
    every = replace(held, splits={"train": Examples(chain(*held.splits.values()))})
    held = held if "train" in held.splits else every
    try:
        specs = resolve_specs(brought, held, limits)
    except DataError:  # no training file can be read: a file of another split may settle "auto"
        specs = resolve_specs(brought, every, limits)
    content: Content = "fourier" if fourier is not None else "prepared" if augment else "decoded"
    header = Header(specs, catalog.classes, catalog.multi_label, content)
    if content != "decoded":
        _check_prepared(header)
    splits = (held if augment else catalog).splits
    examples = [(split, example) for split in splits for example in splits[split]]
    examples.sort(key=lambda pair: min((order.get(s.name, 0) for s in pair[1].sources.values()), default=0))
    number, parts = part
    examples = examples[len(examples) * number // parts : len(examples) * (number + 1) // parts]
    seed, dtype = config.train.seed, fourier or "float32"
    return Job(header, examples, limits, catalog, seed, augment, dtype)


def _recipe(model: str | None, preset: str | None) -> Config | None:
    """Return the configuration of a model or a preset, None without either. Raises UsageError for both."""
    if model is not None and preset is not None:
        raise UsageError("--model and --preset are two recipes", "pass one of them")
    if model is not None:
        return read_info(find_model(model)).config
    return None if preset is None else load_preset(preset)


def _ways_to_read(
    model: str | None, config: Config | None, changes: Sequence[str]
) -> Callable[[str], Sequence[DataConfig]]:
    """Return a function from a path to how to read it: by the changes of the command line, else as a model's data."""
    config = config or tiny_config(["image"])
    bare = config.model_copy(update={"data": DataConfig(pair=config.data.pair)})
    own = [change for change in changes if change.startswith("data.")]
    given = {name: value for name, value in vars(bare.override(own).data).items() if name in READING}
    given = {name: value for name, value in given.items() if any(change.startswith(f"data.{name}") for change in own)}
    kept = {"pass_columns": (EVERY,)}
    if model is None:
        usual = bare.data.model_copy(update=given | kept)
        return lambda path: (usual,)
    run, trained = data_of_run(find_model(model)), config.data
    return lambda path: [way.model_copy(update=kept) for way in ways_to_read(run, trained, given, path)]


def _listing_of_bytes(source: Source, wanted: str | None) -> Listing:
    """Return the listing of the bytes of a file, or of those of a tar or zip."""
    with source.open(UNLIMITED) as file:
        head, stream = unpacked(file, source.name)
        if kind_of_stream(head) == "archives":
            return listed_stream(stream, source.name, "optional")
    return Listing([Row(source.name, file=piped(source, wanted))])


def _listing_of(
    paths: Sequence[str], label_from_parent: bool, ways: Callable[[str], Sequence[DataConfig]]
) -> tuple[Listing, str]:
    """Return the rows of files, folders and manifests together, and a name for them. ways: to read each, in order."""

    def listing_of(path: str) -> Listing:
        labels: Labels = "ignored" if label_from_parent and os.path.isdir(path) else "optional"
        return fitting(lambda options: listed(path, labels, options), ways(path))

    listings = list(map(listing_of, paths))
    for place, each in enumerate(listings if label_from_parent else ()):
        # Only the absolute path of "." or "a.png" has the name of its folder.
        wholes = ((row, os.path.abspath(os.path.join(each.folder, next(iter(row.paths), "")))) for row in each.rows)
        listings[place] = replace(each, rows=[replace(row, labels=(parent(whole),)) for row, whole in wholes])
    if len(paths) == 1:
        return replace(listings[0], rows=list(listings[0].rows)), paths[0]
    # Only whole paths distinguish the files of several folders.
    rows = [row.below(each.folder) for each in listings for row in each.rows]
    several, notes = any(each.multi_label for each in listings), tuple(note for each in listings for note in each.notes)
    by_stem = all(each.by_stem for each in listings)
    account, pair = Account(), ways(paths[0])[-1].pair
    for each in listings:
        account.add(each.account)
    listing = Listing(rows, by_stem=by_stem, pair=pair, multi_label=several, notes=notes, account=account)
    return listing, f"{len(paths)} inputs"


def _check_prepared(header: Header) -> None:
    """Raise UsageError for a recipe whose model inputs cannot be stored."""
    if Decoder(header.inputs, Limits()).num_views > 1:
        raise UsageError("a recipe with several windows of an input", "pass --set inputs.NAME.eval_windows=1")
    for spec in header.inputs.values() if header.content == "fourier" else ():
        _check_rows(spec, "leave out --fourier")


def _check_rows(spec: InputSpec, hint: str) -> None:
    """Raise UsageError for an input whose rows with Fourier features cannot be stored."""
    layout = modality(spec.modality).layout(spec)
    if layout.learned_channels or layout.permutation is not None:
        raise UsageError(f"inputs.{spec.modality} has learned positions or permuted rows", hint)
    if layout.stem != "none":
        fault = f"inputs.{spec.modality}.stem = {layout.stem}: a model learns these layers, before positions are added"
        raise UsageError(fault, f"{hint}, or train with --set inputs.{spec.modality}.stem=none")


@dataclass(frozen=True)
class Done:
    """Progress after one example: its records, or the error in their place, are written. count: examples so far.

    example: the id of an unreadable one, with its error. num_bytes: written so far by this process.
    """

    count: int
    total: int
    example: str = ""
    error: str | None = None
    num_bytes: int = 0


Npys = dict[str, bytes | memoryview]
Packed = list[tuple[Facts, Npys]]


def made(job: Job, examples: Sequence[tuple[str, Example]], workers: int) -> Iterator[Packed]:
    """Yield the records of each example without numbers; an unreadable one has facts with the error."""
    decoder = Decoder(job.header.inputs, job.limits)
    if not workers or start_method() != "fork":
        yield from in_order(partial(_made, job, decoder), examples, workers)
        return
    # To send arrays as messages takes as long as to decode them. Instead, each input in progress has a place in shared
    # memory, and `in_order` begins no new input in it before the old one's records are written.
    shared = memoryview(mmap.mmap(-1, in_progress(workers) * PLACE_BYTES))
    numbered = ((number % in_progress(workers), example) for number, example in enumerate(examples))
    for sent in in_order(partial(_placed, job, decoder, shared), numbered, workers):
        for _, arrays in sent:
            for name, npy in arrays.items():
                arrays[name] = shared[npy] if isinstance(npy, slice) else npy
        yield sent


def _placed(job: Job, decoder: Decoder, shared: memoryview, numbered: tuple[int, tuple[str, Example]]) -> Any:
    """Return the records of an example from a worker process, with the arrays that fit in shared memory as slices."""
    place, example = numbered
    outcome: Any = _made(job, decoder, example)
    at, end = place * PLACE_BYTES, (place + 1) * PLACE_BYTES
    for _, arrays in outcome:
        for name, npy in arrays.items():
            if at + len(npy) <= end:
                shared[at : at + len(npy)] = npy
                arrays[name] = slice(at, at := at + len(npy))
    return outcome


def _made(job: Job, decoder: Decoder, split_example: tuple[str, Example]) -> Packed:
    """Return the records of an example, or facts with the error."""
    split, example = split_example
    labels = tuple(job.header.classes[label] for label in example.labels)
    facts = Facts(example.path, example.id, split, labels, columns=example.passed)
    try:
        if job.header.content == "decoded":
            inputs = decoder.inputs(example)
            arrays: Npys = {name: npy_bytes(each.array()) for name, each in inputs.items()}
            return [(replace(facts, seconds=seconds_of(inputs)), arrays)]
        decoded = decoder.decode(example)
        variants = range(job.augment if split == "train" else 0)
        views = [decoder.views(decoded, (job.seed, epoch, example.key)) for epoch in variants]
        rows = [view for each in views or [decoder.views(decoded)] for view in each]
        return [(facts, {name: _prepared(job, name, view) for name, view in row.items()}) for row in rows]
    except DataError as error:
        return [(replace(facts, error=str(error)), {})]


def _prepared(job: Job, name: str, prepared: ByteArray) -> bytes:
    if job.header.content == "fourier":
        from perceiver_cli.model.encoding import with_features  # imports torch, which nothing else here needs

        return npy_bytes(with_features(prepared, job.header.inputs[name]).astype(job.dtype))
    return npy_bytes(prepared.array)


def write_records(
    job: Job,
    output: str,
    emit: Callable[[bytes], None],
    workers: int = 0,
    shard_bytes: int = 256_000_000,
    *,
    resume: bool = False,
) -> Iterator[Done]:
    """Write the records of a job to FILE.tar, to shards such as 'x-%06d.tar', or with "-" through `emit`.

    A file gets its name when it is complete. A shard ends before a record that would exceed `shard_bytes`. `resume`
    keeps existing shards, skips their examples and reports their errors again. Raises UsageError for another output,
    and for existing shards without `resume` or of other data; ResourceError if the output cannot be written, or another
    process writes the same shards.
    """
    if output != "-" and Path(output).suffix.lower() != ".tar":
        raise UsageError(f"-o {show_path(output)}: not a format of records", "expected .tar, or - for stdout")
    sharded = _PATTERN.search(output) is not None
    if resume and not sharded:
        raise UsageError("--resume needs shards", "pass -o 'NAME-%06d.tar'")
    kept = _kept(job, output, resume=resume) if sharded else Kept()
    shard, skipped, first = kept.shards, kept.examples, kept.records
    yield from (Done(skipped, len(job.examples), name, error) for name, error in kept.errors.items())
    with ExitStack() as stack:

        def started() -> Writer:
            if output == "-":
                return Writer(emit, job.header)
            path = _named(output, shard) if sharded else output
            file = stack.enter_context(atomic_write(path, new=sharded))
            return Writer(file.write, job.header)

        writer, num_bytes = None if sharded else started(), 0
        for count, outcome in enumerate(made(job, job.examples[skipped:], workers), start=skipped + 1):
            error = outcome[0][0].error
            members = b"".join(pack(*record, number, job.header) for number, record in enumerate(outcome, first))
            added = len(outcome) if error is None else 0
            first += added
            if kept.shards and count == skipped + 1:
                kept.check_size(shard_bytes, len(members))
            if sharded and writer is not None and writer.num_bytes + len(members) > shard_bytes:
                writer.close()
                stack.close()
                writer, shard = None, shard + 1
            writer = writer or started()
            writer.packed(members, added, int(error is not None))
            num_bytes += len(members)
            yield Done(count, len(job.examples), outcome[0][0].id, error, num_bytes)
        if writer is not None:
            writer.close()


def _named(pattern: str, number: int) -> str:
    return _PATTERN.sub(lambda match: match[0] % number, pattern)


@dataclass(frozen=True)
class Kept:
    """The existing shards of a job: numbers of shards, of the job's examples in them and of records.

    errors: of the unreadable ones, by id. largest: bytes of members in the largest shard of several examples. last:
    the same of the last shard. first: the name of the first.
    """

    shards: int = 0
    examples: int = 0
    records: int = 0
    errors: Mapping[str, str] = field(default_factory=dict)
    largest: int = 0
    last: int = 0
    first: str = ""

    def check_size(self, shard_bytes: int, following: int) -> None:
        """Raise UsageError if a run with `shard_bytes` would have cut other shards.

        following: the size of the example after the last shard, which did not fit into it.
        """
        low, high = self.largest, self.last + following
        if low <= shard_bytes < high:
            return
        unit, letter = next((each for each in UNITS if -(-low // each[0]) * each[0] < high), (1, ""))
        fault = (
            f"{show_path(self.first)}: shards of another --shard-size than {shard_bytes}, the largest of {low} bytes"
        )
        raise UsageError(fault, f"pass --shard-size {-(-low // unit)}{letter} as before, or remove the shards")


def _kept(job: Job, output: str, *, resume: bool) -> Kept:
    paths: list[str] = []
    while os.path.exists(path := _named(output, len(paths))):
        paths.append(path)
    if not paths:
        return Kept()
    if not resume:
        raise UsageError(f"{show_path(paths[0])}: exists already", "pass --resume to continue, or remove the shards")
    shards = open_shards(paths)
    other = UsageError(f"{show_path(paths[0])}: a shard of other data or another recipe", "remove the shards")
    if shards.header.to_json() != job.header.to_json():
        raise other
    place, ids = -1, enumerate(example.id for _, example in job.examples)
    counts = Counter[int]()  # of examples, by shard
    for name, rows in groupby(range(len(shards)), shards.given_id):  # variants of an example are adjacent
        place = next((place for place, own in ids if own == name), -1)
        if place < 0:
            raise other
        counts[int(shards.columns["files"][next(rows)])] += 1
    errors = {shards.given_id(row): error for row, error in shards.errors.items()}
    sizes = [os.path.getsize(path) - END_BYTES for path in paths]
    largest = max((size for number, size in enumerate(sizes) if counts[number] > 1), default=0)
    num_records = len(shards) - len(shards.errors)
    return Kept(len(paths), place + 1, num_records, errors, largest, sizes[-1], paths[0])


def input_recipe(
    source: Source, model: str | None, preset: str | None, raised: Mapping[str, float]
) -> tuple[InputSpec, Limits]:
    """Return the spec of a model, a preset or else the paper for a file. Raises DataError if none reads it."""
    config = _recipe(model, preset)
    kind, *others = identified(source, None if config is None else only(config.inputs)).kinds
    config = config or _recipe(None, modality(kind).paper_preset)
    if config is None:
        raise UsageError(f"the paper has no recipe for {kind}", "pass --preset or --model")
    limits = config.data.limits.raised(raised)
    for name in (kind, *others):  # a video may be read for its sound
        if name in config.inputs:
            return settled(config.inputs[name]), limits
    raise DataError(f"{source.shown}: {kind} by its content, but {config.name} reads {'+'.join(sorted(config.inputs))}")


def write_byte_array(source: Source, spec: InputSpec, limits: Limits, output: str) -> tuple[int, int]:
    """Write a file's byte array (M, C) to FILE.npy or FILE.safetensors; return (M, C)."""
    rows = np.ascontiguousarray(byte_array(source, spec, limits))
    is_safetensors = Path(output).suffix.lower() == ".safetensors"
    with atomic_write(output) as file:
        file.write(safetensors_rows(rows, spec.modality, spec) if is_safetensors else npy_bytes(rows))
    return rows.shape[0], rows.shape[1]


def byte_array(source: Source, spec: InputSpec, limits: Limits) -> NDArray[np.float32]:
    """Return the paper's byte array of one file: (M, C) float32 with Fourier features.

    Raises DataError for a file that is unreadable, over a limit, or of another modality than `spec`.
    """
    from perceiver_cli.model.encoding import with_features  # imports torch

    if detected(source, spec.modality).holds_rows:
        raise DataError(f"{source.shown}: a byte array, which is not decoded", "pass the file that it was made from")
    _check_rows(spec, "write records instead: -o FILE.tar")
    array = opened(source, spec, limits).array()
    return with_features(modality(spec.modality).prepare(array, spec, None), spec)
