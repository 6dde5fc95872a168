"""Score DeepLab-v2 on labelled pictures. The options, with their defaults: ``python evaluate.py --help``."""

from utils.command import run_command
from utils.options import evaluation_parser


def main(argv: list[str] | None = None) -> int:
    parser = evaluation_parser(__doc__.split(".")[0])
    args = parser.parse_args(argv)
    if args.compare and not args.report:
        parser.error("--compare needs --report, where the comparison is written")
    from utils import evaluation

    return evaluation.run(args)


if __name__ == "__main__":
    run_command(main)
