"""What to train next for the best model in the time that is left.

Solved heads come first, the cheapest network's before all others, then heads on larger images
where there are some. Thawing the last layers is tried next, where it is cheapest, and continued,
to more layers and to other networks, only where it scored higher than the head that it starts
from. What is left of the time is for variants of the heads, and for the sampler.
"""

import itertools
import math
import operator
import statistics
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from core.config import MAX_FREEZE_DEPTH, TrainConfig
from study.config.search_space import ParamValue, Space, apply_params, default_params
from study.record.models import COPY, Trial

Params = dict[str, ParamValue]
_Network = tuple[ParamValue, ...]
_Wanted = tuple[Params, str, bool] | None
"""Settings, why, and whether the sampler chooses rates and decay; None where less is promised."""

# A trial may take this share of what is left: one that disappoints leaves enough for others.
_LARGEST_SHARE = 1 / 4
# Heads may take this: their time is foreseen well, and each new backbone's raised every score
# measured.
_LARGEST_SHARE_OF_HEAD = 0.8
# A trial that takes no more than this share of the whole time may take so much of what is left,
# for at the end nothing would be short enough.
_SHORT, _LARGEST_SHARE_OF_SHORT = 1 / 8, 1 / 2
# Where nothing else fits but what promises less, a trial may take so much: time that is left over
# is lost. Assumption.
LARGEST_SHARE_OF_LAST = 0.6
# A step of the last layers costs so many passes of the frozen network, whose norms are folded. On
# EfficientNet-Lite0 and 1, levels 3 and 4, it took 1.7 to 2.9 (254 and 384 images, two cores). A
# step of all layers took 5.6 there; it is measured once more than the last layers are trained, by
# their share of the forward pass.
_PASSES_OF_LAST_STEP, _LAST_LAYERS = 2.5, 0.3
# Seconds of a solver for a row, a feature and a class; measured 2.8 s for 2,000 x 1,280 x 10.
_SOLVER_S = 1.1e-7
# Trained weights per second that a checkpoint and an epoch's bookkeeping take. Assumption.
_OVERHEAD_S = 1.0
_LEAST_PACE = 0.6  # Faster trials shorten forecasts to this share at most. Assumption.
_MOST_SAMPLED = 4  # trials of the sampler in a row that were no better: nothing promises more
_MOST_PREVIEWED = 30
_RATES = {4: 1e-3, 3: 3e-4}
"""Base learning rate by freeze level. 1e-3 at level 4 gained in 47 seconds what 3e-4 at level 3
gained in 200 (flowers5, EfficientNet-Lite0); level 3 broke at higher rates now and then."""
_RATE_BELOW = 2e-4


@dataclass(frozen=True, slots=True)
class NetworkCost:
    """What a network costs.

    Attributes:
        forward_s: Seconds per image of a forward pass.
        frozen: Share of it that is frozen, by freeze level.
        kept: Whether outputs of the frozen layers are kept, by freeze level.
        n_features: Of a solved head.
        weights_bytes: Size of a checkpoint.
        step_passes: Gives the forward passes that a training step of all layers takes, and may
            measure them for it; one of fewer layers takes less, in proportion.
    """

    forward_s: float
    frozen: tuple[float, ...]
    kept: tuple[bool, ...]
    n_features: int
    weights_bytes: int = 0
    step_passes: Callable[[], float] = lambda: _PASSES_OF_LAST_STEP

    def seconds(
        self,
        train: TrainConfig,
        n_train: int,
        n_val: int,
        n_classes: int,
        *,
        has_arrays: bool = False,
    ) -> float:
        """Forecast a trial's seconds; with `has_arrays` its frozen layers' outputs are kept."""
        n = n_train + n_val
        is_several = train.is_solved and train.features == "several"
        solver_s = _SOLVER_S * n * n_classes * self.n_features / (1 if is_several else 2)
        if train.is_solved:
            return (0.0 if has_arrays else n * self.forward_s) + solver_s + _OVERHEAD_S
        frozen = self.frozen[train.freeze_depth]
        trained = 1 - frozen
        step = _PASSES_OF_LAST_STEP
        if trained > _LAST_LAYERS:
            step += (self.step_passes() - _PASSES_OF_LAST_STEP) * trained
        if self.kept[train.freeze_depth]:
            views = 0 if has_arrays else min(train.epochs, train.views or train.epochs)
            passes = views * frozen + train.epochs * step * trained
            evaluations = (0 if has_arrays else frozen) + train.epochs * trained
        else:
            passes = train.epochs * (frozen + step * trained)
            evaluations = float(train.epochs)
        images = passes * n_train + evaluations * n_val
        start_s = solver_s if train.head_init == "solved" else 0.0
        return images * self.forward_s + start_s + _OVERHEAD_S * (1 + train.epochs / 10)


