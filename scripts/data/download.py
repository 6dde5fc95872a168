"""Fetching one file over an unreliable network and unpacking it: resumed, checked, and whole or not there at all."""

import contextlib
import email.utils
import errno
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from utils.command import UserError

CHUNK = 1 << 18
LONGEST_PAUSE = 300  # seconds; a server that asks for more is left for the next mirror
RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)


class DownloadError(UserError):
    """No mirror gave the file; not the caller's mistake, so the status is 1."""

    exit_status = 1


class ChecksumError(UserError):
    """A file is not the published one."""


class _MirrorError(Exception):
    """This address will not give the file, however often it is asked."""


class _TryAgainError(Exception):
    """This address may give the file (or the rest of it) when asked again, after ``pause`` seconds if it said so."""

    def __init__(self, text: str, pause: float | None = None):
        super().__init__(text)
        self.pause = pause


@dataclass(frozen=True)
class Item:
    """One thing to fetch. Paths are relative to the folder it goes to (``--data-dir`` or ``--weights-dir``)."""

    name: str
    filename: str
    kind: str  # "data" or "weights": which of the two folders
    licence: str
    urls: tuple[str, ...] = ()  # mirrors, tried in order
    size: int | None = None  # bytes, where the exact size is known
    about: str = ""  # the size in words, where it is not
    md5: str = ""
    sha1: str = ""
    sha256: str = ""
    sha256_prefix: str = ""  # torch.hub's convention: the file name carries the first 8 hex digits
    sum_certain: bool = True  # False: the sum was published for another copy; a difference is told, not refused
    folder: str = ""  # where the file goes
    unpack: str | None = None  # the folder an archive is unpacked into
    holds: str = ""  # what must be there after unpacking
    gives: str = ""  # what a user works with, where it is not ``holds``
    manual: str = ""  # a page for a browser, where no script can fetch the file
    unverified: str = ""  # what nobody has checked
    after: str = ""  # the next command; {path} is ``place()``, {directory} the folder

    def path(self, directory: Path) -> Path:
        """The file itself."""
        return directory / self.folder / self.filename

    def place(self, directory: Path) -> Path:
        """What is there in the end: the file, or what an archive gives."""
        return directory / (self.gives or self.holds) if self.unpack is not None else self.path(directory)


# ---- checks


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses (full, no permission, read-only, not a folder) into one sentence about ``path``."""
    try:
        yield
    except OSError as error:
        where = Path(error.filename) if isinstance(error.filename, str) else path
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"no space is left for {where}; free some, and the same command goes on from there"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            text = f"no permission for {where}; change its rights, or choose another place with --data-dir or --weights-dir"
        else:
            text = f"{where} cannot be written ({error.strerror or error})"
        raise UserError(text) from error


def need_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has {free / 2**20:,.0f} MiB free and {needed / 2**20:,.0f} MiB are needed; free some space, "
            f"and the same command goes on from there"
        )


def looks_like_html(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a web page: a login, quota or error page in place of the file."""
    return re.match(rb"\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body|script|meta)\b", head, re.I | re.S) is not None


def check(item: Item, path: Path) -> str:
    """Compare size and every known sum of the file at ``path``; returns its SHA-256 in hex.

    Where no sum is known, or only one of another copy, that is printed with the SHA-256 found.

    Raises:
        ChecksumError: the file is not the published one.
    """
    found_size = path.stat().st_size
    if item.size is not None and found_size != item.size:
        raise ChecksumError(f"{path} has {found_size} bytes and {item.name} has {item.size}; it is cut short or another file")
    expected = {name: getattr(item, name).lower() for name in ("sha256", "sha1", "md5") if getattr(item, name)}
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in {"sha256", *expected}}
    with (
        open(path, "rb") as file,
        tqdm(total=found_size, unit="B", unit_scale=True, unit_divisor=1024, desc="checking", disable=None, leave=False) as bar,
    ):
        while block := file.read(1 << 20):
            for digest in hashes.values():
                digest.update(block)
            bar.update(len(block))
    found = {name: digest.hexdigest() for name, digest in hashes.items()}
    if item.sha256_prefix:
        expected["sha256 prefix"], found["sha256 prefix"] = item.sha256_prefix, found["sha256"][: len(item.sha256_prefix)]
    wrong = [f"{name} is {found[name]} and should be {value}" for name, value in expected.items() if found[name] != value]
    if wrong and item.sum_certain:
        raise ChecksumError(f"{path} is not the published {item.filename}: {'; '.join(wrong)}")
    if wrong:
        print(f"{item.name}: WARNING: not the copy whose sum is known ({'; '.join(wrong)}); SHA-256 found: {found['sha256']}")
    elif not expected:
        print(f"{item.name}: no check sum is known for this file, so it was not checked; SHA-256 found: {found['sha256']}")
    else:
        print(f"{item.name}: {', '.join(expected)} as published")
    return found["sha256"]


