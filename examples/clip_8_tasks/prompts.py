"""The classes of the eight tasks in words, and zero-shot heads made of them.

A head is made as CLIP's authors do (Radford et al., arXiv 2103.00020, section 3.1.4, and their notebook
https://github.com/openai/CLIP/blob/main/notebooks/Prompt_Engineering_for_ImageNet.ipynb): each class is put into each
prompt, the normalised text embeddings are averaged, and the average is normalised.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from torch.nn.functional import normalize


class Prompts(NamedTuple):
    """The classes of a task, in the order of its labels, and what is said of each."""

    names: list[str]
    templates: list[str]


CLASSES = {
    task: Prompts(**described)
    for task, described in yaml.safe_load(Path(__file__).with_name("classes.yaml").read_text("utf-8")).items()
}
TASKS = tuple(CLASSES)


@torch.no_grad()
def zero_shot_head(clip: Any, tokenizer: Any, prompts: Prompts) -> Tensor:
    """The weight of a linear head on normalised image embeddings, so that its outputs are CLIP's logits.

    Args:
        clip: a transformers ``CLIPModel``.
        tokenizer: its tokenizer.
        prompts: classes and prompts.

    Returns:
        Classes × projection dimension, in rows of the length ``exp(logit_scale)``.
    """
    rows = []
    for name in prompts.names:
        texts = [template.format(name) for template in prompts.templates]
        batch = tokenizer(texts, padding=True, return_tensors="pt").to(clip.device)
        embeddings = clip.text_projection(clip.text_model(**batch).pooler_output)
        rows.append(normalize(normalize(embeddings, dim=-1).mean(dim=0), dim=0))
    head: Tensor = torch.stack(rows) * clip.logit_scale.exp()
    return head


def class_numbers(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """The number that each class of a data set has in the head.

    Args:
        names: of the data set's classes, in the order of its labels.
        known: of the head's classes, in the order of its outputs.

    Returns:
        Label -> output. Where the data set has the same names in another order, it is they that count, not the labels;
        where it has names of its own, its labels have to be in the order of the head.

    Raises:
        ValueError: if classes are too many or too few, or the names that both have are in different places.

    Example::

        >>> class_numbers(["/l/lake_natural", "/a/abbey"], ["abbey", "lake natural"])
        [1, 0]
        >>> class_numbers(["AnnualCrop", "Forest"], ["annual crop land", "forest"])
        [0, 1]
    """
    theirs, ours = [_plain(name) for name in names], [_plain(name) for name in known]
    if sorted(theirs) == sorted(ours):
        return [ours.index(name) for name in theirs]
    moved = [name for name, place in zip(names, theirs) if place in ours and ours.index(place) != theirs.index(place)]
    if len(theirs) != len(ours) or moved:
        why = f"{len(ours)}, not {len(theirs)}, classes" if len(theirs) != len(ours) else f"{moved[0]!r} elsewhere"
        raise ValueError(f"the classes are not those of the head, which has {why}")
    return list(range(len(ours)))


def _plain(name: str) -> str:
    """A name without what data sets differ in: ``/a/apartment_building/outdoor``, ``apartment building outdoor``."""
    return " ".join(re.findall(r"[a-z0-9.]+", re.sub(r"^/\w/", "", name.lower())))
