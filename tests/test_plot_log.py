"""The curves of runs: the plots show the values of the logs, and other files are refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from scripts import plot_log
from utils.command import UserError

LINES = [
    {"step": 1, "loss": 3.0, "lr": 0.1},
    {"step": 2, "val_mean_iou": 0.25, "val_iou": {}},
    {"step": 4, "loss": 1.5, "lr": 0.05},
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 5, "lo')
    return tmp_path / "run"


def test_points_of_each_curve(run):
    lines = plot_log.read_log(run / "log.jsonl")
    assert lines == LINES
    assert plot_log.points(lines, "loss") == ([1, 4], [3.0, 1.5])
    assert plot_log.points(lines, "val_mean_iou") == ([2], [25.0])


def test_curves_are_drawn(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert plot_log.main([str(run), str(run / "log.jsonl"), "-o", str(tmp_path / "curves.png")]) == 0
    with Image.open(tmp_path / "curves.png") as image:
        assert min(image.size) > 500
        assert len(image.convert("RGB").getcolors(100000)) > 10
    assert "to step 4" in capsys.readouterr().out
    assert plot_log.main([str(run), "-o", str(tmp_path / "curves.svg")]) == 0
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    for suffix in ("png", "svg", "pdf", "pdf"):  # overwrites its own outputs
        assert plot_log.main([str(run), "-o", str(tmp_path / f"curves.{suffix}")]) == 0
    Image.new("RGB", (2, 2)).save(tmp_path / "mine.png")
    with pytest.raises(UserError, match="over a file that is no earlier output"):
        plot_log.main([str(run), "-o", str(tmp_path / "mine.png")])


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        (["x/snapshots"], ["snapshots"]),
        (["x/snapshots", "y/snapshots_msc"], ["snapshots", "snapshots_msc"]),
        (["x/a/s", "x/b/s", "y/b/s", "other"], ["a/s", "x/b/s", "y/b/s", "other"]),
        (["x/s", "z/../x/s", "y/s"], ["x/s", "x/s", "y/s"]),
        (["x/log.1.jsonl", "x"], ["log.1.jsonl", "x"]),
    ],
)
def test_runs_are_named_by_the_shortest_unique_path_endings(runs, names):
    paths = [Path("/data", run) if run.endswith("l") else Path("/data", run, "log.jsonl") for run in runs]
    assert plot_log.short_names(paths) == [str(Path(name)) for name in names]


def test_the_legend_and_the_axes(run, tmp_path, monkeypatch):
    """Folder names are unchanged, and mean IoU is in percent."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **options: drawn.append(self))
    others = [tmp_path / "_run", tmp_path / "a$b$"]
    for other in others:
        shutil.copytree(run, other)
    plot_log.main([*map(str, [run, *others]), "-o", str(tmp_path / "a.png")])
    axes = drawn[0].axes
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == [" run", " _run", r" a\$b\$"]
    assert [panel.get_ylabel() for panel in axes] == ["loss", "learning rate", "mean IoU %"]
    assert axes[2].lines[0].get_xydata().tolist() == [[2, 25.0]]


def test_files_that_are_no_logs_are_refused(run, tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("[1]\nno json\n")
    before = (run / "log.jsonl").read_bytes()
    for options, message in (
        ([str(tmp_path / "nowhere")], "nowhere cannot be read"),
        ([str(tmp_path / "empty.jsonl")], "holds no step"),
        ([str(run), "-o", "a.gif"], r"ends in '.gif'; expected \.png"),
    ):
        with pytest.raises(UserError, match=message):
            plot_log.main(options)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot_log.main([str(run), "-o", str(tmp_path / "a.png")])
    assert (run / "log.jsonl").read_bytes() == before


def test_damaged_lines_are_skipped(tmp_path):
    """The other lines are drawn; a log without any valid value is refused."""
    pytest.importorskip("matplotlib")
    path, output = tmp_path / "log.jsonl", str(tmp_path / "a.png")
    steps = [
        '"2"',
        "[1]",
        "true",
        "-1",
        "null",
        "NaN",
        "1" + "0" * 400,
        "1" + "0" * 5000,
        '2, "seconds": "x"',
        '2, "seconds": NaN',
    ]
    bad = ["[" * 100000, "5", '"x"', "\xff", "", *(f'{{"step": {step}}}' for step in steps)]
    path.write_bytes("\n".join([*bad, json.dumps(LINES[0])]).encode("latin-1"))
    assert plot_log.read_log(path) == LINES[:1]
    path.write_text('{"step": 3, "loss": "x", "lr": [1], "val_mean_iou": {}}\n{"step": 4, "loss": 1' + "0" * 400 + "}")
    with pytest.raises(UserError, match="hold no loss, learning rate or mean IoU"):
        plot_log.main([str(tmp_path), "-o", output])
    path.write_text(path.read_text() + "\n" + json.dumps(LINES[0]))
    assert plot_log.main([str(tmp_path), "-o", output]) == 0
