"""Evaluate a net on labelled images. Options and defaults: ``python evaluate.py --help``."""

from utils.command import run_command
from utils.evaluation.options import evaluation_parser


def main(argv: list[str] | None = None) -> int:
    parser = evaluation_parser(__doc__.split(".")[0])
    args = parser.parse_args(argv)
    if args.compare and not args.report:
        parser.error("--compare needs --report, which shows the comparison; add it")
    if args.names and not (args.report or args.save_panels):
        parser.error("--names writes into the images of --report and --save-panels; add one of them, or leave it out")
    if args.submission and (args.save_dir or args.save_panels or args.save_json or args.report):
        parser.error("--submission packs predictions for images without labels; leave --save-... and --report out")
    if args.window and args.input_size:
        parser.error("--window cuts images into tiles of one size; leave --input-size out")
    from utils.evaluation import run as evaluation
    from utils.evaluation import submission

    return submission.run(args) if args.submission else evaluation.run(args)


if __name__ == "__main__":
    run_command(main)
