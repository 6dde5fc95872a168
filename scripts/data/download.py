"""Fetching one file over an unreliable network: it gets its name when it is whole and has been checked."""

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
LONGEST_PAUSE = 300  # seconds; a server that asks for more is left for the next mirror
UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20}


class DownloadError(UserError):
    """No mirror gave the file; not the caller's mistake, so the status is 1."""

    exit_status = 1


class ChecksumError(UserError):
    """A file is not the published one."""


class _MirrorError(Exception):
    """This address does not give the file."""


class _CutError(Exception):
    """The connection ended before the file did."""


# ---- checks


def is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are readable: a web page or a message. Everything in the catalogue is binary."""
    return re.search(rb"[\x00-\x08\x0e-\x1f]", head) is None


def check(item: Item, path: Path) -> str:
    """Compare kind, size and every known sum of the file at ``path``; returns its SHA-256 in hex.

    Where no sum is known, or only one of another copy, that is printed with the SHA-256 found.

    Raises:
        ChecksumError: the file is not the published one.
    """
    size = path.stat().st_size
    if item.size is not None and size != item.size:
        raise ChecksumError(f"{path} has {size} bytes and {item.name} has {item.size}; it is cut short or another file")
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in ("sha256", "sha1", "md5")}
    with (
        open(path, "rb") as file,
        tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024, desc="checking", disable=None, leave=False) as bar,
    ):
        if is_text(file.read(512)):
            raise ChecksumError(f"{path} is {'a web page or another text' if size else 'empty'}, not {item.filename}")
        file.seek(0)
        while block := file.read(1 << 20):
            for digest in hashes.values():
                digest.update(block)
            bar.update(len(block))
    found = {name: digest.hexdigest() for name, digest in hashes.items()}
    found["sha256_prefix"] = found["sha256"][: len(item.sha256_prefix)]
    expected = {name: getattr(item, name) for name in found if getattr(item, name)}
    wrong = [f"{name} is {found[name]} and should be {value}" for name, value in expected.items() if found[name] != value]
    if wrong and item.sum_certain:
        raise ChecksumError(f"{path} is not the published {item.filename}: {'; '.join(wrong)}")
    if not expected and item.about and size < 0.8 * _bytes(item.about):
        raise ChecksumError(f"{path} has {size} bytes and {item.name} has {item.about}; it is cut short or another file")
    if wrong:
        print(f"{item.name}: WARNING: not the copy whose sum is known ({'; '.join(wrong)}); SHA-256 found: {found['sha256']}")
    elif not expected:
        print(f"{item.name}: no check sum is known for this file, so it was not checked; SHA-256 found: {found['sha256']}")
    else:
        print(f"{item.name}: {', '.join(expected)} as published")
    return found["sha256"]


def _bytes(about: str) -> float:
    """``"over 1.4 GB"`` -> 1.4e9"""
    number, unit = about.split()[-2:]
    return float(number) * UNITS[unit]


# ---- fetching


def fetch(item: Item, target: Path, tries: int = 5, timeout: float = 30.0) -> str:
    """Download ``item`` to ``target`` from the first mirror that gives it whole and right; returns its SHA-256.

    The bytes of each mirror go to a file of its own, ``NAME.part``, ``NAME.part1``, ...; where a full check sum is known, a
    later call continues it. ``tries`` attempts without progress, or ``timeout`` seconds without an answer in each, are enough.

    Raises:
        DownloadError: no mirror gave the file.
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
                print(f"\n{part} keeps its {kept} bytes; the same command goes on from there", file=sys.stderr)
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
        f"{item.name} could not be fetched ({' | '.join(problems)}); try again later, or fetch it in a browser and pass the "
        f"file: python scripts/download.py {item.name} --from FILE"
    )


def _resumable(item: Item) -> bool:
    """Whether a sum would tell pieces that do not belong together."""
    return item.sum_certain and bool(item.sha256 or item.sha1 or item.md5)


def _from_mirror(url: str, part: Path, item: Item, tries: int, timeout: float) -> str:
    """Bring ``part`` to its full length from one address, going on while that helps; returns its SHA-256."""
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
                how = "going on" if _resumable(item) else "starting over, as no full check sum is known"
                print(f"{item.name}: {error}; {how}", file=sys.stderr)
                time.sleep(BACKOFF * failures)
            except ChecksumError as error:
                part.unlink()
                if not begun or restarted:
                    raise
                print(f"{item.name}: {error}; fetching it once more from the start", file=sys.stderr)
                restarted = True


