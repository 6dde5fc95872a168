"""Score DeepLab-v2 on labelled pictures. The options, with their defaults: ``python evaluate.py --help``."""

from utils.command import run_command
from utils.options import evaluation_parser


def main(argv: list[str] | None = None) -> int:
    args = evaluation_parser(__doc__.split(".")[0]).parse_args(argv)
    from utils import evaluation

    return evaluation.run(args)


if __name__ == "__main__":
    run_command(main)
