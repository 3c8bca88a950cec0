"""From files to records and back: order, resuming, variants; a folder, its shards and its stream train the same."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from perceiver_cli.config import Config, DataConfig, load_config
from perceiver_cli.data.catalog import Catalog, scan
from perceiver_cli.data.decoder import Decoder
from perceiver_cli.data.examples import Example
from perceiver_cli.data.lint import lint
from perceiver_cli.data.loader import Reader, training_tasks
from perceiver_cli.data.prepare import Job, plan, write_records
from perceiver_cli.errors import DataError, IntegrityError, ResourceError, UsageError
from perceiver_cli.inference.evaluation import evaluate
from perceiver_cli.inference.predictor import Pipe, Predictor, Windows
from perceiver_cli.preprocess.source import Source
from perceiver_cli.preprocess.spec import Limits
from perceiver_cli.records.shards import Shards, open_shards, spooled
from perceiver_cli.records.stream import Feed, read_records
from perceiver_cli.training.trainer import Trainer
from tests.conftest import RATE_HZ, SMALL, SMALL_CLIPS, SMALL_PAIRS, tone_of


def written(job: Job, **options: Any) -> tuple[bytes, list[str]]:
    """Return the stream of a job, and its errors."""
    out = io.BytesIO()
    done = list(write_records(job, "-", out.write, **options))  # type: ignore[arg-type]
    return out.getvalue(), [each.error for each in done if each.error is not None]


def facts_of(data: bytes) -> list[Any]:
    feed = Feed(io.BytesIO(data), "'x'")
    return [record.facts for _, record in read_records(feed, Limits(), feed.take)]


def into(folder: Path, data: Path, changes: tuple[str, ...], shard_bytes: int = 60_000) -> tuple[Path, Path]:
    """Write data as shards and as one tar; return both."""
    job = plan([str(data)], changes=changes)
    list(write_records(job, str(folder / "shards" / "x-%06d.tar"), lambda _: None, shard_bytes=shard_bytes))
    list(write_records(job, str(folder / "all.tar"), lambda _: None))
    return folder / "shards", folder / "all.tar"


# ---------------------------------------------------------------- the same training, the same answers


@pytest.mark.parametrize(
    ("name", "changes", "workers"),
    [("bars", SMALL, 0), ("bars", SMALL, 2), ("pairs", SMALL_PAIRS, 0), ("clips", SMALL_CLIPS, 0)],
)
def test_a_folder_its_shards_and_its_stream_train_and_answer_the_same(
    name: str, changes: tuple[str, ...], workers: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data: Path = request.getfixturevalue(name)
    shards, stream = into(tmp_path, data, changes)
    assert len(list(shards.iterdir())) > 3
    models = []
    for number, source in enumerate((data, shards, stream)):
        options = [*changes, "train.steps=6", "inputs.image.flip=0.5"][: len(changes) + 1 + ("image" in name)]
        trainer = Trainer(source, tmp_path / f"run{number}", overrides=[*options, f"data.workers={workers}"])
        list(trainer.fit())
        models.append((tmp_path / f"run{number}" / "model.safetensors").read_bytes())
    assert len({model.split(b'"path"')[-1] for model in models}) == 1
    if workers:
        return
    predictor = Predictor(tmp_path / "run0")
    files = {p.path.removeprefix(f"{data}/"): p.probs for p in predictor.predict(str(data))}
    for source in (shards, stream, Pipe("-", io.BytesIO(stream.read_bytes()))):  # type: ignore[assignment]
        answers = list(predictor.predict(source if isinstance(source, Pipe) else str(source)))
        assert {p.path.removeprefix(f"{data}/"): p.probs for p in answers} == files
    reports = [evaluate(predictor, source).to_dict() | {"files": None} for source in (data, shards, stream)]
    for report in reports:  # only files are joined by their stem
        report["notes"] = [note for note in report["notes"] if " by stem: " not in note]
    assert reports[0] == reports[1] == reports[2]


def test_a_run_on_shards_resumes_to_the_bit(bars: Path, tmp_path: Path) -> None:
    shards, _ = into(tmp_path, bars, SMALL)
    options = [*SMALL, "train.steps=9", "train.save_every=1 steps", "train.eval_every=4 steps"]
    list(Trainer(shards, tmp_path / "whole", overrides=options).fit())
    first = Trainer(shards, tmp_path / "cut", overrides=options)
    for event in first.fit():
        if getattr(event, "step", 0) == 5:
            first.stop()
    assert not list((tmp_path / "cut").glob("*.tmp"))
    list(Trainer(output=tmp_path / "cut", resume=True).fit())
    ends = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert ends[0] == ends[1]


def test_long_sounds_are_cut_from_records_as_from_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for i in range(3):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            soundfile.write(tmp_path / "data" / name / f"{i}.wav", tone_of(300, 4.1 + i, rng), RATE_HZ)
    changes = ("inputs.audio.clip_s=0.25", "inputs.audio.eval_windows=3", "inputs.audio.num_mels=16")
    _, stream = into(tmp_path, tmp_path / "data", changes)
    job = plan([str(tmp_path / "data")], changes=changes)
    readers = [Reader(job.header.inputs, Limits()) for _ in range(2)]
    catalogs = [scan(source) for source in (tmp_path / "data", stream)]
    for example, record in zip(*(catalog.splits["train"] for catalog in catalogs), strict=True):
        assert readers[0].decode(example).long
        for seeds in (None, (0, 1, example.key)):
            ours, theirs = (r.views(r.decode(e), seeds) for r, e in zip(readers, (example, record), strict=True))
            assert len(ours) == (3 if seeds is None else 1)
            for one, two in zip(ours, theirs, strict=True):
                assert np.array_equal(one["audio"].values, two["audio"].values)
        windows = [list(r.windows(e, 1.0, 0.5)) for r, e in zip(readers, (example, record), strict=True)]
        assert [span for span, _ in windows[0]] == [span for span, _ in windows[1]]
        for (_, one), (_, two) in zip(*windows, strict=True):
            assert np.array_equal(one.arrays["audio"], two.arrays["audio"])


def same(one: Catalog, two: Catalog) -> bool:
    facts = [
        (c.classes, c.modalities, {s: [(e.id, e.labels, e.key) for e in each] for s, each in c.splits.items()})
        for c in (one, two)
    ]
    return facts[0] == facts[1] and one.fingerprint == two.fingerprint


def test_the_catalog_of_records_is_that_of_the_folder(pairs: Path, tmp_path: Path) -> None:
    (root := tmp_path / "data").mkdir()
    shutil.copytree(pairs / "train", root / "train")
    (root / "train" / "top-low" / "003.png").unlink()
    (root / "train" / "top-low" / "004.wav").unlink()
    shards, stream = into(tmp_path, root, SMALL_PAIRS)
    folder = scan(root)
    for data in (shards, stream, str(shards / "x-*.tar")):
        records = scan(data)
        assert same(folder, records)
        assert same(folder.hold_out(0.2), records.hold_out(0.2))
        assert records.counts("train") == folder.counts("train")
        assert [note.replace("records", "examples") for note in records.notes] == [
            note for note in folder.notes if " by stem: " not in note
        ]
    brings = {e.id: sorted(e.sources) for e in scan(stream).splits["train"]}
    assert [brings[f"train/top-low/{name}"] for name in ("003.wav", "004.png")] == [["audio"], ["image"]]
    model = scan(stream, ["bottom-low", "other"])
    assert {e.labels for e in model.splits["train"]} == {(), (0,)}
    assert any("records of classes not among the model's classes" in note for note in model.notes)


# ---------------------------------------------------------------- what is written


def test_workers_change_nothing_and_order_is_that_of_the_input(bars: Path) -> None:
    names = [str(path) for path in sorted((bars / "train").rglob("*.png"), reverse=True)]
    job = plan(names, label_from_parent=True)
    alone, _ = written(job)
    assert alone == written(job, workers=2)[0] == written(plan(names, label_from_parent=True))[0]
    facts = facts_of(alone)
    assert [f.path for f in facts] == names
    assert [f.labels[0] for f in facts] == [Path(name).parent.name for name in names]
    assert job.header.classes == ("left", "middle", "right")


def damaged(bars: Path, folder: Path) -> Path:
    """Return a copy of a data folder in which four files of both splits cannot be read."""
    root = Path(shutil.copytree(bars, folder))
    image = (root / "train" / "left" / "000.png").read_bytes()
    for name in ("train/left/003.png", "train/right/039.png", "test/left/001.png"):
        (root / name).write_bytes(image[:60])
    (root / "train" / "left" / "004.png").write_bytes(b"")
    return root


def test_bad_inputs_have_an_error_in_their_place(bars: Path, trained: Path, tmp_path: Path) -> None:
    root = damaged(bars, tmp_path / "data")
    job = plan([str(root)], model=str(trained))
    data, errors = written(job)
    facts = facts_of(data)
    assert [f.id for f in facts] == [example.id for _, example in job.examples]
    assert [f.error for f in facts if f.error is not None] == errors
    assert len(errors) == 4
    assert b'{"records": 146, "errors": 4}' in data
    assert data == written(job, workers=2)[0]
    # Each has its line where the folder has it, and each program that knows nothing of errors finds none.
    predictor = Predictor(trained)
    answers = list(predictor.predict([Pipe("-", io.BytesIO(data))]))
    assert [a.path for a in answers] == [f.path for f in facts]
    assert [a.error for a in answers if a.error is not None] == errors
    assert sorted(answers, key=lambda a: a.path) == list(predictor.predict(str(root)))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        names = [name for name in tar.getnames() if "." in name]
    assert len(names) == 3 * 146


def test_a_folder_with_bad_files_and_its_records_train_and_score_the_same(bars: Path, tmp_path: Path) -> None:
    root = damaged(bars, tmp_path / "data")
    shards, stream = into(tmp_path, root, SMALL)
    models, reports = [], []
    for number, data in enumerate((root, shards, stream)):
        changes = [*SMALL, "train.steps=12", "data.max_bad=0.1"]
        trainer = Trainer(data, tmp_path / f"run{number}", overrides=changes)
        list(trainer.fit())
        assert any(note.startswith("left out 3 unreadable files: ") for note in trainer.plan.notes)
        models.append((tmp_path / f"run{number}" / "model.safetensors").read_bytes())
        report = evaluate(Predictor(tmp_path / "run0"), data)
        assert [example.id for example, _ in report.bad] == ["test/left/001.png"]
        reports.append({k: v for k, v in report.to_dict().items() if k not in ("model", "data", "bad", "files")})
    assert models[0] == models[1] == models[2]
    assert reports[0] == reports[1] == reports[2]
    with pytest.raises(DataError, match="3 of 120 files cannot be read"):
        list(Trainer(stream, tmp_path / "strict", overrides=[*SMALL, "train.steps=1", "data.max_bad=0"]).fit())
    assert len(lint(stream).unreadable) == len(lint(root).unreadable) == 4


@pytest.mark.parametrize("broken", ["0.png", "1.png"])
def test_one_broken_file_of_two_does_not_stop_the_other(
    bars: Path, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two files is held out for validation, so the only training file may be the broken one."""
    monkeypatch.chdir(tmp_path)
    for name in ("0.png", "1.png"):
        shutil.copy(bars / "train" / "left" / "000.png", tmp_path / name)
    (tmp_path / broken).write_bytes((tmp_path / broken).read_bytes()[:40])
    data, errors = written(plan(["0.png", "1.png"]))
    assert [facts.path for facts in facts_of(data) if facts.error is not None] == [broken]
    assert len(errors) == 1


