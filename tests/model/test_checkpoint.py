"""Model files and training states: whole, checked, refused with words."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from perceiver_cli.config import Config
from perceiver_cli.errors import IntegrityError, PerceiverError, ResourceError, UsageError
from perceiver_cli.model.checkpoint import load_model, read_info, read_tensors, save_model, write_tensors
from perceiver_cli.run_folder import MODEL_FILE, STATE_FOLDER, find_model
from perceiver_cli.training.state import MANIFEST, load_state, save_state


def test_a_model_file_is_all_that_is_needed(trained: Path, tmp_path: Path) -> None:
    alone = tmp_path / "model.safetensors"
    shutil.copy(trained / MODEL_FILE, alone)
    model, info = load_model(alone)
    assert info.classes == ("left", "middle", "right")
    assert info.config.inputs["image"].modality == "image"
    assert info.config.data.path is None  # where the data lay does not travel
    assert info.metrics["val_accuracy"] > 0.9
    assert not model.training
    assert set(load_file(alone)) == set(model.state_dict())


def test_no_pickle_anywhere(trained: Path) -> None:
    for path in trained.rglob("*"):
        if path.is_file() and path.suffix == ".safetensors":
            data = path.read_bytes()
            assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        else:
            assert path.is_dir() or path.suffix in (".json", ".jsonl", ".toml", ".md") or path.name == ".lock"


def test_every_flipped_bit_is_found(trained: Path, tmp_path: Path) -> None:
    data = (trained / MODEL_FILE).read_bytes()
    target = tmp_path / MODEL_FILE
    rng = random.Random(0)
    for _ in range(200):
        broken = bytearray(data)
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        target.write_bytes(broken)
        with pytest.raises(PerceiverError) as caught:
            load_model(target)
        assert MODEL_FILE in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_model_that_is_replaced_while_it_is_read(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a training does. The file was opened three times: an old header with new weights, or a wrong checksum."""
    path, newer = tmp_path / MODEL_FILE, tmp_path / "newer"
    model, info = load_model(trained / MODEL_FILE)
    weights = model.state_dict()
    save_model(newer, {name: 2 * tensor for name, tensor in weights.items()}, replace(info, step=info.step + 1))
    opened = safetensors.safe_open

    def replacing(*arguments: str, **options: str) -> object:
        file = opened(*arguments, **options)
        shutil.copy(newer, tmp_path / "temporary")
        os.replace(tmp_path / "temporary", path)
        return file

    shutil.copy(trained / MODEL_FILE, path)
    monkeypatch.setattr(safetensors, "safe_open", replacing)
    for factor, step in ((1, info.step), (2, info.step + 1)):
        model, found = load_model(path)
        assert found.step == step
        assert all(torch.equal(tensor, factor * weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", [0, 4, 8, 100, 5000, -1])
def test_cut_files_are_refused(trained: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / MODEL_FILE).write_bytes((trained / MODEL_FILE).read_bytes()[:size])
    with pytest.raises(IntegrityError):
        load_model(tmp_path / MODEL_FILE)


def _with_header(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 1 << 63) + b"{}",
        struct.pack("<Q", (1 << 64) - 1) + b"{}",
        _with_header(b"[" * 100_000),
        _with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"\0" * 4),
        _with_header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"\0" * 4),
        _with_header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"\0" * 4),
        _with_header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
        _with_header(b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        _with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"\0" * 8),
        _with_header(b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}', b"\0" * 4),
        _with_header(b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        _with_header(b"{}" + b" " * 9_000_000),
        _with_header(b'{"a":1e999}'),
        _with_header(b'{"__metadata__":{"perceiver":"{\\"sha256\\": \\"\\", \\"format\\": 1, \\"step\\": NaN}"}}'),
        _with_header(b'{"__metadata__":{"perceiver":"{\\"sha256\\": \\"\\", \\"format\\": 1, \\"step\\": 1e999}"}}'),
        _with_header(b'{"__metadata__":{"perceiver":"{\\"format\\":1,\\"format\\":1}"}}'),
    ],
)
def test_hostile_headers_are_refused_before_anything_is_allocated(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError):
        read_info(tmp_path / "x.safetensors")


