"""Train DeepLab-v2, DeepLabv3 or PSPNet at one scale. Options and their defaults: ``python train.py --help``."""

from utils.command import run_command
from utils.training.options import training_parser


def main(argv: list[str] | None = None) -> int:
    args = training_parser(__doc__.split(".")[0], batch_size=10, iter_size=1, snapshot_dir="snapshots").parse_args(argv)
    from deeplab import single_scale_loss
    from utils import training

    return training.run(args, single_scale_loss)


if __name__ == "__main__":
    run_command(main)