def test_several_folders_and_manifests(bars: Path, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(f"path,label,split\n{bars / 'test' / 'left' / '000.png'},left,test\n")
    facts = facts_of(written(plan([str(bars), str(tmp_path / "m.csv")]))[0])
    assert len({f.id for f in facts}) == len(facts) - 1 == 150  # one file twice, by two names of its folder
    assert (facts[-1].split, facts[-1].labels, facts[-1].path) == ("test", ("left",), facts[-1].id)
    several = tmp_path / "several.jsonl"
    labels: list[list[str]] = [[], ["a"], ["a", "b"]]
    rows = [{"path": str(bars / "train" / "left" / f"00{i}.png"), "labels": labels[i]} for i in range(3)]
    several.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, _ = written(plan([str(several)]))
    assert [f.labels for f in facts_of(data)] == [(), ("a",), ("a", "b")]
    assert b".cls" not in data
    (tmp_path / "s.tar").write_bytes(data)
    assert same(scan(several), scan(tmp_path / "s.tar"))


def test_a_run_is_asked_once_how_its_data_was_read(bars: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was asked for each file of a list, which took longer than to read the file."""
    asked: list[Path] = []

    def load(path: Path) -> Config:
        asked.append(path)
        return load_config(path)

    monkeypatch.setattr("perceiver_cli.data.listing.load_config", load)
    files = list(map(str, sorted(bars.rglob("*.png"))[:4]))
    plan(files, model=str(trained))
    assert len([*Predictor(trained, device="cpu").predict(files)]) == 4
    assert asked == [trained / "config.toml"] * 2


def test_bytes_on_stdin_and_files_without_labels(bars: Path, trained: Path) -> None:
    file = bars / "test" / "left" / "000.png"
    data, _ = written(plan(Source("mine.png", file.read_bytes())))
    (facts,) = facts_of(data)
    assert (facts.path, facts.labels) == ("mine.png", ())
    flat, _ = written(plan([str(bars / "test" / "left")], model=str(trained)))
    assert [f.id for f in facts_of(flat)][:2] == ["000.png", "001.png"]
    predictor = Predictor(trained)
    (answer,) = predictor.predict([Pipe("-", io.BytesIO(written(plan([str(file)], model=str(trained)))[0]))])
    assert answer == next(predictor.predict(str(file)))


def test_shards_resume_without_redoing_or_losing_a_record(bars: Path, tmp_path: Path) -> None:
    root = shutil.copytree(bars, tmp_path / "data")
    for i in (5, 17, 18, 39):
        (root / "train" / "middle" / f"{i:03d}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for options in ({}, {"augment": 3}):
        job = plan([str(root)], **options)  # type: ignore[arg-type]
        whole, cut = tmp_path / f"whole{len(options)}", tmp_path / f"cut{len(options)}"
        list(write_records(job, str(whole / "x-%03d.tar"), print, shard_bytes=40_000))
        shards = sorted(path.name for path in whole.iterdir())
        assert all((whole / name).stat().st_size < 60_000 for name in shards)
        for kept in (0, 1, len(shards) // 2, len(shards)):
            shutil.rmtree(cut, ignore_errors=True)
            cut.mkdir()
            for name in shards[:kept]:
                shutil.copy(whole / name, cut)
            done = list(write_records(job, str(cut / "x-%03d.tar"), print, shard_bytes=40_000, resume=True))
            assert len(done) == len(job.examples) if kept == 0 else len(done) < len(job.examples)
            assert sum(each.error is not None for each in done) == 4  # those of the kept shards too
            found = sorted(path.name for path in cut.glob("*.tar"))
            assert [(cut / name).read_bytes() for name in found] == [(whole / name).read_bytes() for name in shards]
    with pytest.raises(UsageError, match=r"exists already; pass --resume"):
        list(write_records(job, str(cut / "x-%03d.tar"), print))
    with pytest.raises(UsageError, match="other data or another recipe"):
        list(write_records(plan([str(root)]), str(cut / "x-%03d.tar"), print, resume=True))
    with pytest.raises(UsageError, match="--resume needs shards"):
        list(write_records(job, str(cut / "x.tar"), print, resume=True))


@pytest.mark.parametrize("shard_bytes", [30_000, 50_000, 1_000])
def test_shards_resume_with_their_size_alone(bars: Path, tmp_path: Path, shard_bytes: int) -> None:
    job, output = plan([str(bars)]), str(tmp_path / "x-%03d.tar")
    list(write_records(job, output, print, shard_bytes=40_000))
    for path in sorted(tmp_path.iterdir())[3:]:
        path.unlink()
    with pytest.raises(UsageError, match=r"shards of another --shard-size.*pass --shard-size (39|40)k as before"):
        list(write_records(job, output, print, shard_bytes=shard_bytes, resume=True))
    assert len(list(tmp_path.glob("*.tar"))) == 3
    list(write_records(job, output, print, shard_bytes=40_000, resume=True))


def test_a_shard_of_one_large_record_says_nothing_of_its_size(bars: Path, tmp_path: Path) -> None:
    job, output = plan([str(bars)]), str(tmp_path / "x-%03d.tar")
    list(write_records(job, output, print, shard_bytes=1_000))  # less than any record
    for path in sorted(tmp_path.iterdir())[5:]:
        path.unlink()
    list(write_records(job, output, print, shard_bytes=1_000, resume=True))


@pytest.mark.parametrize("begun", [False, True])
def test_two_jobs_into_the_same_shards_do_not_mix(bars: Path, tmp_path: Path, begun: bool) -> None:
    jobs = [plan([str(bars / split)]) for split in ("train", "test")]
    output = str(tmp_path / "out" / "x-%03d.tar")
    if begun:
        jobs = [jobs[0]] * 2
        first = write_records(jobs[0], output, print, shard_bytes=20_000)
        while not os.path.exists(output % 0):
            next(first)
        first.close()  # type: ignore[attr-defined]
    one, two = (write_records(job, output, print, shard_bytes=20_000, resume=begun) for job in jobs)
    next(one), next(two)
    list(one)
    with pytest.raises(ResourceError, match=r"x-00[01].tar': another process has written it meanwhile"):
        list(two)
    shards = open_shards(sorted(map(str, (tmp_path / "out").glob("*.tar"))))
    assert sorted(shards.id(row) for row in range(len(shards))) == sorted(each.id for _, each in jobs[0].examples)
    assert not list((tmp_path / "out").glob(".*"))


def test_variants_are_what_the_first_epochs_of_training_see(bars: Path, tmp_path: Path) -> None:
    job = plan([str(bars)], augment=2, changes=["train.seed=7"])
    (tmp_path / "x.tar").write_bytes(written(job)[0])
    catalog = scan(tmp_path / "x.tar")
    held = scan(bars).hold_out(0.1)
    assert {s: len(e) for s, e in catalog.splits.items()} == {
        "train": 2 * len(held.splits["train"]),
        "val": len(held.splits["val"]),
        "test": 30,
    }
    assert catalog.hold_out(0.5) is catalog  # variants of one example never lie on both sides
    reader = Reader(job.header.inputs, Limits())
    records = {e.id: reader.decode(e).ready["image"].values for split in catalog.splits.values() for e in split}
    for example in islice(held.splits["train"], 20):
        for epoch, name in enumerate((example.id, f"{example.id}~1")):
            (view,) = reader.views(reader.decode(example), (7, epoch, example.key))
            assert np.array_equal(records[name], view["image"].values)
    for example in held.splits["val"]:
        (view,) = reader.views(reader.decode(example))
        assert np.array_equal(records[example.id], view["image"].values)
    list(Trainer(tmp_path / "x.tar", tmp_path / "run", overrides=[*SMALL, "train.steps=2"]).fit())


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("float16", False)])
def test_rows_with_fourier_features_answer_as_the_files_do(pairs: Path, paired: Path, dtype: str, exact: bool) -> None:
    root = pairs / "test"
    predictor = Predictor(paired)
    data, _ = written(plan([str(root)], model=str(paired), fourier=dtype))  # type: ignore[arg-type]
    layouts = predictor.reader.layouts
    feed = Feed(io.BytesIO(data), "'x'")
    _, record = next(read_records(feed, Limits(), feed.take))
    rows = np.load(io.BytesIO(record.arrays["image"]))
    assert (rows.shape, str(rows.dtype)) == ((layouts["image"].num_inputs, layouts["image"].num_channels), dtype)
    files = {p.path: p.probs for p in predictor.predict(str(root))}
    answers = {p.path: p.probs for p in predictor.predict([Pipe("-", io.BytesIO(data))])}
    assert answers.keys() == files.keys()
    if exact:
        assert answers == files
    else:
        np.testing.assert_allclose(list(answers.values()), [files[name] for name in answers], atol=0.02)
    (answer, *_) = predictor.predict([Pipe("-", io.BytesIO(data))], windows=Windows(0.1, 0.1))
    assert "a prepared clip, which cannot be cut into windows" in str(answer.error)


# ---------------------------------------------------------------- on disk


def test_an_index_is_kept_and_trusted_only_for_the_very_file(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stream = into(tmp_path, bars, SMALL)
    index = Path(f"{stream}.index")
    first = open_shards([str(stream)])
    made = index.stat().st_mtime_ns
    again = open_shards([str(stream)])
    assert index.stat().st_mtime_ns == made
    assert all(np.array_equal(again.columns[key], first.columns[key]) for key in first.columns)
    good = index.read_bytes()
    for damaged in (b"", good[:100], good[:-5], bytes(len(good)), good.replace(b"at_image", b"at_imagx")):
        index.write_bytes(damaged)
        assert len(open_shards([str(stream)])) == 150
        assert index.read_bytes() == good
    # An index that points outside of the file is not believed.
    wild = bytearray(good)
    place = good.index(first.columns["at_image"].tobytes())
    wild[place : place + 8] = (1 << 62).to_bytes(8, "little")
    index.write_bytes(wild)
    assert open_shards([str(stream)]).columns["at_image"][0] == first.columns["at_image"][0]
    job = plan([str(bars / "test")])
    list(write_records(job, str(stream), lambda _: None))
    assert len(open_shards([str(stream)])) == 30  # another file of the same name

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "closed").mkdir()
    link = tmp_path / "closed" / "x.tar"
    shutil.copy(stream, link)
    Path(f"{link}.index").mkdir()  # what cannot be replaced by a file
    assert len(open_shards([str(link)])) == 30
    assert len(list((tmp_path / "cache" / "perceiver").iterdir())) == 1


def test_records_of_one_id_are_told_apart(bars: Path, tmp_path: Path) -> None:
    _, stream = into(tmp_path, bars / "test", SMALL)
    shutil.copy(stream, tmp_path / "again.tar")
    catalog = scan(str(tmp_path / "a*.tar"))
    ids = [e.id for e in catalog.splits["train"]]
    assert len(ids) == len(set(ids)) == 60
    assert "left/000.png~1" in ids


def test_tars_that_do_not_belong_together(bars: Path, pairs: Path, tmp_path: Path) -> None:
    list(write_records(plan([str(bars)]), str(tmp_path / "a.tar"), print))
    list(write_records(plan([str(bars)], changes=["inputs.image.size=8"]), str(tmp_path / "b.tar"), print))
    with pytest.raises(DataError, match=r"b\.tar': prepared with inputs\.image\.size = \[8, 8\]"):
        scan(tmp_path)
    with pytest.raises(DataError, match="no file matches this pattern"):
        scan(str(tmp_path / "c*.tar"))
    with pytest.raises(DataError, match=r"prepared with inputs\.image\.size = \[12, 12\], but this run has \[16, 16\]"):
        Trainer(tmp_path / "a.tar", tmp_path / "run", overrides=["inputs.image.size=16"])
    (tmp_path / "d.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:50_000])
    with pytest.raises(IntegrityError, match=r"d\.tar': the stream was cut short after"):
        scan(tmp_path / "d.tar")
    with tarfile.open(tmp_path / "e.tar", "w") as tar:
        tar.add(next((bars / "train" / "left").iterdir()), "x.png")
    with pytest.raises(
        DataError, match=r"archives \('.*e.tar'\) and records \('.*d.tar'\) together; expected one kind"
    ):
        scan(tmp_path)


def test_a_spooled_stream_leaves_nothing_behind(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shards = spooled(io.BytesIO(written(plan([str(bars)]))[0]), "stdin")
    assert "copied to '" in shards.notes[0]
    assert str(tmp_path) in shards.notes[0]
    assert os.listdir(tmp_path) == []
    places = shards.stored(3, "x", ["image"])
    assert places["image"].array().shape == (12, 12, 1)
    with pytest.raises(DataError, match="'stdin': not records"):
        spooled(io.BytesIO(b"RIFF" + bytes(2000)), "stdin")
    with pytest.raises(DataError, match="'stdin': empty"):
        spooled(io.BytesIO(b""), "stdin")


def test_a_record_that_is_no_image_is_one_bad_example(trained: Path, bars: Path) -> None:
    data, _ = written(plan([str(bars / "test" / "left")], model=str(trained)))
    feed = Feed(io.BytesIO(data), "'x'")
    first = next(read_records(feed, Limits(), feed.take))[1].arrays["image"]
    bad = data.replace(first, first.replace(b"|u1", b"|i1"), 1)
    answers = list(Predictor(trained).predict([Pipe("-", io.BytesIO(bad))]))
    assert [answer.error is None for answer in answers] == [False] + [True] * 9
    assert "is damaged: its bytes are not those that were written" in str(answers[0].error)


def test_tasks_of_records_travel_to_workers_as_places(bars: Path, tmp_path: Path) -> None:
    _, stream = into(tmp_path, bars, SMALL)
    catalog = scan(stream)
    example = catalog.splits["train"][0]
    assert isinstance(example, Example)
    reader = Reader(catalog.prepared.inputs, Limits())  # type: ignore[union-attr]
    tasks = list(training_tasks(catalog.splits["train"], 8, 0, 0, 6))
    for one, two in zip(reader.batches(tasks), reader.batches(tasks, 2), strict=True):
        assert np.array_equal(one.segments["image"].values, two.segments["image"].values)
    decoder = Decoder(reader.specs, Limits())
    array = decoder.decode(example).arrays["image"]
    assert not array.flags.owndata
    assert not array.flags.writeable


def test_a_tar_that_becomes_shorter_while_it_is_read_is_a_data_error(bars: Path, tmp_path: Path) -> None:
    """Reading a mapped file past its end would kill the process."""
    path = tmp_path / "all.tar"
    list(write_records(plan([str(bars)], changes=SMALL), str(path), lambda _: None))
    catalog = scan(path)
    reader = Reader({"image": catalog.prepared.inputs["image"]}, Limits())  # type: ignore[union-attr]
    examples = catalog.splits["train"]
    shards = examples.shards  # type: ignore[attr-defined]
    places = {shards.id(row): int(shards.columns["at_image"][row]) for row in range(len(shards))}
    cut = sorted(places.values())[len(places) // 2]
    os.truncate(path, cut)
    for example in examples:
        if places[example.id] >= cut:
            with pytest.raises(DataError, match="became shorter while it was read"):
                reader.decode(example)
        elif places[example.id] < cut - 100_000:
            reader.decode(example)


def test_records_keep_the_columns_of_their_manifest(bars: Path, trained: Path, tmp_path: Path) -> None:
    """They dropped them, and with them --group-by."""
    rows = [
        f"{path},{path.parent.name},n{n},s{n % 5}" for n, path in enumerate(sorted((bars / "train").rglob("*.png")))
    ]
    (tmp_path / "m.csv").write_text("\n".join(["path,label,id,speaker", *rows]) + "\n")
    (tmp_path / "m.tar").write_bytes(written(plan([str(tmp_path / "m.csv")], model=str(trained)))[0])
    by_speaker = DataConfig(group_by="speaker", pass_columns=("id", "speaker"))
    one, other = (scan(tmp_path / name, options=by_speaker).hold_out(0.2) for name in ("m.csv", "m.tar"))
    held = [[(e.names["id"], e.passed["speaker"], e.group) for e in each.splits["val"]] for each in (one, other)]
    assert held[0] == held[1]
    assert {group for *_, group in held[0]} < {f"s{n}" for n in range(5)}
    with pytest.raises(DataError, match=r"no column 'nono' in the record .*; prepare a manifest that has it"):
        scan(tmp_path / "m.tar", options=DataConfig(group_by="nono"))
    predictor = Predictor(trained)
    predictor.options = {"pass_columns": ("*",)}
    lines = [p.to_dict() for p in predictor.predict(tmp_path / "m.tar")]
    assert [(line["id"], line["speaker"]) for line in lines[:2]] == [("n0", "s0"), ("n1", "s1")]


def test_the_column_of_groups_is_read_once(bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at a training example read its facts from the tar again."""
    paths = sorted((bars / "train").rglob("*.png"))
    rows = [f"{path},{path.parent.name},s{n % 5}" for n, path in enumerate(paths)]
    (tmp_path / "m.csv").write_text("\n".join(["path,label,speaker", *rows]) + "\n")
    list(write_records(plan([str(tmp_path / "m.csv")], changes=SMALL), str(tmp_path / "m.tar"), lambda _: None))
    read: list[int] = []
    facts = Shards.facts
    monkeypatch.setattr(Shards, "facts", lambda self, row: (read.append(row), facts(self, row))[1])
    catalog = scan(tmp_path / "m.tar", options=DataConfig(group_by="speaker")).hold_out(0.2)
    catalog.check_groups()
    assert {example.group for split in catalog.splits.values() for example in split} == {f"s{n}" for n in range(5)}
    assert sorted(read) == list(range(len(paths)))


def test_variants_of_clouds_are_stored_for_a_model_with_a_stem(tmp_path: Path) -> None:
    """The record holds the points before the stem; as many as the inputs after it were expected."""
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for number in range(2):
            np.savetxt(tmp_path / "in" / label / f"{number}.xyz", rng.normal(size=(64, 3)))
    changes = ["inputs.points.num_points=32", "inputs.points.stem=neighbours", "inputs.points.stem_points=8"]
    job = plan([str(tmp_path / "in")], changes=[*changes, "data.val_fraction=0"], augment=1)
    list(write_records(job, str(tmp_path / "x.tar"), print))
    catalog = scan(tmp_path / "x.tar")
    reader = Reader(catalog.prepared.inputs, Limits())  # type: ignore[union-attr]
    (view,) = reader.views(reader.decode(catalog.splits["train"][0]))
    assert view["points"].positions.shape == (32, 3)  # type: ignore[union-attr]
