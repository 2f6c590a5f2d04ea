from __future__ import annotations

from pathlib import Path

import pytest

from shared.config import Strict, UserError, data_root, load_params, repo_root


class Network(Strict):
    width: int
    modes: int = 8


class Params(Strict):
    epochs: int
    network: Network


GOOD = "profile: small\nsmall:\n  epochs: 3\n  network: {width: 4}\nlarge:\n  epochs: 30\n  network: {width: 16}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return path


def test_the_chosen_profile_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_params(path, Params) == ("small", Params(epochs=3, network=Network(width=4)))
    assert load_params(path, Params, profile="large")[1].network.width == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("width: 16", "widht: 16"), r"section 'large'(.|\n)*network\.widht: unknown key.*modes, width"),
        (GOOD.replace("epochs: 30", "epochs: many"), r"section 'large'(.|\n)*epochs: .*integer.*'many'"),
        (GOOD.replace("profile: small", "profile: smal"), "no profile 'smal'; choose one of small, large"),
        ("small: {epochs: 1}", "must be 'profile: <name>'"),
        ("profile: [", "not valid YAML"),
    ],
)
def test_a_mistake_names_file_section_key_and_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_params(write(tmp_path, text), Params)
    assert "params.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params\.yaml is missing"):
        load_params(tmp_path / "params.yaml", Params)


def test_the_data_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.delenv("REPRISE_DATA")
    assert data_root() == repo_root() / "data"


def test_the_root_is_found_from_inside_a_checkout(tmp_path: Path, root: Path) -> None:
    (tmp_path / "papers" / "mine").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    assert repo_root(tmp_path / "papers" / "mine") == tmp_path
    assert repo_root(root / "papers") == root
