"""A model from a sample of many images, before all of them are decoded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.config import MAX_FREEZE_DEPTH
from core.data.sources import DataError, find_images
from core.data.splits import load_data
from core.fit import fit
from core.metrics import Interrupted
from core.model import save_model
from core.models.builder import input_of
from core.training.checkpoint import remove_checkpoint
from study.config.search_space import apply_params, default_params
from study.config.study_config import StudyConfig
from study.execution.progress import Note, Progress
from study.execution.session import stored_side
from study.record.models import MODEL_FOLDER

# Decoding so many images and sending them through a network takes a quarter of a minute on two
# cores; all of more than three times as many would leave the first minute without a model. Both
# are in proportion where a study has less than a minute.
_SAMPLE, _MANY = 1_000, 3_000


def take_first_look(
    config: StudyConfig, output: Path, progress: Progress, should_stop: Callable[[], bool]
) -> None:
    """Where there are many images, solve a head on a sample of them and keep it as the model.

    The first trial's model takes its place. It does not touch the test split.
    """
    space = config.space
    params = default_params(space)
    params |= {name: space[name].ends[0] for name in ("backbone", "weights") if name in space}
    if depth := space.get("freeze_depth"):
        params["freeze_depth"] = depth.nearest(MAX_FREEZE_DEPTH)
    train = apply_params(config.train, params)
    minutes = min(1.0, (config.study.seconds or 60.0) / 60)
    if not train.is_solved:
        return
    found, most = find_images(config.data), int(minutes * _SAMPLE)
    # A sample has two images of each class at least, to train on and to judge by.
    if len(found.images) <= minutes * _MANY or 4 * len(found.classes) > most:
        return

    def look(done: int, total: int) -> None:
        if should_stop():
            raise Interrupted

    shown = input_of(train.backbone, train.weights, train.image_size)
    checkpoint = output / "first-look"
    try:
        data = load_data(config.data, stored_side([train]), look, [shown], most=most)
        (metrics,) = fit(train, data, checkpoint_dir=checkpoint, should_stop=should_stop)
        n = len(data.train) + len(data.val)
        facts: dict[str, Any] = {
            "study": config.study.name,
            "trials": [],
            "score": metrics.score,
            "val_acc": metrics.val_acc,
            "n_images": n,
        }
        save_model(output / MODEL_FOLDER, [(checkpoint, 1.0, 1.0)], facts)
    except (Interrupted, DataError):  # what is wrong with all images is said of all
        return
    finally:
        remove_checkpoint(checkpoint)
    progress.emit(Note(f"A first model, from {n} of the images, is in {output / MODEL_FOLDER}."))
