"""Settings that change nothing beside the others of a configuration, each with the reason."""

from core.config import MAX_FREEZE_DEPTH, TrainConfig, fields_of

NEVER = {
    "device": "it says where the run is computed",
    "workers": "it says how many processes make views",
    "monitor": "it chooses among epochs, and changes no step of them",
}
"""Settings that change no trained weight by themselves, whatever the others are."""


_NETWORK = ("backbone", "weights", "image_size", "normalize", "freeze_depth", "amp")


def without_effect(config: TrainConfig) -> dict[str, str]:
    """Return the settings that change no trained weight here, with the reason.

    What depends on the network (batch norms, where it has none) is not among them.
    """
    found = dict(NEVER)
    if config.is_solved:
        # Without pretrained weights the seed still draws the frozen ones.
        kept = {*_NETWORK, "head_solver", "features", "mirrored", "head_decay", *found}
        kept |= {"seed"} if config.weights == "none" else set()
        others = sorted(set(fields_of(TrainConfig)) - kept)
        return found | dict.fromkeys(others, "the head is solved")
    found["features"] = "the head is not solved"
    if config.freeze_depth != MAX_FREEZE_DEPTH:
        found["head_solver"] = "more than the head is trained"
    if config.head_init != "solved":
        found["head_decay"] = "the head neither is solved nor starts so"
    if config.schedule != "step":
        found |= dict.fromkeys(("step_epochs", "step_gamma"), "schedule is not step")
    if config.schedule == "one-cycle":
        found["warmup_epochs"] = "schedule = one-cycle has a warm-up of its own"
    if config.weight_decay == 0:
        found["decay_all"] = "weight_decay is 0"
    if config.augment == "none":
        found |= dict.fromkeys(("crop_scale", "flip", "views"), "augment is none")
    if config.views is not None and config.views >= config.epochs:
        found["views"] = "every epoch has its own"
    if config.freeze_depth == 0 or config.mixup or config.cutmix:
        found["views"] = "no outputs of frozen layers are kept"
    if config.augment != "rand":
        found["rand_magnitude"] = "augment is not rand"
    if config.optimizer != "sgd":
        found["nesterov"] = "optimizer is not sgd"
    if config.freeze_depth == MAX_FREEZE_DEPTH:
        found["batch_norm"] = "no batch norm is trained where the head alone is"
    if config.head_init == "source-classes" and config.weights == "none":
        found["head_init"] = "there is no source classifier; it starts as default"
    return found
