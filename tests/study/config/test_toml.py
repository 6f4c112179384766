import json
import os
from pathlib import Path

import pytest

from core.config import fields_of
from study.config.errors import ConfigError
from study.config.load import load_config
from study.config.study_config import SECTIONS, StudyConfig
from study.config.toml import config_text

OVERRIDES = [
    "space.ema_decay=['none', 0.99]",
    "space.epochs={low=20, high=30}",
    "train.warmup_epochs=15",  # too many for the default number of epochs
    "train.clip_norm=1.0",
    "train.views=none",
    "cache=1GB",
    "recipes=false",
    "study.time=90m",
    "name='other \u00fc'",
    "study.output='a \"b\" \\'",
    "ablation.factors={'large rates' = {fast = {base_lr = 1e-6, nesterov = true}}}",
]


def test_a_configuration_reads_back_from_its_text_and_its_record(tmp_path: Path) -> None:
    config = load_config(overrides=OVERRIDES)
    path = tmp_path / "study.toml"
    for with_help in (True, False):
        path.write_text(config_text(config, with_help=with_help), encoding="utf-8")
        assert load_config(path) == config
    record = json.loads(json.dumps(config.to_record()))
    assert StudyConfig.from_record(record) == config
    assert "base_lr" not in record["train"]  # which is searched


def test_template_gives_each_key_its_meaning() -> None:
    text = config_text(load_config(flags={"data.source": "my/photos"}), with_help=True)
    assert 'source = "folder:my/photos"' in text
    assert "# base_lr is searched: see [space]." in text
    for section in SECTIONS.values():
        for key, field in fields_of(section).items():
            first_words = " ".join((field.description or "").split()[:4])
            assert first_words and f"# {first_words}" in text, key
    assert max(map(len, text.splitlines())) < 120


def test_template_for_other_data_is_not_named_after_the_old(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    text = config_text(load_config(), with_help=True)
    path.write_text(text.replace('"digits"', '"photos"'), encoding="utf-8")
    assert load_config(path).study.name == "photos"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = " + b"[" * 5000, "nested too deep"),
        (b"a = " + b"9" * 5000, "must be TOML, but exceeds the limit"),
        (b"\x80\x00\xff", "must be TOML, but 'utf-8' codec"),
        (b"#" * (2**20 + 1), "must be a file, of at most 1048576 bytes"),
        (None, "must be a file"),
    ],
)
def test_what_is_no_configuration_is_refused(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "study.toml"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    for wrong in (path, tmp_path) if content is None else (path,):
        with pytest.raises(ConfigError, match=message):
            load_config(wrong)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_bytes(b"\xef\xbb\xbf[study]\ntrials = 7\n")
    assert load_config(tmp_path / "study.toml").study.trials == 7
