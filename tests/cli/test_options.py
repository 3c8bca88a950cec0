"""Options that several commands share: lists of paths, columns of manifests, and outputs in the way."""

from __future__ import annotations

import codecs
import os
import tomllib
from pathlib import Path

import pytest

from perceiver_cli.cli import options, sources
from perceiver_cli.config import Config, DataConfig, tiny_config
from perceiver_cli.data.examples import PAUSE
from perceiver_cli.errors import ResourceError, UsageError
from perceiver_cli.files import write_text


def listed(path: Path, content: bytes, *, null: bool = False) -> list[str]:
    """Return the paths that a list with this content names."""
    path.write_bytes(content)
    return [path for path in sources.listed_to_predict([], str(path), null, "-")[0] if path is not PAUSE]


@pytest.mark.parametrize(
    "content",
    [
        b"a.png\nb c.png\n",
        b"a.png\r\nb c.png\r\n",
        b"a.png\r\nb c.png",
        codecs.BOM_UTF8 + b"a.png\n\n \r\n\nb c.png\n",
        "a.png\r\nb c.png\r\n".encode("utf-16"),
        codecs.BOM_UTF16_BE + "a.png\nb c.png".encode("utf-16-be"),
    ],
)
def test_a_list_of_paths_is_read_as_each_system_writes_it(tmp_path: Path, content: bytes) -> None:
    assert listed(tmp_path / "list", content) == ["a.png", "b c.png"]


def test_a_list_goes_on_after_the_last_answer_wherever_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between an answer and the next line, when no line waits, it did not say what goes on."""
    (tmp_path / "list").write_text("a.png\nb.png\nc.png\n")
    monkeypatch.setattr("sys.argv", ["perceiver", "predict", "--files-from", str(tmp_path / "list")])
    paths, place = sources.listed_to_predict([], str(tmp_path / "list"), False, "-")
    assert place.command() is None  # nothing is answered: the command itself goes on
    assert [next(iter(paths)), place.answered("a.png", is_part=False)][0] == "a.png"
    rest = f"{tmp_path}/list | perceiver predict --files-from -"
    assert place.command() == f"tail -n +2 {rest}"
    next(iter(paths))
    assert place.command() == f"tail -n +2 {rest}"


def test_a_name_that_ends_in_cr_is_kept_if_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a\r").touch()
    assert listed(tmp_path / "list", b"a\r\nb\r\n") == ["a\r", "b"]
    assert listed(tmp_path / "list", b"a\r\0b\0", null=True) == ["a\r", "b"]


def test_a_forgotten_or_a_wrong_null_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="paths end in NUL, not in line ends; pass -0"):
        listed(tmp_path / "list", b"a.png\0b.png\0")
    with pytest.raises(UsageError, match="paths end in line ends, not in NUL; leave out -0"):
        listed(tmp_path / "list", b"a.png\nb.png\n", null=True)
    assert listed(tmp_path / "list", b"a.png\n", null=True) == ["a.png\n"]


def test_a_column_of_any_name_goes_into_the_configuration_and_back() -> None:
    """`--columns` is no option, and a dot in a name made a table."""
    given = options.data_options(None, None, None, columns=["unit.price=number", "a=b=text"])
    changed = tiny_config(["table"]).override(options.data_changes(given)).data
    assert changed.columns == {"unit.price": "number", "a=b": "text"}
    assert changed.words() == ["--column", "unit.price=number", "--column", "a=b=text"]
    typed = tiny_config(["table"]).override(['data.columns."unit.price"=number']).data
    assert typed.columns == {"unit.price": "number"}


def test_options_of_data_go_into_the_configuration_and_back_into_a_command() -> None:
    given = options.data_options(None, ["image=photo", "audio=so=und"], "kind", "none")
    changed = tiny_config(["image"]).override(options.data_changes(given)).data
    assert (changed.path_column, changed.label_column, changed.pair) == (
        {"image": "photo", "audio": "so=und"},
        "kind",
        "none",
    )
    words = DataConfig(**given).words()
    assert words == [
        "--path-column",
        "image=photo",
        "--path-column",
        "audio=so=und",
        "--label-column",
        "kind",
        "--pair",
        "none",
    ]
    assert options.data_options(None, ["a=b"], None) == {"path_column": {"path": "a=b"}}
    with pytest.raises(UsageError, match="--root 'nowhere': no such folder"):
        options.data_options("nowhere", None, None)
    with pytest.raises(UsageError, match=r"path_column\.smell is not a modality"):
        tiny_config(["image"]).override(["data.path_column.smell=x"])
    for text in ("none", '"none"'):
        toml = tiny_config(["image"]).override([f"data.pair={text}"]).to_toml()
        assert Config.parse(tomllib.loads(toml)).data.pair == "none"


def test_an_output_in_the_way_of_another_file_is_told(tmp_path: Path) -> None:
    """Its hint was to free space."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match="a file has the name of a folder that the output needs"):
        write_text(tmp_path / "file" / "report.html", "x")
    with pytest.raises(ResourceError, match="a folder has this name"):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(ResourceError, match="choose a shorter name"):
        write_text(tmp_path / ("n" * 300) / "x", "x")
    assert os.listdir(tmp_path / "folder") == []