@dataclass(frozen=True, slots=True)
class Step:
    """A trial to run next.

    Attributes:
        params: A value for every dimension.
        forecast_s: Seconds that it will take.
        reason: Why, in a few words.
        is_sampled: The sampler chooses rates and decay.
    """

    params: Params
    forecast_s: float
    reason: str
    is_sampled: bool = False


class Planner:
    """Chooses trials from a study's rows and the time that is left, and from nothing else.

    Args:
        base: Settings of keys that are not searched.
        costs: By the values of the dimensions that make a network; see `networks`.
        run_id: The run that the costs were measured in. Its trials' seconds correct forecasts;
            those of earlier runs do not, since the machine may have been busier then.
        has_shared: Whether trials find the arrays that others made.

    Attributes:
        left_out: What did not fit into the time, when `next` was asked last; the best first.
    """

    def __init__(
        self,
        space: Space,
        base: TrainConfig,
        costs: Mapping[_Network, NetworkCost],
        n_train: int,
        n_val: int,
        n_classes: int,
        run_id: int = 0,
        *,
        has_shared: bool = True,
    ) -> None:
        self._space, self._base, self._run_id = space, base, run_id
        self._has_shared = has_shared
        self.left_out: list[Step] = []
        self._counts = n_train, n_val, n_classes
        self._costs = dict(sorted(costs.items(), key=lambda item: item[1].forward_s))
        self._depths = freeze_depths(space, base)

    def next(
        self,
        rows: Sequence[Trial],
        left_s: float | None,
        total_s: float | None,
        refits_s: float = 0.0,
    ) -> Step | str:
        """Return the next trial, or why there is none.

        That is `no time` where those that may gain do not fit into it, else `no gain`. The time
        is what is left, and that of the whole run; None for no limit. Of what is left, so much is
        for refits, unless a trial other than variants of the heads and the sampler's needs it.
        """
        whole_s = left_s
        left_s = None if left_s is None else left_s - refits_s
        pace, made = self._pace(rows)
        self.left_out = []
        for wanted in self._wanted(rows):
            if wanted is None:
                if fitting := _first_fitting(self.left_out, whole_s):
                    return fitting
                continue
            params, reason, is_sampled = wanted
            if not is_sampled and self._find(rows, params):
                continue
            config = apply_params(self._base, params)
            own_pace = pace.get(config.is_solved, pace.get(True, 1.0))
            forecast = own_pace * self._seconds(config, made)
            is_head = config.freeze_depth == MAX_FREEZE_DEPTH
            is_short = total_s is not None and forecast <= _SHORT * total_s
            share = _LARGEST_SHARE_OF_SHORT if is_short else _LARGEST_SHARE
            share = _LARGEST_SHARE_OF_HEAD if is_head else share
            if left_s is None or not rows or forecast <= share * left_s:
                return Step(params, forecast, reason, is_sampled)
            self.left_out.append(Step(params, forecast, reason, is_sampled))
        why = "no time" if self.left_out else "no gain"
        return _first_fitting(self.left_out, left_s) or why

    def preview(self, total_s: float | None) -> list[Step]:
        """Return the trials of a study in which every thawed level gains: the longest course."""
        found: list[Step] = []
        rows: list[Trial] = []
        left = total_s
        while len(found) < _MOST_PREVIEWED and isinstance(
            step := self.next(rows, left, total_s), Step
        ):
            found.append(step)
            config = apply_params(self._base, step.params)
            row = stand_in(len(rows), config, step.params, "complete")
            row.origin, row.duration_s = SAMPLED if step.is_sampled else "", step.forecast_s
            row.score = 0.5 if config.is_solved else 0.9 - config.freeze_depth / 100
            rows.append(row)
            left = left and left - step.forecast_s
        return found

    def _seconds(self, train: TrainConfig, made: Set[Hashable]) -> float:
        """Forecast a trial's seconds where these arrays are made."""
        cost = self._costs[self.network_of(train)]
        return cost.seconds(train, *self._counts, has_arrays=self._arrays_of(train) in made)

    def _arrays_of(self, train: TrainConfig) -> Hashable:
        """Return what decides the outputs of a trial's frozen layers."""
        if train.is_solved:
            return (*self.network_of(train), train.mirrored)
        return tuple(value for key, value in asdict(train).items() if key not in RATES)

    def forward_s(self, row: Trial) -> float:
        """Return the seconds per image of what a trial trained."""
        config = TrainConfig(**row.config)
        n_passes = 2 if config.is_solved and config.mirrored else 1
        return n_passes * self._costs[self.network_of(config)].forward_s

    def network_of(self, train: TrainConfig) -> _Network:
        """Return the values of the dimensions that make a network."""
        return tuple(getattr(train, name) for name in network_keys(self._space))

    def _pace(self, rows: Sequence[Trial]) -> tuple[dict[bool, float], Set[Hashable]]:
        """Return how much longer trials take here than forecast, and the arrays that they made.

        The pace of solved heads is at True, that of trained networks at False; a kind without
        trials is missing. It is that of the slower half: others may have found another study's
        arrays.
        """
        made, ratios = set[Hashable](), dict[bool, list[float]]()
        for row in rows:
            train, is_here = TrainConfig(**row.config), row.run_id == self._run_id
            known = is_here and self.network_of(train) in self._costs
            if row.state == "complete" and known and row.duration_s:
                ratio = row.duration_s / self._seconds(train, made)
                ratios.setdefault(train.is_solved, []).append(ratio)
            if row.state != "failed" and self._has_shared:
                made.add(self._arrays_of(train))
        slow = {kind: statistics.median(sorted(r)[len(r) // 2 :]) for kind, r in ratios.items()}
        return {kind: max(_LEAST_PACE, pace) for kind, pace in slow.items()}, made

    def _wanted(self, rows: Sequence[Trial]) -> Generator[_Wanted, None, None]:
        """List what may gain, the best for its seconds first; tried settings are among it."""
        small = [network for network in self._costs if network == self._first_size(network)]
        large = [network for network in self._costs if network not in small]
        heads = yield from self._heads(rows, small, "solved head")
        for network in large:  # the cheapest network shows whether larger images gain
            heads |= yield from self._heads(rows, [network], "solved head, larger images")
            if heads.get(network, 0.0) < heads.get(self._first_size(network), 0.0):
                break
        levels = sorted(self._depths - {MAX_FREEZE_DEPTH}, reverse=True)
        gained: list[tuple[float, _Network, int]] = []
        for network in small:
            # The cheapest network shows whether thawing gains, and how much of it is to be thawed.
            own = levels if network == small[0] else [gained[0][2]]
            gained += yield from self._thaw(rows, network, own, heads.get(network, -math.inf))
            if not gained:
                break
        better = [n for n in large if heads.get(n, -1.0) >= heads.get(self._first_size(n), 0.0)]
        for network in better if gained else ():
            own = [max(gained, key=_first)[2]]
            gained += yield from self._thaw(rows, network, own, heads.get(network, -math.inf))
        # Mirroring three networks' heads changed their mean by -0.1 to 0.1 points (20 cases).
        yield None
        for key, value, reason in (
            ("mirrored", True, "solved head, mirrored"),
            ("features", "last", "solved head, last layer"),
        ):
            if gained and key == "mirrored":  # the time is better spent on refits
                continue
            if key in self._space and self._space[key].nearest(value) == value:
                yield from self._heads(rows, [*small, *better], reason, {key: value})
        drawn = itertools.dropwhile(lambda row: row.origin != SAMPLED, rows)
        sampled = [row for row in drawn if row.origin.startswith((SAMPLED, COPY))][-_MOST_SAMPLED:]
        before = max((self._score(row) for row in rows if row not in sampled), default=-math.inf)
        is_stale = len(sampled) == _MOST_SAMPLED and all(
            self._score(row) <= before for row in sampled
        )
        free = [name for name, dim in self._space.items() if name in RATES and len(dim.ends) > 1]
        if gained and free and not is_stale:
            _, network, level = max(gained, key=_first)
            yield self._params(network, level), "learning rates drawn", True

    def _first_size(self, network: _Network) -> _Network:
        """Return a network at the first image size of the space."""
        named = dict(zip(network_keys(self._space), network, strict=True))
        if "image_size" in named:
            named["image_size"] = self._space["image_size"].ends[0]
        return tuple(named.values())

    def _heads(
        self,
        rows: Sequence[Trial],
        networks: Sequence[_Network],
        reason: str,
        changes: Params | None = None,
    ) -> Generator[_Wanted, None, dict[_Network, float]]:
        """List the solved heads of some networks; return the scores of those that there are."""
        found = {}
        for network in networks if MAX_FREEZE_DEPTH in self._depths else ():
            params = self._params(network, MAX_FREEZE_DEPTH) | (changes or {})
            yield params, reason, False
            if row := self._find(rows, params):
                found[network] = self._score(row)
        return found

    def _thaw(
        self,
        rows: Sequence[Trial],
        network: _Network,
        levels: Sequence[int],
        start: float,
    ) -> Generator[_Wanted, None, list[tuple[float, _Network, int]]]:
        """List trials that thaw a network, ever more of it while that scores above its head.

        It continues below that, too, as long as it rises: images unlike those of the source want
        most of the network thawed (digits: levels 4 and 3 score below the head's 94 %, deeper ones
        reach 99 %). Two levels in a row that score lower than the one before end it, too. One is
        not enough: on flowers5 level 3 scored below level 4, and level 2 above both.

        Returns:
            The highest score, the network and the level, if that is above its head's score.
        """
        found: list[tuple[float, _Network, int]] = []
        for level in levels:
            row = None
            for rate in (_RATES.get(level, _RATE_BELOW), _RATES.get(level, _RATE_BELOW) / 3):
                params = self._params(network, level, rate)
                last = self._params(network, MAX_FREEZE_DEPTH) | {"features": "last"}
                if "features" in self._space and apply_params(self._base, last).is_solved:
                    yield last, "solved head to thaw from", False  # to be compared with
                share = 1 - self._costs[network].frozen[level]
                yield params, f"last {share:.0%} thawed" if level else "all thawed", False
                row = self._find(rows, params)
                if row is None or row.state == "complete":
                    break
            if row is None:  # it does not fit into the time
                break
            found.append((self._score(row), network, level))
            ends = [score for score, *_ in found[-3:]]
            is_falling = len(ends) == 3 and ends[2] <= ends[1] <= ends[0]
            if is_falling or (len(found) > 1 and ends[-1] <= min(start, ends[-2])):
                break
        best = max(found, key=_first, default=None)
        return [best] if best and best[0] > start else []

    def _params(self, network: _Network, level: int, rate: float = _RATE_BELOW) -> Params:
        """Return a point of the space: a network, thawed from a level on by a known recipe."""
        wanted: dict[str, Any] = dict(zip(network_keys(self._space), network, strict=True))
        wanted |= {
            "freeze_depth": level,
            "base_lr": rate,
            "features": "several",
            "mirrored": False,
        }
        known = {n: d.nearest(wanted[n]) for n, d in self._space.items() if n in wanted}
        return default_params(self._space) | known

    def _find(self, rows: Sequence[Trial], params: Params) -> Trial | None:
        """Return the trial of these settings, if there is one."""
        config = apply_params(self._base, params)
        same = [row for row in rows if row.origin != SAMPLED and row.params == params]
        if not same and config.is_solved:  # rates say nothing about a solved head
            keys = (*network_keys(self._space), "freeze_depth", "features", "mirrored")
            wanted = {key: getattr(config, key) for key in keys}
            same = [r for r in rows if {key: r.config[key] for key in keys} == wanted]
        return same[0] if same else None

    @staticmethod
    def _score(row: Trial) -> float:
        return -math.inf if row.state != "complete" or row.ranked_by is None else row.ranked_by


_first = operator.itemgetter(0)
SAMPLED = "sampler"
"""Origin of a trial whose settings the sampler drew."""
RATES = ("base_lr", "head_lr_mult", "weight_decay")
"""Keys that the sampler chooses once everything else is planned."""


def _first_fitting(unfit: Sequence[Step], left_s: float | None) -> Step | None:
    """Return the first trial that may run where nothing else fits."""
    return next(
        (s for s in unfit if left_s and s.forecast_s <= LARGEST_SHARE_OF_LAST * left_s), None
    )


def stand_in(
    number: int, config: TrainConfig, params: Mapping[str, ParamValue], state: str
) -> Trial:
    """Return the row of a trial that is in no record."""
    row = Trial(
        study_id=0,
        number=number,
        run_id=0,
        origin="",
        config=asdict(config),
        config_hash="",
        device="",
    )
    row.params, row.state = dict(params), state
    return row


def freeze_depths(space: Space, base: TrainConfig) -> set[int]:
    """Return the freeze levels of a space."""
    depth = space.get("freeze_depth")
    found = {d for d in range(MAX_FREEZE_DEPTH + 1) if depth and depth.nearest(d) == d}
    return found or {base.freeze_depth}


def network_keys(space: Space) -> tuple[str, ...]:
    """Return the dimensions whose values make another network."""
    return tuple(name for name in ("backbone", "weights", "image_size") if name in space)


def networks(space: Space, base: TrainConfig) -> dict[_Network, TrainConfig]:
    """Return every network of a space, with the settings that build it."""
    keys = network_keys(space)
    points = itertools.product(*(space[key].ends for key in keys))
    return {point: apply_params(base, dict(zip(keys, point, strict=True))) for point in points}
