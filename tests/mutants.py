"""Would the tests notice? One-change mutants of a module, each against the tests that execute the changed line.

    python tests/mutants.py                                   # all modules, 70 minutes of one core
    python tests/mutants.py dataset/sampler.py --per-module 99
    python tests/mutants.py dataset/sampler.py --numbers 11 12

A mutant has one operator, comparison, number, truth value or condition changed; the wording of messages is left alone. This
process imports the libraries and forks: each child loads the changed module from memory and runs pytest. The tests of a module
are traced once, so that a mutant meets those that run through its line, the quick ones first.
"""

import argparse
import ast
import copy
import gc
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TESTS = {  # module -> files in tests/, without test_
    "deeplab/auxiliary.py": "toolbox_nets toolbox_training schedule",
    "deeplab/batch_norm.py": "resnet loss toolbox_nets",
    "deeplab/crf.py": "crf",
    "deeplab/deeplabv2.py": "resnet schedule multiscale weights weights_apply",
    "deeplab/deeplabv3.py": "toolbox_nets",
    "deeplab/loss.py": "loss properties toolbox_training",
    "deeplab/multiscale.py": "multiscale loss properties window toolbox_training first_steps",
    "deeplab/nets.py": "toolbox_nets toolbox_training",
    "deeplab/pspnet.py": "toolbox_nets",
    "deeplab/resnet.py": "resnet loss toolbox_nets",
    "deeplab/weights/apply.py": "weights weights_apply weights_schemes toolbox_nets",
    "deeplab/weights/caffemodel.py": "caffemodel weights weights_apply",
    "deeplab/weights/contents.py": "weights weights_apply weights_files",
    "deeplab/weights/files.py": "weights_files hostile legacy_tar weights weights_apply",
    "deeplab/weights/kinds.py": "weights_files hostile weights weights_apply",
    "deeplab/weights/legacy_tar.py": "legacy_tar",
    "deeplab/weights/load.py": "weights_files weights_schemes weights weights_apply toolbox_nets",
    "deeplab/weights/names.py": "properties weights_schemes weights weights_apply toolbox_nets",
    "deeplab/weights/schemes.py": "weights_schemes weights weights_apply toolbox_nets caffemodel",
    "deeplab/weights/stem.py": "weights_schemes weights weights_apply convert_weights",
    "deeplab/weights/write.py": "weights weights_apply convert_weights toolbox_nets",
    "deeplab/window.py": "window",
    "dataset/cityscapes.py": "cityscapes",
    "dataset/classes.py": "voc labels cityscapes",
    "dataset/files.py": "pictures voc labels hostile",
    "dataset/labels.py": "labels voc hostile cityscapes",
    "dataset/listing.py": "lists voc layouts",
    "dataset/lists.py": "lists voc",
    "dataset/sampler.py": "transforms properties",
    "dataset/transforms.py": "transforms properties",
    "dataset/voc.py": "voc lists pictures labels",
    "utils/checkpoint.py": "safe resume disk cityscapes convert_weights",
    "utils/evaluation.py": "evaluation validation crf_pool report device first_steps",
    "utils/metrics.py": "metrics properties",
    "utils/schedule.py": "schedule properties",
    "utils/training.py": "training resume toolbox_training validation first_steps",
}
OURS = ("deeplab", "dataset", "utils", "scripts", "tests", "train", "train_msc", "evaluate", "__main__")
BUDGET = 60  # seconds of tests that a mutant meets, as they took without it
TIMEOUT = 150

SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip


def places(tree: ast.Module) -> list[tuple[ast.AST, str, bool]]:
    """(node, what to change in it, whether it lies in a function's body), in the order of the file."""
    found: list[tuple[ast.AST, str, bool]] = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.arg)):
            return
        if isinstance(node, ast.Compare):
            found.extend((node, f"ops {n}", inside) for n, op in enumerate(node.ops) if type(op) in SWAPS)
        elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPS:
            found.append((node, "op", inside))
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            found.append((node, "value", inside))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
            found.append((node, "drop", inside))
        if isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(node.test, ast.Compare):
            found.append((node, "test", inside))
        function = isinstance(node, (ast.FunctionDef, ast.Lambda))
        if any("cache" in ast.unparse(each) for each in getattr(node, "decorator_list", ())):
            function = False  # runs in the first test alone, and matters in the others
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, inside or (function and name == "body"))

    visit(tree, False)
    return found


