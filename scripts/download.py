"""Download the data sets and the published weights.

    python scripts/download.py list                              # everything that is available
    python scripts/download.py VOC2012 SBD                       # into data/, unpacked
    python scripts/download.py resnet101-v1                      # into weights/
    python scripts/download.py coco-init --from ~/Downloads/x.pth  # a file saved with a browser

The same command resumes an interrupted download. A file gets its final name only after its checksum has been verified.
Checksums and URLs come from torchvision (VOC 2012, SBD, its ResNets) and from the pages of the authors; `list` says what
nobody has checked.
"""

import argparse
import difflib
import errno
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.data.archive import record_of, unpack, unpacked
from scripts.data.catalogue import CATALOGUE, Item
from scripts.data.download import ChecksumError, check, copy_checked, fetch
from utils.argtypes import Parser, positive, target
from utils.command import UserError, run_command


def print_table(data_dir: Path, weights_dir: Path) -> None:
    """Print the name, size, licence, checksum and destination of every item, and below the table notes on some of them."""
    rows = [("name", "size", "licence", "checksum", "saved to")]
    notes = []
    for item in CATALOGUE:
        directory = data_dir if item.kind == "data" else weights_dir
        found = [(kind, getattr(item, kind)) for kind in ("sha256", "sha1", "md5") if getattr(item, kind)]
        if found:
            known = f"{found[0][0]} {found[0][1][:16]}..."
        else:
            known = f"sha256 starts {item.sha256_prefix}" if item.sha256_prefix else "not known"
        size = f"{item.size / 1e9:.1f} GB" if item.size else item.about or "not known"
        uncertain = " (?)" if not item.sum_certain else ""
        rows.append((item.name, size, item.licence, known + uncertain, str(item.place(directory))))
        if item.manual:
            notes.append(f"{item.name}: download it with a browser, from {item.manual}")
        plain = [url for url in item.urls if url.startswith("http:")]
        if plain:
            notes.append(f"{item.name}: no https URL is published for {plain[0]}")
        if item.unverified:
            notes.append(f"{item.name}: not verified: {item.unverified}")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(
        "\n(repository): the licence of the repository that publishes the file. starts: the first digits, which are part\n"
        "of the file name and which torch.hub checks. (?): may not hold for this copy, so a mismatch only warns.\n"
        "not known: the file is not checked, and its SHA-256 is printed."
    )
    print("\n".join(["", *notes]))


def obtain(item: Item, directory: Path, args: argparse.Namespace) -> None:
    """Download or copy one item, check it and unpack it. Does nothing if it is already there."""
    target, place = item.path(directory), item.place(directory)
    if item.unpack and not args.force and args.file is None:
        if unpacked(item, directory):
            print(f"{item.name}: {place} exists and is complete; nothing to do")
            if args.remove_archive:
                target.unlink(missing_ok=True)
            return
        if (directory / item.holds).exists() and not record_of(target).exists():
            print(f"{item.name}: {place} exists, unpacked by other means and not checked; nothing done (--force replaces it)")
            return
    if args.file is not None:
        copy_checked(item, args.file, target, args.force)
    elif target.exists() and not args.force:
        try:
            check(item, target)
        except ChecksumError as error:
            raise UserError(f"{error}; move it away, or pass --force to replace it") from error
        print(f"{item.name}: {target} already exists")
    elif item.urls:
        print(f"{item.name}: downloading {item.filename} to {target.parent}")
        fetch(item, target, args.tries, args.timeout)
    else:
        raise UserError(
            f"{item.name} cannot be downloaded by a script; open {item.manual} in a browser, save {item.filename}, and run: "
            f"python scripts/download.py {item.name} --from FILE"
        )
    if item.unpack:
        unpack(item, directory)
        if args.remove_archive:
            target.unlink()
    print(f"{item.name}: {place}")


def refused(error: OSError, directory: Path) -> UserError:
    """One sentence for an error of the file system (disk full, no permission, not a folder)."""
    where = error.filename or directory
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"no space is left for {where}; free some space and run the same command to resume")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"no permission for {where}; change its permissions, or choose another --data-dir or --weights-dir")
    return UserError(f"{where} cannot be read or written ({error.strerror or error})")


def select(names: list[str]) -> list[Item]:
    known = {key.lower(): item for item in CATALOGUE for key in (item.filename, item.name)}
    for name in names:
        if name.lower() not in known:
            close = difflib.get_close_matches(name, [item.name for item in CATALOGUE], n=3)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise UserError(f"unknown name {name!r}; {hint}`python scripts/download.py list` shows the names")
    return list(dict.fromkeys(known[name.lower()] for name in names))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help='what to download; "list" shows everything available')
    parser.add_argument("--from", dest="file", type=Path, metavar="FILE", help="a file downloaded by hand, to check and copy")
    parser.add_argument("--data-dir", type=target, default=Path("data"), help="folder for data sets (default: %(default)s)")
    parser.add_argument("--weights-dir", type=target, default=Path("weights"), help="folder for weights (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="download again and replace existing files")
    parser.add_argument("--remove-archive", action="store_true", help="delete each archive after unpacking it")
    parser.add_argument("--tries", type=positive, default=5, help="attempts without progress, per URL (default: %(default)s)")
    parser.add_argument("--timeout", type=positive, default=30, help="seconds to wait for a response (default: %(default)s)")
    args = parser.parse_args(argv)
    if "list" in args.names and len(args.names) > 1:
        parser.error("list cannot be combined with other names")
    if args.file is not None and len(args.names) > 1:
        parser.error(f"--from is one file and needs one name, found {len(args.names)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.names == ["list"]:
        print_table(args.data_dir, args.weights_dir)
        return 0
    status, commands = 0, []
    for item in select(args.names):
        directory = args.data_dir if item.kind == "data" else args.weights_dir
        try:
            obtain(item, directory, args)
            path = shlex.quote(str(item.place(directory)))
            commands.append(item.after.format(path=path, directory=shlex.quote(str(directory))))
        except (UserError, OSError) as error:  # the other items may still succeed
            problem = error if isinstance(error, UserError) else refused(error, directory)
            print(f"download.py: error: {problem}", file=sys.stderr)
            status = max(status, problem.exit_status)
    if commands:
        print("next:", *dict.fromkeys(commands), sep="\n  ")
    return status


if __name__ == "__main__":
    run_command(main)