def test_files_of_others_and_other_versions_are_named(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(UsageError, match="not a model of this program"):
        read_info(other)
    data = (trained / MODEL_FILE).read_bytes()
    newer = tmp_path / "newer.safetensors"
    newer.write_bytes(data.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(IntegrityError, match=r"format 9, this program reads 1; upgrade"):
        read_info(newer)


def test_tensors_that_do_not_fit_are_named(trained: Path, tmp_path: Path) -> None:
    model, info = load_model(trained / MODEL_FILE)
    config = info.config.override(["model.num_latents=9"])
    changed = tmp_path / MODEL_FILE
    save_model(changed, model.state_dict(), replace(info, config=config))
    with pytest.raises(IntegrityError, match=r"1 tensors do not fit.*latents: expected \(9, 16\), found \(8, 16\)"):
        load_model(changed)


def test_where_a_model_is_looked_for(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PERCEIVER_MODEL", raising=False)
    with pytest.raises(UsageError, match="no runs/latest here"):
        find_model(None)
    with pytest.raises(UsageError, match="no model file"):
        find_model("nowhere")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to(trained)
    assert find_model(None) == Path("runs/latest") / MODEL_FILE
    monkeypatch.setenv("PERCEIVER_MODEL", str(trained / MODEL_FILE))
    assert find_model(None) == trained / MODEL_FILE
    assert find_model("runs/latest") == Path("runs/latest") / MODEL_FILE


# ---------------------------------------------------------------- training state


def states(run: Path, *steps: int) -> None:
    for step in steps:
        save_state(run, {"w": torch.full((100,), float(step))}, {"step": step})


def test_the_newest_state_and_the_one_before_are_kept(tmp_path: Path) -> None:
    states(tmp_path, 1, 2, 10, 9)
    tensors, state, notes = load_state(tmp_path)
    assert (state["step"], float(tensors["w"][0]), notes) == (9, 9.0, [])
    names = sorted(path.name for path in (tmp_path / STATE_FOLDER).iterdir())
    assert names == [MANIFEST, "step-00000009.safetensors", "step-00000010.safetensors"]


def test_a_damaged_state_falls_back_and_says_so(tmp_path: Path) -> None:
    states(tmp_path, 1, 2)
    newest = tmp_path / STATE_FOLDER / "step-00000002.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    _, state, notes = load_state(tmp_path)
    assert state["step"] == 1
    assert "step-00000002" in notes[0]
    assert "sha256" in notes[0]
    (tmp_path / STATE_FOLDER / "step-00000001.safetensors").unlink()
    with pytest.raises(IntegrityError, match="no intact training state"):
        load_state(tmp_path)


def test_a_manifest_with_hashes_is_read_and_replaced(tmp_path: Path) -> None:
    """Version 0.1 wrote size and sha256 of each file beside its name; the files are judged by their own checksum."""
    states(tmp_path, 1, 2)
    manifest = tmp_path / STATE_FOLDER / MANIFEST
    table = json.loads(manifest.read_text())
    table["states"] = [entry | {"size": 1, "sha256": "0" * 64} for entry in table["states"]]
    manifest.write_text(json.dumps(table))
    assert load_state(tmp_path).fields["step"] == 2
    states(tmp_path, 3)
    assert [entry["step"] for entry in json.loads(manifest.read_text())["states"]] == [3, 2]
    assert load_state(tmp_path).fields["step"] == 3


NAMES = '{"states": [{"file": "step-0000000r.safetensors"}, {"file": "step-00000001.safetensors"}]}'  # r: 2, a bit off


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"states": [{"step": 1}]}', '{"states": [1]}', "[" * 100_000, NAMES])
def test_a_damaged_manifest_loses_no_state(tmp_path: Path, text: str) -> None:
    states(tmp_path, 1, 2)
    (tmp_path / STATE_FOLDER / MANIFEST).write_text(text)
    assert load_state(tmp_path).fields["step"] == 2


def test_a_manifest_cannot_point_elsewhere(tmp_path: Path) -> None:
    states(tmp_path, 1)
    manifest = tmp_path / STATE_FOLDER / MANIFEST
    states(tmp_path / "other", 5)
    manifest.write_text(manifest.read_text().replace("step-00000001", "../other/last/step-00000005"))
    assert load_state(tmp_path).fields["step"] == 1


def test_a_failed_save_keeps_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at each call that touches the disk in turn: the committed state is always one of the two, whole."""
    import os

    states(tmp_path, 1)
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        for fail_at in range(4):
            calls = 0

            def flaky(*arguments: object, _fail_at: int = fail_at, _original: object = original) -> object:
                nonlocal calls
                calls += 1
                if calls == _fail_at + 1:
                    raise OSError(28, "No space left on device")
                return _original(*arguments)  # type: ignore[operator]

            monkeypatch.setattr(os, name, flaky)
            with contextlib.suppress(ResourceError):
                states(tmp_path, 2)
            monkeypatch.setattr(os, name, original)
            tensors, state, _ = load_state(tmp_path)
            assert float(tensors["w"][0]) == state["step"]
    states(tmp_path, 3)
    assert not [path for path in (tmp_path / STATE_FOLDER).iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("inputs.image.size=[1048576,1048576]", "one example needs about 176,128 GiB"),
        ("model.num_latents=1000000", "numbers do not fit the configuration"),
        ("model.self_attends_per_block=1024", "numbers do not fit the configuration"),
        ("inputs.image.patch=[65536,65536]", "patch has 4,294,967,296 pixels"),
    ],
)
def test_a_small_file_with_a_huge_configuration_takes_no_memory(
    trained: Path, tmp_path: Path, change: str, problem: str
) -> None:
    """A signed file of this kind took 8.7 GB: the model was built before its shapes were compared."""
    fields, tensors = read_tensors(trained / "model.safetensors")
    large = Config.parse(fields["config"]).override(["inputs.image.size=[1048576,1048576]", change])
    write_tensors(tmp_path / "model", tensors, {**fields, "config": large.to_dict()})
    with pytest.raises(PerceiverError, match=problem):
        load_model(tmp_path / "model")


def test_a_model_without_classes_is_damaged(trained: Path, tmp_path: Path) -> None:
    fields, tensors = read_tensors(trained / "model.safetensors")
    write_tensors(tmp_path / "model", tensors, {**fields, "classes": []})
    with pytest.raises(IntegrityError, match="no classes"):
        load_model(tmp_path / "model")
