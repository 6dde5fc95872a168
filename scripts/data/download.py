"""Download one file over an unreliable network. It gets its final name only when it is complete and checked."""

import filecmp
import hashlib
import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse
from urllib3.util import Retry

from scripts.data.catalogue import Item
from utils.command import UserError
from utils.files import write_atomically

CHUNK = 1 << 16
BACKOFF = 1.0  # seconds before the second attempt; later ones wait longer
LONGEST_PAUSE = 300  # seconds; if a server asks for a longer one, the next URL is tried
UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20}


class DownloadError(UserError):
    """No URL gave the file. This is not the user's mistake, so the exit status is 1."""

    exit_status = 1


class ChecksumError(UserError):
    """A file is not the published one."""


class _MirrorError(Exception):
    """This URL does not give the file."""


class _CutError(Exception):
    """The connection ended before the file was complete."""


# ---- checks


def is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are text, such as a web page or a message. Every file in the catalogue is binary."""
    return re.search(rb"[\x00-\x08\x0e-\x1f]", head) is None


def check(item: Item, path: Path) -> str:
    """Check the type, the size and every known checksum of the file at ``path``; returns its SHA-256 in hex.

    If no checksum is known, or only that of another copy, this is printed with the SHA-256 found.

    Raises:
        ChecksumError: the file is not the published one.
    """
    size = path.stat().st_size
    if item.size is not None and size != item.size:
        raise ChecksumError(f"{path} has {size} bytes, expected {item.size} for {item.name}; it is truncated or another file")
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in ("sha256", "sha1", "md5")}
    with (
        open(path, "rb") as file,
        tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024, desc="checking", disable=None, leave=False) as bar,
    ):
        if is_text(file.read(512)):
            raise ChecksumError(f"{path} is {'a web page or other text' if size else 'empty'}, not {item.filename}")
        file.seek(0)
        while block := file.read(1 << 20):
            for digest in hashes.values():
                digest.update(block)
            bar.update(len(block))
    found = {name: digest.hexdigest() for name, digest in hashes.items()}
    found["sha256_prefix"] = found["sha256"][: len(item.sha256_prefix)]
    expected = {name: getattr(item, name) for name in found if getattr(item, name)}
    wrong = [f"{name} is {found[name]}, expected {value}" for name, value in expected.items() if found[name] != value]
    if wrong and item.sum_certain:
        raise ChecksumError(f"{path} is not the published {item.filename}: {'; '.join(wrong)}")
    if not expected and item.about and size < 0.8 * _bytes(item.about):
        raise ChecksumError(f"{path} has {size} bytes, expected {item.about} for {item.name}; it is truncated or another file")
    if wrong:
        print(f"{item.name}: WARNING: checksum mismatch ({'; '.join(wrong)}); SHA-256 found: {found['sha256']}")
    elif not expected:
        print(f"{item.name}: no checksum is known for this file, so it was not checked; SHA-256 found: {found['sha256']}")
    else:
        print(f"{item.name}: {', '.join(expected)} as published")
    return found["sha256"]


def _bytes(about: str) -> float:
    """``"over 1.4 GB"`` -> 1.4e9"""
    number, unit = about.split()[-2:]
    return float(number) * UNITS[unit]


# ---- downloading


def fetch(item: Item, target: Path, tries: int = 5, timeout: float = 30.0) -> str:
    """Download ``item`` to ``target`` from the first URL that gives the complete, correct file; returns its SHA-256.

    Each URL has its own partial file, ``NAME.part``, ``NAME.part1``, ... If a full checksum is known, a later call resumes it.
    A URL is given up after ``tries`` attempts without progress; each attempt waits ``timeout`` seconds for a response.

    Raises:
        DownloadError: no URL gave the file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    parts = [target.with_name(f"{target.name}.part{number or ''}") for number in range(len(item.urls))]
    problems = []
    for url, part in zip(item.urls, parts):
        try:
            digest = _from_mirror(url, part, item, tries, timeout)
        except (_MirrorError, ChecksumError) as error:
            problems.append(f"{url}: {error}")
            if url != item.urls[-1]:
                print(f"{item.name}: {problems[-1]}", file=sys.stderr)
        except KeyboardInterrupt:
            if _resumable(item) and part.exists():
                kept = part.stat().st_size
                print(f"\n{part} keeps its {kept} bytes; run the same command to resume", file=sys.stderr)
            raise
        else:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, target)
            for leftover in parts:
                leftover.unlink(missing_ok=True)
            return digest
        finally:
            if not _resumable(item):
                part.unlink(missing_ok=True)
    raise DownloadError(
        f"{item.name} could not be downloaded ({' | '.join(problems)}); try again later, or save it with a browser and pass "
        f"the file: python scripts/download.py {item.name} --from FILE"
    )


def _resumable(item: Item) -> bool:
    """Whether a checksum would detect parts of different files."""
    return item.sum_certain and bool(item.sha256 or item.sha1 or item.md5)


def _from_mirror(url: str, part: Path, item: Item, tries: int, timeout: float) -> str:
    """Complete ``part`` from one URL, resuming as long as there is progress; returns its SHA-256."""
    failures, restarted = 0, False
    with requests.Session() as session:
        retry = _Retry(total=tries - 1, other=0, backoff_factor=BACKOFF, status_forcelist=(408, 425, 429, 500, 502, 503, 504))
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry.new(raise_on_status=False)))
        while True:
            begun = part.stat().st_size if _resumable(item) and part.exists() else 0
            try:
                _transfer(session, url, part, begun, item, timeout)
                return check(item, part)
            except _CutError as error:
                failures = 1 if _resumable(item) and part.exists() and part.stat().st_size > begun else failures + 1
                if failures >= tries:
                    raise _MirrorError(f"{error} ({tries} attempts in a row)") from error
                how = "resuming" if _resumable(item) else "starting over, as no full checksum is known"
                print(f"{item.name}: {error}; {how}", file=sys.stderr)
                time.sleep(BACKOFF * failures)
            except ChecksumError as error:
                part.unlink()
                if not begun or restarted:
                    raise
                print(f"{item.name}: {error}; downloading it once more from the start", file=sys.stderr)
                restarted = True


