"""Which folders and files a command may write: nothing is lost that it reads or that it did not write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.artifact import MANIFEST, Manifest, write_manifest
from kit.atomic_folder import building
from kit.errors import UsageError
from kit.outputs import (
    DEPLOYMENT,
    GATE,
    ONNX,
    OUTPUTS,
    QUANTIZED,
    SEARCH,
    Output,
    check_out,
    check_out_file,
    file_of,
    recognize,
)
from kit.variants import VARIANTS

REPORTS = {
    GATE: {"contract": {}, "faults": [], "pairs": []},
    SEARCH: {"recipe": "int8", "spare": "keep", "bounds": []},
}


def make(folder: Path, output: Output) -> Path:
    """Write a small folder of a kind."""
    folder.mkdir(parents=True)
    if output.kind:
        (folder / "graph").write_bytes(b"graph")
        write_manifest(folder, Manifest(output.kind, VARIANTS["klein-4b"], "fp32", "fp32", {}, {}))  # type: ignore[arg-type]
    else:
        (folder / output.mark).write_text(json.dumps(REPORTS[output]))
    return folder


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: str(output.title))
def test_a_folder_is_recognized_by_the_file_that_marks_it(output: Output, tmp_path: Path) -> None:
    assert recognize(make(tmp_path / "a", output)) == output
    assert check_out(tmp_path / "a", output) == tmp_path / "a"


@pytest.mark.parametrize("makes", OUTPUTS, ids=lambda output: str(output.title))
@pytest.mark.parametrize("held", OUTPUTS, ids=lambda output: str(output.title))
def test_an_artifact_of_another_kind_is_never_replaced(held: Output, makes: Output, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", held)
    if held == makes:
        return
    what = f"{held.title}, and this command writes {makes.title}"
    with pytest.raises(UsageError, match=f"--out .*a holds {what}; choose another --out"):
        check_out(folder, makes)
    with pytest.raises(UsageError, match="holds"), building(folder, makes):
        pass
    assert recognize(folder) == held


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("in", "is the input"),
        ("in/", "is the input"),
        ("in/../in", "is the input"),
        ("link", "is the input"),
        (".", "contains the input"),
        ("in/quantized", "lies in the input"),
        ("link/deeper/quantized", "lies in the input"),
    ],
)
def test_the_input_is_never_replaced(out: str, said: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    make(base / "in", ONNX)
    (base / "link").symlink_to("in")
    with pytest.raises(UsageError, match=f"--out .* {said} .*in; choose another --out"):
        check_out(base / out, QUANTIZED, [None, base / "in"])


def test_an_input_file_in_the_output_is_kept(tmp_path: Path) -> None:
    folder = make(tmp_path / "out", QUANTIZED)
    (folder / "calibration.json").touch()
    with pytest.raises(UsageError, match=r"--out .*out contains the input .*calibration\.json"):
        check_out(folder, QUANTIZED, [folder / "calibration.json"])


@pytest.mark.parametrize("name", ["thesis.txt", "int8/manifest.json"])
def test_files_that_someone_put_into_an_artifact_are_kept(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", ONNX)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    with pytest.raises(UsageError, match=f"holds {name} beside an ONNX artifact; the file would be lost: move it or"):
        check_out(folder, ONNX)


@pytest.mark.parametrize("name", [".DS_Store", "1/__pycache__/model.pyc", "certificate.json"])
def test_files_that_programs_leave_in_an_artifact_are_no_obstacle(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", DEPLOYMENT)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    check_out(folder, DEPLOYMENT)


def test_a_report_is_replaced_only_without_other_files(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", GATE)
    (folder / "images").mkdir()
    (folder / "images" / "0.png").touch()
    check_out(folder, GATE)
    (folder / "notes.md").touch()
    with pytest.raises(UsageError, match=r"holds notes\.md beside a report of `quantize gate`"):
        check_out(folder, GATE)


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "a web page", "icons": []}', '{"format": 1, "kind": "zip"}'])
def test_the_manifest_of_another_program_makes_no_artifact(content: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / MANIFEST).write_text(content)
    with pytest.raises(UsageError, match="--out .*a exists and is not an artifact; choose another --out or remove it"):
        check_out(tmp_path / "a", ONNX)
    (tmp_path / "a" / "report.json").write_text(content)
    with pytest.raises(UsageError, match=r"exists and holds a report\.json of another program; choose another"):
        check_out(tmp_path / "a", GATE)


def test_a_folder_that_programs_stand_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "home" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UsageError, match=r"--out \. is the current folder; give a new folder, such as build"):
        check_out(Path(), ONNX)
    with pytest.raises(UsageError, match=r"--out \.\. contains the current folder"):
        check_out(Path(".."), ONNX)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--out home is the home folder"):
        check_out(Path("home"), ONNX)
    with pytest.raises(UsageError, match="--out / contains the current folder"):
        check_out(Path("/"), ONNX)
    with pytest.raises(UsageError, match="--out /proc is a mount point, which cannot be replaced; give a folder in it"):
        check_out(Path("/proc"), ONNX)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--out .*file is a file, and this command writes a folder"):
        check_out(tmp_path / "file", ONNX)
    with pytest.raises(UsageError, match="--out .*file/a: cannot write to .*file: Not a directory"):
        check_out(tmp_path / "file" / "a", ONNX)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="--out .*loop: the path goes through a loop of symbolic links"):
        check_out(tmp_path / "loop", ONNX)


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    """A link to another disk stays a link, and the artifact appears where it points to."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "build").symlink_to("disk/build")
    for _ in range(2):
        with building(tmp_path / "build", ONNX) as folder:
            write_manifest(folder, Manifest("onnx", VARIANTS["klein-4b"], "fp32", "fp32", {}, {}))
        assert (tmp_path / "build").is_symlink()
        assert (tmp_path / "disk" / "build" / MANIFEST).is_file()


def test_an_artifact_that_becomes_another_while_its_successor_is_built_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "a"

    def build() -> None:
        with building(out, ONNX) as folder:
            write_manifest(folder, Manifest("onnx", VARIANTS["klein-4b"], "fp32", "fp32", {}, {}))
            make(out, DEPLOYMENT)

    with pytest.raises(UsageError, match="holds a deployment"):
        build()
    assert recognize(out) == DEPLOYMENT
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_to_write_is_no_folder_and_no_input(tmp_path: Path) -> None:
    (tmp_path / "a.json").touch()
    with pytest.raises(UsageError, match="--out .* is a folder; give a file"):
        check_out_file(tmp_path)
    with pytest.raises(UsageError, match=r"--out .*a\.json is a file that this command reads; choose another --out"):
        check_out_file(tmp_path / "a.json", [None, tmp_path / "a.json"])
    with pytest.raises(UsageError, match=r"--chart .*b\.png: cannot write to .*a\.json: Not a directory"):
        check_out_file(tmp_path / "a.json" / "b.png", option="--chart")
    check_out_file(tmp_path / "b.json", [tmp_path / "a.json"])


def test_a_word_is_a_file_only_if_it_exists(tmp_path: Path) -> None:
    (tmp_path / "set.txt").touch()
    assert file_of(str(tmp_path / "set.txt")) == tmp_path / "set.txt"
    assert (file_of("kit:24"), file_of(None), file_of("")) == (None, None, None)
