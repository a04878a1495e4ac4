"""Configurations that are found by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from com_lightning.errors import MergeError
from com_lightning.overlays import FOLDER, config_path, overlays

CONFIGS = Path(__file__).parents[2] / "configs"


def test_names_are_those_of_the_folder_and_say_what_they_choose() -> None:
    found = overlays()
    assert set(found) == {path.stem for path in CONFIGS.glob("*.yaml")}
    assert all(15 < len(about) < 130 and about[0].isupper() and not about.endswith(".") for about in found.values())
    assert all((FOLDER / f"{name}.yaml").read_text() == (CONFIGS / f"{name}.yaml").read_text() for name in found)


@pytest.mark.parametrize("given", ["{method: com_lightning.TIES}", "method: TIES", "s3://there/a.yaml", ""])
def test_what_is_no_path_stays(given: str) -> None:
    assert config_path(given) == given


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("acurate", "there is no file acurate; did you mean the configuration 'accurate'.$"),
        ("configs/accurate.yaml", "no file configs/accurate.yaml; did you mean the configuration 'accurate'?"),
        ("qq.yaml", "no file qq.yaml; configurations with a name are accurate, actmat, .*, wudi$"),
        ("digits/tasks", "there is no file digits/tasks$"),
        ("/tasks", "there is no file /tasks$"),
        (".", ". is a folder, not a file; configurations"),
    ],
)
def test_an_unknown_name_is_an_error_that_says_what_there_is(
    given: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MergeError, match=told):
        config_path(given)