def _transfer(session: requests.Session, url: str, part: Path, begun: int, item: Item, timeout: float) -> None:
    """Append the missing bytes to ``part`` with one GET request (RFC 9110: Range, Content-Range, 206, 416)."""
    headers = {"User-Agent": "deeplab-download/1.0", "Accept-Encoding": "identity"}
    if begun:
        headers["Range"] = f"bytes={begun}-"
    try:
        reply = session.get(url, headers=headers, stream=True, timeout=timeout)
    except requests.RequestException as error:
        raise _MirrorError(_reason(error)) from error
    with reply:
        if reply.status_code == 416 and begun:
            return  # the file is complete, or wrong: the checksum decides
        start, total = _judge(reply, url, begun, item)
        blocks = _blocks(reply)
        head = next(blocks, b"")
        if not head and not start:
            raise _CutError("the response is empty")
        if "html" in reply.headers.get("Content-Type", "") or (is_text(head) and not start):
            raise _MirrorError("sends a web page or a message (login, quota, error), not the file")
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - start > free:
            needed = f"{(total - start) / 2**20:,.0f} MiB are needed"
            raise UserError(f"{part.parent} has {free / 2**20:,.0f} MiB free and {needed}; free some space and try again")
        most = 4 * _bytes(item.about) if item.about and item.size is None else item.size  # a chunked response may be endless
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024, desc=part.name, disable=None)
        with bar, open(part, "ab" if start else "wb") as file:
            for block in itertools.chain([head], blocks):
                if most is not None and file.seek(0, os.SEEK_CUR) + len(block) > most:
                    raise ChecksumError(f"sends more than {most:.0f} bytes, expected {item.size or item.about} for {item.name}")
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size < total:
        raise _CutError(f"the connection was cut after {part.stat().st_size} of {total} bytes")


def _judge(reply: requests.Response, url: str, begun: int, item: Item) -> tuple[int, int | None]:
    """Check a response; returns the offset of its first byte, and the size of the whole file if the response gives it."""
    if reply.status_code not in (200, 206):
        raise _MirrorError(f"HTTP {reply.status_code} {reply.reason}")
    if url.startswith("https:") and not all(hop.url.startswith("https:") for hop in (*reply.history, reply)):
        raise _MirrorError("redirects from https to an unencrypted URL")
    if reply.status_code == 206 and not reply.headers.get("Content-Range", "").startswith(f"bytes {begun}-"):
        raise _MirrorError("sends another part of the file than requested")
    start = begun if reply.status_code == 206 else 0
    length = reply.headers.get("Content-Length", "")
    total = start + int(length) if length.isdigit() else None
    if total is not None and item.size not in (None, total):
        raise _MirrorError(f"offers {total} bytes, expected {item.size}")
    if total is None and not _resumable(item) and "chunked" not in reply.headers.get("Transfer-Encoding", ""):
        raise _MirrorError("does not give the length of the file, so it could not be checked for completeness")
    return start, total


class _Retry(Retry):
    """urllib3's ``Retry`` that reports each failure before it retries, and gives up on a server that asks for a long pause."""

    def sleep(self, response: BaseHTTPResponse | None = None) -> None:
        last = self.history[-1]
        print(f"{_reason(last.error) if last.error else f'HTTP {last.status}'}; retrying", file=sys.stderr)
        super().sleep(response)

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        wait = super().get_retry_after(response)
        if wait is not None and wait > LONGEST_PAUSE:
            raise _MirrorError(f"HTTP {response.status}, and asks to retry after {wait:.0f} seconds")
        return wait


def _blocks(reply: requests.Response) -> Iterator[bytes]:
    """Yield the body in blocks; a network failure raises ``_CutError``, never an ``OSError``."""
    try:
        yield from reply.raw.stream(CHUNK, decode_content=False)
    except HTTPError as error:
        raise _CutError(f"the connection was cut ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """The message of the innermost error that requests and urllib3 have wrapped."""
    inside = [part for part in (getattr(error, "reason", None), *error.args) if isinstance(part, BaseException)]
    return _reason(inside[0]) if inside else re.sub(r"^\w+\(.*?\): ", "", str(error))


# ---- a file downloaded by hand


def copy_checked(item: Item, source: Path, target: Path, replace: bool) -> str:
    """Check a file that was downloaded by hand and copy it to ``target``; returns its SHA-256.

    Raises:
        UserError: the file does not exist or is not the published one, or ``target`` differs and ``replace`` is not set.
    """
    if not source.is_file():
        raise UserError(f"--from {source}: {'a folder' if source.is_dir() else 'no such file'}; expected {item.filename}")
    digest = check(item, source)
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        print(f"{item.name}: {target} already exists with the same bytes as {source}")
    elif target.exists() and not replace:
        raise UserError(f"{target} exists and differs from {source}; move it away, or pass --force to replace it")
    else:
        with open(source, "rb") as file:
            write_atomically(target, partial(shutil.copyfileobj, file))
    return digest
