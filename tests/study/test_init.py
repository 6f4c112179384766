from pathlib import Path

import pytest

from study.config import ConfigError, load_config
from study.init import config_text, template, toml_value, write_new

OVERRIDES = [
    "space.ema_decay=['none', 0.99]",
    "train.clip_norm=1.0",
    "recipes=['linear-probe']",
    "timeout=90m",
    "name='other \u00fc'",
]


@pytest.mark.parametrize("with_help", [True, False])
def test_a_written_configuration_reads_back_to_the_same(with_help: bool, tmp_path: Path) -> None:
    config = load_config(overrides=OVERRIDES)
    path = tmp_path / "study.toml"
    path.write_text(config_text(config, with_help=with_help), encoding="utf-8")
    assert load_config(path) == config


def test_the_template_says_what_each_key_means(tmp_path: Path) -> None:
    text = template(load_config(flags={"data.source": "my/photos"}))
    assert 'source = "folder:my/photos"' in text
    assert "# Finished trials that the study shall have in total.\ntrials = 20\n" in text
    assert "# base_lr is searched: see [space]." in text
    assert max(map(len, text.splitlines())) < 120


def test_a_template_for_other_data_is_not_named_after_the_old(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(template(load_config()).replace('"digits"', '"photos"'), encoding="utf-8")
    assert load_config(path).study.name == "photos"


def test_a_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    write_new(path, "a", may_replace=False)
    with pytest.raises(ConfigError, match=r"there is such a file already; --force replaces it"):
        write_new(path, "b", may_replace=False)
    write_new(path, "b", may_replace=True)
    assert path.read_text() == "b"


def test_an_unwritable_place_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written: No such file or directory"):
        write_new(tmp_path / "no" / "study.toml", "a", may_replace=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-6, "1e-06"),
        (True, "true"),
        (None, '"none"'),
        ('a "b" \\ \n', '"a \\"b\\" \\\\ \\n"'),
        ([1, "x"], '[1, "x"]'),
        ({"low": 0, "log": True}, "{low = 0, log = true}"),
    ],
)
def test_values_are_written_as_toml_writes_them(value: object, text: str) -> None:
    assert toml_value(value) == text