# ---- fetching


class _Part:
    """``NAME.part`` and, beside it, what is known of its origin: address, validator (ETag or date), total size."""

    def __init__(self, target: Path):
        self.path = target.with_name(target.name + ".part")
        self.record = target.with_name(target.name + ".part.json")
        self.joined = False  # bytes of more than one reply
        try:
            known = json.loads(self.record.read_text())
        except (OSError, ValueError):
            known = {}
        self.known = known if isinstance(known, dict) else {}

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def open(self, start: int, url: str, validator: str | None, total: int | None) -> io.FileIO:
        """The file, unbuffered, to be continued (``start`` > 0) or begun anew with what ``url`` said about it."""
        self.joined = start > 0
        if not start:
            self.known = {"url": url, "validator": validator, "total": total}
            self.record.write_text(json.dumps(self.known))
        return open(self.path, "ab" if start else "wb", buffering=0)

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)
        self.known, self.joined = {}, False


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects, but never from https to anything less."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if req.type == "https" and not newurl.lower().startswith("https:"):
            raise urllib.error.HTTPError(newurl, code, "leads from https to an unprotected address", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(item: Item, target: Path, tries: int = 5, timeout: float = 30.0, pause: float = 1.0) -> str:
    """Download ``item`` to ``target`` from the first mirror that gives it whole and right; returns its SHA-256.

    The bytes go to ``NAME.part``, which is continued by a later call, and get their name after the check.

    Args:
        tries: attempts in a row without one new byte, per mirror.
        timeout: seconds without an answer, for the connection and for each read.
        pause: seconds before the second attempt; doubles with each further one.

    Raises:
        DownloadError: no mirror gave the file; the text says why, for each.
        UserError: the disk refused.
    """
    part, problems = _Part(target), []
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for url in item.urls:
            for again in (False, True):
                try:
                    _download(url, part, item, tries, timeout, pause)
                    digest = check(item, part.path)
                except _MirrorError as error:
                    problem = str(error)
                except ChecksumError as error:
                    problem, joined = str(error), part.joined
                    part.discard()
                    if joined and not again:  # one of the pieces may be the bad one
                        print(f"{item.name}: {problem}; fetching it once more from the start", file=sys.stderr)
                        continue
                except KeyboardInterrupt:
                    print(f"\n{part.path} keeps its {part.size()} bytes; the same command goes on from there", file=sys.stderr)
                    raise
                else:
                    _name(part.path, target)
                    part.discard()
                    return digest
                print(f"{item.name}: {url}: {problem}", file=sys.stderr)
                problems.append(f"{url}: {problem}")
                break
    raise DownloadError(
        f"{item.name} could not be fetched ({' | '.join(problems)}); try again later, or fetch it in a browser and pass the "
        f"file: python scripts/download.py {item.name} --from FILE"
    )


def _name(draft: Path, target: Path) -> None:
    with open(draft, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(draft, target)


def _download(url: str, part: _Part, item: Item, tries: int, timeout: float, pause: float) -> None:
    """Bring ``part`` to its full length from one address, asking again while that helps."""
    failures, longest = 0, -1
    while True:
        try:
            return _request(url, part, item, timeout)
        except _TryAgainError as error:
            failures = 1 if part.size() > longest else failures + 1
            longest = max(longest, part.size())
            if failures >= tries:
                raise _MirrorError(f"{error} ({tries} attempts in a row)") from error
            wait = error.pause if error.pause is not None else min(pause * 2 ** (failures - 1), LONGEST_PAUSE)
            if wait > LONGEST_PAUSE:
                raise _MirrorError(f"{error}, and asks to come back in {wait:.0f} seconds") from error
            print(f"{item.name}: {error}; next attempt in {wait:g} s", file=sys.stderr)
            time.sleep(wait)


def _request(url: str, part: _Part, item: Item, timeout: float) -> None:
    """One GET for what is missing (RFC 9110: Range, If-Range, Content-Range, 206, 416)."""
    headers = {"User-Agent": "deeplab-download/1.0", "Accept-Encoding": "identity"}
    same = part.known.get("url") == url
    safe = item.sum_certain and (item.sha256 or item.sha1 or item.md5)
    offset = part.size() if same or safe else 0  # bytes of another mirror are joined only where a sum would tell
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if same and part.known.get("validator"):
            headers["If-Range"] = part.known["validator"]
    try:
        opener = urllib.request.build_opener(_Redirects)
        with opener.open(urllib.request.Request(url, headers=headers), timeout=timeout) as reply:
            _receive(reply, url, part, item, offset)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and offset:
                if _content_range(error.headers)[1] == offset:
                    part.joined = True  # bytes of an earlier call
                    return  # nothing is missing
                part.discard()
                raise _TryAgainError("the file there is not the one begun; starting over", pause=0) from error
            if error.code in RETRIED_STATUS:
                raise _TryAgainError(f"HTTP {error.code} {error.reason}", _retry_after(error.headers)) from error
            raise _MirrorError(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:  # URLError, timeouts, resets, replies cut inside a chunk
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise _MirrorError(f"its certificate is not trusted here ({reason.verify_message})") from error
        slow = isinstance(reason, TimeoutError)
        raise _TryAgainError(f"no answer for {timeout:g} s" if slow else f"{reason or type(reason).__name__}") from error


def _receive(reply: http.client.HTTPResponse, url: str, part: _Part, item: Item, offset: int) -> None:
    """Write the body of a 200 or 206 reply to the partial file."""
    start, total = 0, None
    validator = reply.headers.get("ETag", "")
    if not validator or validator.startswith("W/"):  # a weak one does not promise the same bytes
        validator = reply.headers.get("Last-Modified")
    if reply.status == 206:
        start, total = _content_range(reply.headers)
        known_validator = part.known.get("validator") if part.known.get("url") == url else None
        changed = [(part.known.get("total"), total), (known_validator, validator)]
        if start != offset or any(old and new and old != new for old, new in changed):
            part.discard()
            raise _TryAgainError("the file there is not the one begun; starting over", pause=0)
    elif reply.headers.get("Content-Length", "").isdigit():
        total = int(reply.headers["Content-Length"])
    head = reply.read(512)
    if reply.headers.get_content_type() in ("text/html", "application/xhtml+xml") or (start == 0 and looks_like_html(head)):
        raise _MirrorError("it answers with a web page (a login, quota or error page), not with the file")
    if start == 0 and not head:
        if total:
            raise _TryAgainError("the connection was cut before the first byte")
        raise _MirrorError("it answers with an empty file")
    if item.size is not None and total not in (None, item.size):
        raise _MirrorError(f"it offers {total} bytes where {item.size} are expected")
    if offset and not start:
        print(f"{item.name}: the server does not continue the file, or it has changed; starting over", file=sys.stderr)
    with disk_errors(part.path):
        need_space(part.path.parent, (total or item.size or 0) - start)
        file = part.open(start, url, validator, total)
    what = f"{item.filename}{' (continued)' if start else ''}"
    with (
        file,
        tqdm(total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024, desc=what, disable=None) as bar,
    ):
        block = head
        while block:
            rest = memoryview(block)
            while rest:
                with disk_errors(part.path):  # the disk's refusal, not to be taken for the network's
                    rest = rest[file.write(rest) :]
            bar.update(len(block))
            block = reply.read1(CHUNK)
    if total is not None and part.size() < total:
        raise _TryAgainError(f"the connection was cut after {part.size()} of {total} bytes")


def _content_range(headers: http.client.HTTPMessage) -> tuple[int, int | None]:
    """First byte and total size of ``bytes 5-9/10``, ``bytes 5-9/*`` or ``bytes */10``; (-1, None) for anything else."""
    match = re.fullmatch(r"bytes\s+(?:(\d+)-\d+|\*)/(\d+|\*)", headers.get("Content-Range", "").strip())
    if not match:
        return -1, None
    return int(match[1] or -1), None if match[2] == "*" else int(match[2])


def _retry_after(headers: http.client.HTTPMessage) -> float | None:
    """Seconds of a ``Retry-After`` header, which holds a number or a date."""
    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


# ---- a file fetched by hand


def take(item: Item, source: Path, target: Path) -> str:
    """Copy a file that was fetched by hand to ``target`` once it has passed the checks; returns its SHA-256.

    Raises:
        UserError: there is no such file, it is a web page, it is not the published file, or the disk refused.
    """
    if not source.is_file():
        raise UserError(f"--from {source}: {'a folder' if source.is_dir() else 'no such file'}; expected {item.filename}")
    with disk_errors(source):
        with open(source, "rb") as file:
            head = file.read(512)
        if looks_like_html(head) or not head:
            what = "a web page that the browser saved in its place" if head else "empty"
            raise UserError(f"--from {source} is {what}, not {item.filename}; fetch it again")
        digest = check(item, source)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.exists() and target.samefile(source)):
            need_space(target.parent, source.stat().st_size)
            copy = target.with_name(target.name + ".copy")
            try:
                shutil.copyfile(source, copy)
                _name(copy, target)
            finally:
                copy.unlink(missing_ok=True)
        _Part(target).discard()
    return digest
