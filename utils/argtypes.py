"""The command line parser, and its argument types: each reads one value, or says in a sentence what it expects."""

import argparse
import difflib
import math
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

LARGEST_NUMBER = 2**31 - 1  # of an option
LARGEST_SIDE = 2**16 - 1  # of crops, canvases and tiles, in pixels

EPOCHS = ("epochs", "epoch", "num-epochs", "max-epochs")
# An option's name in other programs -> our names for it; the first one that the command has is suggested.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*EPOCHS, "steps", "max-steps", "iters", "iterations", "max-iter", "max-iters"), ("--num-steps",)),
    **dict.fromkeys(("lr", "base-lr", "learn-rate"), ("--learning-rate",)),
    **dict.fromkeys(("wd", "decay"), ("--weight-decay",)),
    **dict.fromkeys(("bs", "batch", "images-per-batch"), ("--batch-size",)),
    **dict.fromkeys(("accumulate", "grad-accum", "accumulation-steps", "gradient-accumulation-steps"), ("--iter-size",)),
    **dict.fromkeys(("crop", "crop-size", "image-size", "img-size", "imgsz", "base-size"), ("--input-size", "--window")),
    **dict.fromkeys(("flip", "hflip", "horizontal-flip", "random-flip"), ("--random-mirror", "--mirror")),
    **dict.fromkeys(("workers", "j"), ("--num-workers", "--workers")),
    **dict.fromkeys(("data", "data-root", "data-path", "dataroot", "root", "dataset-dir"), ("--data-dir",)),
    **dict.fromkeys(("weights", "pretrained", "checkpoint", "ckpt", "load", "model-path", "init"), ("--restore-from",)),
    **dict.fromkeys(("model", "arch", "network"), ("--net", "--backbone")),
    **dict.fromkeys(("out", "output", "output-dir", "save", "work-dir", "log-dir", "logdir"), ("--snapshot-dir", "--save-dir")),
    **dict.fromkeys(("fp16", "half", "bf16", "mixed-precision", "use-amp"), ("--amp",)),
    "seed": ("--random-seed",),
    **dict.fromkeys(("classes", "nclass", "n-classes"), ("--num-classes",)),
    **dict.fromkeys(("gpus", "gpu-id", "gpu-ids", "cuda"), ("--gpu",)),
    **dict.fromkeys(("syncbn", "sync-batchnorm"), ("--sync-bn",)),
    "ignore-index": ("--ignore-label",),
    **dict.fromkeys(("eval-every", "val-interval", "eval-interval"), ("--val-every",)),
    "dilations": ("--atrous-rates",),
}


class HelpFormatter(argparse.HelpFormatter):
    """argparse's, with the last word of an option as its metavar; texts of several lines, such as examples, are not wrapped."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.rpartition("_")[2].upper()


class Parser(argparse.ArgumentParser):
    """argparse's, with a short usage line, and one sentence per mistake that names the option probably meant.

    It also refuses ``--option=--``, which argparse would read as no value at all.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **options})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("-") and word.endswith("=--"):
                self.error(f"{word}: '--' is no value; if it is the name of a file, write ./--")
        return super().parse_known_args(args, namespace)

    def format_usage(self) -> str:
        formatter = self._get_formatter()
        words = [formatter._format_args(action, action.dest) for action in self._get_positional_actions()]
        return f"usage: {' '.join([self.prog, '[options]', *words])}\n"

    def format_help(self) -> str:
        if self.usage is None:
            self.usage = self.format_usage().removeprefix("usage: ").strip().replace("%", "%%")
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        words = message.removeprefix("unrecognized arguments: ")
        if words != message:
            word = next((word.partition("=")[0] for word in words.split() if word.startswith("-")), "")
            meant = f"did you mean {near}?" if (near := self.nearest(word)) else "--help lists the options"
            message = f"{word} is not an option of this command; {meant}" if word else f"{words} is not expected here; {meant}"
        self.exit(2, f"{self.prog}: error: {message}\n")

    def nearest(self, word: str) -> str:
        """The option that a mistyped one, or another program's, probably means; "" if none is similar."""
        options = [name for name in self._option_string_actions if name.startswith("--")]
        if not (name := word.strip("-").lower().replace("_", "-")):
            return ""
        if meant := next((option for option in OTHER_NAMES.get(name, ()) if option in options), ""):
            return f"{meant}, which counts optimiser steps" if name in EPOCHS else meant
        return next(iter(difflib.get_close_matches(f"--{name}", options, n=1, cutoff=0.7)), "")


