import dataclasses
import json

from core.config import TrainConfig
from study.schema import config_schema


def test_the_schema_describes_every_key() -> None:
    schema = config_schema()
    json.dumps(schema)
    sections = schema["properties"]
    assert set(sections) == {"study", "data", "train", "search", "ablation", "space"}
    for name in ("study", "data", "train", "search", "ablation"):
        assert sections[name]["additionalProperties"] is False
        for key, value in sections[name]["properties"].items():
            assert value["description"], key


def test_the_schema_holds_ranges_and_choices() -> None:
    train = config_schema()["properties"]["train"]["properties"]
    assert train["epochs"] == {
        "default": 10,
        "description": "Passes over the training pictures.",
        "minimum": 1,
        "title": "Epochs",
        "type": "integer",
    }
    assert train["optimizer"]["enum"] == ["sgd", "adamw"]


def test_every_training_key_can_be_a_dimension_in_the_schema() -> None:
    space = config_schema()["properties"]["space"]["properties"]
    assert list(space) == [item.name for item in dataclasses.fields(TrainConfig)]
    tables = [kind for kind in space["base_lr"]["anyOf"] if kind.get("type") == "object"]
    assert [table["required"] for table in tables] == [["choices"], ["low", "high"]]
    assert len(space["backbone"]["anyOf"]) == 3