def changed(source: str, number: int) -> tuple[ast.Module, range, bool, str]:
    """The module with its change of this number; the lines that it lies in, whether in a function, and it in words."""
    tree = ast.parse(source)
    node, what, inside = places(tree)[number]
    before = ast.unparse(node.test if what == "test" else node)  # type: ignore[attr-defined]
    any_node: Any = node
    lines = range(any_node.lineno, (any_node.test if what == "test" else any_node).end_lineno + 1)
    if what == "op":
        any_node.op = SWAPS[type(any_node.op)]()
    elif what == "value":
        value = any_node.value
        any_node.value = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 2 * value + 1e-3
    elif what == "drop":
        operand = copy.copy(any_node.operand)
        any_node.__class__, any_node.__dict__ = operand.__class__, operand.__dict__
    elif what == "test":
        any_node.test = ast.UnaryOp(ast.Not(), any_node.test)
    else:
        place = int(what.split()[1])
        any_node.ops[place] = SWAPS[type(any_node.ops[place])]()
    after = ast.unparse(any_node.test if what == "test" else any_node)
    return ast.fix_missing_locations(tree), lines, inside, f"line {lines[0]}: {before} -> {after}".replace("\n", " ")


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module from memory."""

    def __init__(self, path: str, tree: ast.Module) -> None:
        self.name, self.path = path.removesuffix(".py").replace("/", "."), ROOT / path
        self.code = compile(tree, str(self.path), "exec")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self, origin=str(self.path)) if name == self.name else None

    def exec_module(self, module: Any) -> None:
        module.__file__ = str(self.path)
        exec(self.code, module.__dict__)


class Chosen:
    """A pytest plugin: runs the tests of these names in their order, and notes which lines of the file ``trace`` each runs."""

    def __init__(self, names: list[str] | None, trace: str = "") -> None:
        self.names, self.trace = names, trace
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, list[int]] = {}
        self.failed: set[str] = set()

    def pytest_collection_modifyitems(self, items: list) -> None:
        if self.names is not None:
            places = {name: place for place, name in enumerate(self.names)}
            items[:] = sorted((item for item in items if item.nodeid in places), key=lambda item: places[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        if report.failed or report.skipped:
            self.failed.add(report.nodeid)

    def pytest_runtest_protocol(self, item: Any) -> None:
        if not self.trace:
            return
        seen: set[int] = set()

        def line(frame: Any, event: str, argument: Any) -> Any:
            seen.add(frame.f_lineno)
            return line

        sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename == self.trace else None)
        self.lines[item.nodeid] = seen  # type: ignore[assignment]  # filled while the test runs


def in_child(module: str, tree: ast.Module | None, names: list[str] | None, out: Path) -> int:
    """Fork, run the module's tests there, and return the exit status; 1 where it took too long or crashed."""
    if process := os.fork():
        end = time.monotonic() + (TIMEOUT if names is not None else 3000)
        while (ended := os.waitpid(process, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                return 1
            time.sleep(0.02)
        return os.waitstatus_to_exitcode(ended[1])
    status = 1
    try:
        os.setpgid(0, 0)
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(quiet, stream)
        if tree is not None:
            sys.meta_path.insert(0, Changed(module, tree))
        import pytest

        plugin = Chosen(names, "" if names is not None else str(ROOT / module))
        files = [str(ROOT / f"tests/test_{name}.py") for name in TESTS[module].split()]
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={out.parent / 'pytest'}"]
        status = int(pytest.main([*options, *(["-x"] if names is not None else []), *files], plugins=[plugin]))
        sys.settrace(None)
        if names is None:
            theirs = [name for name in sys.modules if name.split(".")[0] not in OURS]
            found = {name: [plugin.seconds[name], sorted(lines)] for name, lines in plugin.lines.items()}
            found = {name: value for name, value in found.items() if name not in plugin.failed}
            out.write_text(json.dumps([found, theirs]))
    finally:
        os._exit(status)


def judge(module: str, wanted: list[int], count: int, seed: int, out: Path) -> Iterator[tuple[str, str]]:
    """("killed" or "alive", the change) of the ``wanted`` mutants of a module, or of a sample."""
    source = (ROOT / module).read_text()
    in_child(module, None, None, out)
    tests, libraries = json.loads(out.read_text())
    for library in libraries:  # what the tests import need not be imported again and again
        with suppress(Exception):
            importlib.import_module(library)
    gc.freeze()
    numbers = range(len(places(ast.parse(source))))
    for number in wanted or sorted(random.Random(f"{seed} {module}").sample(numbers, min(count, len(numbers)))):
        tree, lines, inside, words = changed(source, number)
        names = [name for name, (_, ran) in tests.items() if not inside or not {*ran}.isdisjoint(lines)]
        names.sort(key=lambda name: tests[name][0])
        total, kept = 0.0, []
        for name in names:
            if (total := total + tests[name][0]) <= BUDGET or not kept:
                kept.append(name)
        status = in_child(module, tree, kept, out) if kept else 0
        yield ("killed" if status not in (0, 5) else "alive" if kept else "alive, not run by any test"), f"#{number} {words}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS))
    parser.add_argument("--numbers", type=int, nargs="*", default=[], help="these mutants of the module, not a sample")
    parser.add_argument("--per-module", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    for library in ("torch", "torchvision", "cv2", "scipy.io", "safetensors.torch", "hypothesis", "pytest", "PIL.Image"):
        importlib.import_module(library)
    killed = total = 0
    for module in args.modules:
        began, here, hits = time.monotonic(), 0, 0
        with tempfile.TemporaryDirectory() as folder:
            for outcome, words in judge(module, args.numbers, args.per_module, args.seed, Path(folder) / "tests.json"):
                here, hits = here + 1, hits + (outcome == "killed")
                if outcome != "killed":
                    print(f"  {outcome}: {module} {words}", flush=True)
        killed, total = killed + hits, total + here
        print(f"{module}: {hits} of {here} killed in {time.monotonic() - began:.0f} s", flush=True)
    print(f"{killed} of {total} killed")


if __name__ == "__main__":
    main()