class GivenParser(Parser):
    """A parser that records which options were on the command line, in ``args.given``: a set of names."""

    def parse_args(  # type: ignore[override]  # narrower: no namespace is ever given
        self, args: Sequence[str] | None = None
    ) -> argparse.Namespace:
        defaults = {action.dest: action.default for action in self._actions if action.dest != "help"}
        not_given = object()
        result = super().parse_args(args, argparse.Namespace(**dict.fromkeys(defaults, not_given)))
        result.given = {name for name in defaults if getattr(result, name) is not not_given}
        for name in defaults.keys() - result.given:
            setattr(result, name, defaults[name])
        return result


def target_text(text: str) -> str:
    """An argparse type: a path to write to; an empty one, as from an unset shell variable, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a file or folder, or leave the option out")
    return text


def target(text: str) -> Path:
    """An argparse type: :func:`target_text` as a path."""
    return Path(target_text(text))


def size(text: str) -> tuple[int, int]:
    """An argparse type: ``"321,321"`` -> (321, 321), height and width in pixels."""
    try:
        height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write HEIGHT,WIDTH, as in 321,321") from None
    if max(height, width) > LARGEST_SIDE:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is too large; expected sides of at most {LARGEST_SIDE}")
    if min(height, width) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; both sides must be at least 1")
    return height, width


def numbers(kind: type, text: str) -> tuple:
    """Comma-separated numbers of one kind, as an argparse type: ``partial(numbers, float)`` reads ``"1,0.75"``."""
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers; separate them by commas") from None
    if not all(0 < value <= LARGEST_NUMBER for value in values):
        raise argparse.ArgumentTypeError(
            f"{text[:60]!r} holds a number that is not above 0 and finite, or above {LARGEST_NUMBER}"
        )
    return values


def scale_range(text: str) -> tuple[float, float]:
    """An argparse type: ``"0.5,1.5"`` -> (0.5, 1.5)."""
    values = numbers(float, text)
    if len(values) != 2 or values[0] > values[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range; write LOW,HIGH, as in 0.5,1.5")
    return values


def number(
    text: str,
    fits: Callable[[float], bool] = lambda value: 0 <= value < math.inf,
    expected: str = "a finite number of at least 0",
) -> float:
    """An argparse type: a number that ``fits``; ``expected`` describes such numbers in words."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text} is out of range; expected {expected}")
    return value


below_one = partial(number, fits=lambda value: 0 <= value < 1, expected="at least 0 and below 1")
probability = partial(number, fits=lambda value: 0 < value <= 1, expected="above 0 and at most 1")


def share(text: str) -> Fraction:
    """An argparse type: a share of at least 0 and below 1, such as ``"1/3"`` or ``"0.25"``."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share; write one such as 1/3 or 0.25") from None
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; expected at least 0 and below 1")
    return value


def whole(low: int, high: int | None, text: str) -> int:
    """A whole number from ``low`` to ``high``, as an argparse type: ``partial(whole, 1, None)``."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < low:
        raise argparse.ArgumentTypeError(f"{value} is too small; expected at least {low}")
    if value > (high := high or LARGEST_NUMBER):
        raise argparse.ArgumentTypeError(f"{text[:40]} is too large; expected at most {high}")
    return value


positive = partial(whole, 1, None)
not_negative = partial(whole, 0, None)
label_value = partial(whole, 0, 255)
helpers = partial(whole, 0, 1024)  # processes


def known(table: str, text: str) -> str:
    """A name in one of deeplab's tables, as an argparse type: ``partial(known, "BACKBONES")``.

    The table is imported only if a name is given: it loads torch, and --help need not wait for that.
    """
    import deeplab

    names = getattr(deeplab, table)
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; choose one of {', '.join(names)}")
    return text


net_name, backbone_name = partial(known, "NETS"), partial(known, "BACKBONES")


def class_count(text: str) -> int:
    """An argparse type: a number of classes, 2..255."""
    value = positive(text)
    if value == 1:
        raise argparse.ArgumentTypeError("1 is too small: with a single class the loss is always 0; count the background too")
    if value > 255:
        raise argparse.ArgumentTypeError(f"{value} is too large; expected at most 255, as 255 is the ignore label")
    return value
