"""The command line of evaluate.py, and the options that it results in."""

from argparse import Namespace
from typing import TYPE_CHECKING

from dataset import DATASETS
from utils.argtypes import GivenParser, class_count, size, target_text
from utils.options import (
    Options,
    add_data_options,
    add_device_options,
    add_net_options,
    add_prediction_options,
    dataset_defaults,
    trained_weights,
)

if TYPE_CHECKING:  # not imported at run time: --help is fast without torch
    from deeplab.weights import Weights


EXAMPLES = """examples:
  python %(prog)s --restore-from snapshots/VOC12_scenes_20000.pth
  python %(prog)s --restore-from snapshots/VOC12_scenes_20000.pth --scales 1,0.75,0.5 --mirror --crf --report report
  python %(prog)s --data-dir data/mine --restore-from snapshots/mine_scenes_20000.pth --save-panels panels
"""


def evaluation_parser(description: str) -> GivenParser:
    """The command line of evaluate.py, with the published flags and defaults."""
    parser = GivenParser(description=description, epilog=EXAMPLES)
    add_data_options(parser, "val", None)
    add_net_options(parser)
    group = parser.add_argument_group("weights")
    group.add_argument(
        "--restore-from", default=trained_weights(), metavar="FILE", help="snapshot or published weights (default: %(default)s)"
    )
    group.add_argument("--num-classes", type=class_count, metavar="N", help="default: the weights file's")

    group = parser.add_argument_group("prediction")
    add_prediction_options(group)
    group.add_argument(
        "--input-size",
        type=size,
        metavar="H,W",
        help="a fixed canvas, as published: 505,505 (default: the size of each image)",
    )

    group = parser.add_argument_group("output")
    text = "write the predictions as <id>.png, class indices with a palette"
    group.add_argument("--save-dir", type=target_text, help=text)
    group.add_argument(
        "--save-panels",
        type=target_text,
        metavar="DIR",
        help="write image, label, prediction and errors as <id>.png",
    )
    group.add_argument("--save-json", type=target_text, metavar="FILE", help="write the scores")
    group.add_argument(
        "--report",
        type=target_text,
        metavar="DIR",
        help="write a page with scores, confusions and images: DIR/index.html",
    )
    text = "write class names into the images of --report and --save-panels"
    group.add_argument("--names", action="store_true", help=text)
    servers = [f"FILE{kind.SERVER.suffixes[0]} for {kind.TITLE}" for kind in DATASETS.values() if kind.SERVER]
    text = f"pack predictions of the test list for the evaluation server: {', '.join(servers)}"
    group.add_argument("--submission", type=target_text, metavar="FILE", help=text)
    group.add_argument("--compare", type=target_text, metavar="DIR", help="an earlier report to compare --report with")
    add_device_options(parser)
    return parser


def settled(args: Namespace, weights: "Weights") -> Options:
    """The options of an evaluation or a submission: data set and ignore label default to those of the net's training.

    Raises:
        UserError: ``--num-classes`` does not fit the data set.
    """
    from dataset import IGNORE_LABEL
    from utils.checkpoint import dataset_of

    options = dataset_defaults(args, dataset_of(weights.meta))
    if options.ignore_label is not None:
        return options
    return options.replace(ignore_label=(weights.meta.get("args") or {}).get("ignore_label", IGNORE_LABEL))
