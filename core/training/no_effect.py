"""Settings that change nothing, given the others of a configuration."""

from core.config import MAX_FREEZE_DEPTH, TrainConfig, fields_of

_OF_NETWORK = ("backbone", "weights", "image_size", "normalize", "freeze_depth", "amp")
_OF_SOLVED_HEAD = ("train_fraction", "head_solver", "features", "mirrored", "head_decay")


def without_effect(config: TrainConfig) -> set[str]:
    """Return the settings that change no trained weight here.

    What depends on the network (batch norms, where it has none) is not among them.
    """
    if config.is_solved:
        # Without pretrained weights the seed still draws the frozen ones.
        seed = ("seed",) if config.weights == "none" else ()
        return fields_of(TrainConfig).keys() - {*_OF_NETWORK, *_OF_SOLVED_HEAD, *seed}
    is_head_alone = config.freeze_depth == MAX_FREEZE_DEPTH
    keeps_no_rows = config.freeze_depth == 0 or bool(config.mixup or config.cutmix)
    is_each_view_new = config.views is not None and config.views >= config.epochs
    is_without_effect = {
        ("device", "workers", "monitor", "features"): True,
        ("head_solver",): not is_head_alone,
        ("head_init",): config.head_init == "source-classes" and config.weights == "none",
        ("head_decay",): config.head_init != "solved",
        ("step_epochs", "step_gamma"): config.schedule != "step",
        ("warmup_epochs",): config.schedule == "one-cycle",
        ("decay_all",): config.weight_decay == 0,
        ("nesterov",): config.optimizer != "sgd",
        ("crop_scale", "flip"): config.augment == "none",
        ("views",): config.augment == "none" or keeps_no_rows or is_each_view_new,
        ("rand_magnitude",): config.augment != "rand",
        ("batch_norm",): is_head_alone,
    }
    return {name for names, holds in is_without_effect.items() if holds for name in names}
