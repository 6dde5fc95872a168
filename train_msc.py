"""Train at three scales and on their maximum. Options and their defaults: ``python train_msc.py --help``."""

from utils.command import run_command
from utils.training.options import training_parser


def main(argv: list[str] | None = None) -> int:
    parser = training_parser(__doc__.split(".")[0], batch_size=1, iter_size=10, snapshot_dir="snapshots_msc")
    parser.add_argument(
        "--one-scale-at-a-time",
        action="store_true",
        help="keep the activations of one scale at a time: less memory, 15 %% slower",
    )
    args = parser.parse_args(argv)
    from deeplab import multi_scale_loss
    from utils import training

    return training.run(args, multi_scale_loss)


if __name__ == "__main__":
    run_command(main)
