"""Export a net for use without this project: to ONNX, or as a torch.export program.

    python scripts/export_onnx.py snapshots/VOC12_scenes_20000.pth net.onnx
    python scripts/export_onnx.py snapshots/VOC12_scenes_20000.pth net.pt2 --with-preprocessing

The suffix, .onnx or .pt2, chooses the format. Batch size, height and width are dynamic, and batch norm is folded into the
convolutions. Without --with-preprocessing the input is (N, 3, H, W) float32, BGR 0..255 minus the mean colour, and the output
is (N, C, h, w) logits at stride 8: position (i, j) is at pixel (8i, 8j) if height and width are 8k + 1. With it, the input is
(N, H, W, 3) uint8 RGB and the output (N, H, W) uint8 class indices, as from scripts/predict.py at one scale. An ONNX model has
the input ``images`` and the output ``logits`` or ``classes``, with the axes ``batch``, ``height`` and ``width``. The file
describes itself, with mean, channel order, class names and net: in the metadata of an ONNX model, or in a .pt2's contract.json.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.argtypes import Parser
from utils.command import UserError, run_command
from utils.files import write_atomically
from utils.options import add_file_options
from utils.outputs import OUTPUT_MARK, Output, check_outputs, mark_zip

if TYPE_CHECKING:
    import torch

OPSET = 18


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", type=Path, help="a snapshot or published weights")
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write: .onnx or .pt2")
    parser.add_argument("--with-preprocessing", action="store_true", help="input: uint8 RGB images; output: class indices")
    add_file_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.target.suffix not in (".onnx", ".pt2"):
        raise UserError(f"{args.target} ends in {args.target.suffix!r}; expected .onnx, or .pt2 for torch.export")
    if args.target.suffix == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(f"ONNX needs packages that are not installed ({error}): pip install onnx onnxscript") from None
    check_outputs([Output("OUT", args.target.parent, args.target.name, "the net")], [args.source])

    from deeplab import fold_batch_norm
    from deeplab.weights import build_net, load_weights

    weights = load_weights(args.source, abn=args.abn, atrous_rates=args.atrous_rates)
    net, report = build_net(weights)
    if report.missing:
        raise UserError(f"{args.source} ({weights.scheme}) holds no usable head; train it first with train.py")
    print(f"{args.source}: {weights.scheme}", *report.lines(), sep="\n")
    module = fold_batch_norm(net.eval())
    facts = contract(net.config, weights.meta, args.with_preprocessing)
    program = export(with_preprocessing(module) if args.with_preprocessing else module, args.with_preprocessing)
    if args.target.suffix == ".onnx":
        write_onnx(args.target, program, facts, args.with_preprocessing)
    else:
        write_pt2(args.target, program, facts)
    print(f"wrote {args.target} ({args.target.stat().st_size / 1e6:.1f} MB): {facts['input']} -> {facts['output']}")
    return 0


def contract(config: dict[str, Any], meta: dict[str, Any], with_preprocessing: bool) -> dict[str, Any]:
    """The description stored in the file: input, output, mean, channel order, class names, and the net's ``config``."""
    from dataset import MEAN_BGR
    from utils.visualize import class_names

    num_classes = config["num_classes"]
    given = "(N, H, W, 3) uint8 RGB" if with_preprocessing else "(N, 3, H, W) float32 BGR 0..255 minus the mean colour"
    result = "(N, H, W) uint8 class indices" if with_preprocessing else f"(N, {num_classes}, h, w) float32 logits, stride 8"
    names = class_names(num_classes, meta.get("classes"))
    facts = {"input": given, "output": result, "mean_bgr": list(MEAN_BGR), "classes": names, "opset": OPSET, "net": config}
    facts["channel_order"] = "RGB" if with_preprocessing else "BGR"
    return facts | {"made_by": OUTPUT_MARK}  # marks the file as output, so that a later export may overwrite it


def with_preprocessing(net: "torch.nn.Module") -> "torch.nn.Module":
    """``net`` from (N, H, W, 3) uint8 RGB to (N, H, W) uint8 classes, equal to ``deeplab.inference.predict_classes``."""
    import torch.nn.functional as F
    from torch import Tensor, arange, nn, uint8

    from dataset import to_input
    from deeplab.multiscale import resize

    def cut(x: Tensor, height: int, width: int) -> Tensor:
        """The upper left corner. Slices would specialise the program on whether they cover the whole tensor."""
        return x.index_select(2, arange(height, device=x.device)).index_select(3, arange(width, device=x.device))

    class WithPreprocessing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: Tensor) -> Tensor:
            height, width = images.shape[1:3]
            # canvas_size(), without its division of negative numbers
            canvas = ((height + 6) // 8 * 8 + 1, (width + 6) // 8 * 8 + 1)
            x = cut(F.pad(to_input(images.flip(-1)), (0, 7, 0, 7)), *canvas)  # N3HW
            logits = resize(self.net(x), canvas)
            return cut(logits, height, width).argmax(dim=1).to(uint8)

    return WithPreprocessing()


def export(module: "torch.nn.Module", with_preprocessing: bool) -> "torch.export.ExportedProgram":
    """``module`` traced for any batch size, height and width; a torch.export program needs at least 9 pixels per side.

    Raises:
        UserError: this torch version is too old.
    """
    import torch
    from torch.export import Dim

    example = torch.zeros(2, 71, 93, 3, dtype=torch.uint8) if with_preprocessing else torch.zeros(2, 3, 71, 93)
    if not hasattr(Dim, "AUTO"):
        raise UserError(f"torch {torch.__version__} cannot export dynamic image sizes; install torch 2.6 or newer")
    free = dict.fromkeys((0, 1, 2) if with_preprocessing else (0, 2, 3), Dim.AUTO)
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=(free,))


def write_onnx(target: Path, program: "torch.export.ExportedProgram", facts: dict[str, Any], with_preprocessing: bool) -> None:
    """Write ``program`` as an ONNX model with ``facts`` as its metadata."""
    import onnx
    import torch

    result = "classes" if with_preprocessing else "logits"
    exported = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, verbose=False, input_names=["images"], output_names=[result]
    )
    assert exported is not None
    model = exported.model_proto
    name_axes(model.graph)
    for name, value in facts.items():
        model.metadata_props.add(key=name, value=value if isinstance(value, str) else json.dumps(value))
    onnx.checker.check_model(model)
    write_atomically(target, lambda file: file.write(model.SerializeToString()))


def name_axes(graph: Any) -> None:
    """Name the dynamic axes batch, height and width, which torch names s77 and so on; those of the logits logits_height, ..."""

    def axes(value: Any) -> list[Any]:
        return [dim for dim in value.type.tensor_type.shape.dim if dim.dim_param]

    sides = ("batch", "height", "width")
    names = dict(zip((dim.dim_param for dim in axes(graph.input[0])), sides, strict=True))
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in axes(value):
            dim.dim_param = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), dim.dim_param)
    for dim, side in zip(axes(graph.output[0]), sides):
        dim.dim_param = side if dim.dim_param == side else f"{graph.output[0].name}_{side}"


def write_pt2(target: Path, program: "torch.export.ExportedProgram", facts: dict[str, Any]) -> None:
    """Write ``program`` as torch.export does, with ``facts`` in contract.json."""
    import torch

    def write(file: IO[bytes]) -> None:
        torch.export.save(program, file, extra_files={"contract.json": json.dumps(facts)})
        mark_zip(file)

    write_atomically(target, write)


if __name__ == "__main__":
    run_command(main)