def _transfer(session: requests.Session, url: str, part: Path, begun: int, item: Item, timeout: float) -> None:
    """One GET for what is missing (RFC 9110: Range, Content-Range, 206, 416), appended to ``part``."""
    headers = {"User-Agent": "deeplab-download/1.0", "Accept-Encoding": "identity"}
    if begun:
        headers["Range"] = f"bytes={begun}-"
    try:
        reply = session.get(url, headers=headers, stream=True, timeout=timeout)
    except requests.RequestException as error:
        raise _MirrorError(_reason(error)) from error
    with reply:
        if reply.status_code == 416 and begun:
            return  # nothing is missing, or what is here is wrong; the sum tells
        start, total = _judge(reply, url, begun, item)
        blocks = _blocks(reply)
        head = next(blocks, b"")
        if not head and not start:
            raise _CutError("the answer is empty")
        if "html" in reply.headers.get("Content-Type", "") or (is_text(head) and not start):
            raise _MirrorError("answers with a web page or a message (login, quota, error), not with the file")
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - start > free:
            needed = f"{(total - start) / 2**20:,.0f} MiB are needed"
            raise UserError(f"{part.parent} has {free / 2**20:,.0f} MiB free and {needed}; free some space and try again")
        most = 4 * _bytes(item.about) if item.about and item.size is None else item.size  # an answer in chunks may be endless
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024, desc=part.name, disable=None)
        with bar, open(part, "ab" if start else "wb") as file:
            for block in itertools.chain([head], blocks):
                if most is not None and file.tell() + len(block) > most:
                    raise ChecksumError(f"it sends more than {most:.0f} bytes, and {item.name} has {item.size or item.about}")
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size < total:
        raise _CutError(f"the connection was cut after {part.stat().st_size} of {total} bytes")


def _judge(reply: requests.Response, url: str, begun: int, item: Item) -> tuple[int, int | None]:
    """The first byte that a reply brings, and the size of the whole file where it says so; refuses what cannot be the file."""
    if reply.status_code not in (200, 206):
        raise _MirrorError(f"HTTP {reply.status_code} {reply.reason}")
    if url.startswith("https:") and not all(hop.url.startswith("https:") for hop in (*reply.history, reply)):
        raise _MirrorError("leads from https to an unprotected address")
    if reply.status_code == 206 and not reply.headers.get("Content-Range", "").startswith(f"bytes {begun}-"):
        raise _MirrorError("answers with another piece than was asked for")
    start = begun if reply.status_code == 206 else 0
    length = reply.headers.get("Content-Length", "")
    total = start + int(length) if length.isdigit() else None
    if total is not None and item.size not in (None, total):
        raise _MirrorError(f"offers {total} bytes where {item.size} are expected")
    if total is None and not _resumable(item) and "chunked" not in reply.headers.get("Transfer-Encoding", ""):
        raise _MirrorError("does not say where the file ends, so that nobody could tell whether it is whole")
    return start, total


class _Retry(Retry):
    """urllib3's own, which says what happened before it asks again, and leaves a server that wants a long pause."""

    def sleep(self, response: BaseHTTPResponse | None = None) -> None:
        last = self.history[-1]
        print(f"{_reason(last.error) if last.error else f'HTTP {last.status}'}; asking again", file=sys.stderr)
        super().sleep(response)

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        wait = super().get_retry_after(response)
        if wait is not None and wait > LONGEST_PAUSE:
            raise _MirrorError(f"HTTP {response.status}, and asks to come back in {wait:.0f} seconds")
        return wait


def _blocks(reply: requests.Response) -> Iterator[bytes]:
    """The body as it comes over the line; what the network does to it is a ``_CutError``, never an ``OSError``."""
    try:
        yield from reply.raw.stream(CHUNK, decode_content=False)
    except HTTPError as error:
        raise _CutError(f"the connection was cut ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """What requests and urllib3 have wrapped, in its own words."""
    inside = [part for part in (getattr(error, "reason", None), *error.args) if isinstance(part, BaseException)]
    return _reason(inside[0]) if inside else re.sub(r"^\w+\(.*?\): ", "", str(error))


# ---- a file fetched by hand


def take(item: Item, source: Path, target: Path, replace: bool) -> str:
    """Copy a file that was fetched by hand to ``target`` once it has passed the checks; returns its SHA-256.

    Raises:
        UserError: there is no such file, it is not the published one, or ``target`` is another and ``replace`` is not set.
    """
    if not source.is_file():
        raise UserError(f"--from {source}: {'a folder' if source.is_dir() else 'no such file'}; expected {item.filename}")
    digest = check(item, source)
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        print(f"{item.name}: {target} is there, the same bytes as {source}")
    elif target.exists() and not replace:
        raise UserError(f"{target} is there and is another file than {source}; move it away, or pass --force to replace it")
    else:
        with open(source, "rb") as file:
            write_atomically(target, partial(shutil.copyfileobj, file))
    return digest
