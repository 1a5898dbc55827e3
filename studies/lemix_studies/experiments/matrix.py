"""Which points each study has: the paper's scripts, with the seeds, rates and policies that the user chose.

With `--quick` a study has the ends and the middle of its lines, one seed, and fewer items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from lemix_common.errors import BadInput
from lemix_studies.experiments.settings import OURS, POLICIES, PREFERENCES, Setting, Variant

GPTS: Final = ("dialogpt-small", "dialogpt-medium", "dialogpt-large")
LLAMAS: Final = ("llama-2-7b", "llama-2-13b", "llama-2-70b")
RATES: Final = tuple(range(4, 33, 4))
TRAINING_RATES: Final = (0.1, 0.3, 0.5, 0.7, 0.9)
SIGMAS: Final = (200, 175, 150, 125, 100, 75, 50, 25, 10)
WEIGHTS: Final = (0.01, 0.05, 0.1, 0.15, 0.2, 0.5, 1.0)
SATURATION: Final = (0.5, 1.0, 2.0)
"""Rates beyond the paper's, as parts of what the cluster could serve if it did nothing else."""
QUICK_ITEMS: Final = 120
QUICK_GENERATIONS: Final = 40
"""Each has dozens of iterations."""
ROWS_AT_ONCE: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOptions:
    """What a user may choose."""

    quick: bool = False
    seeds: tuple[int, ...] = ()
    """None: the study's own."""
    policies: tuple[str, ...] = ()
    """None: all."""
    rates: tuple[float, ...] = ()
    training_rates: tuple[float, ...] = ()
    models: tuple[str, ...] = ()
    items: int | None = None
    stage_order: Literal["fifo", "urgency"] = "fifo"
    arrivals: Literal["poisson", "all", "alternating", "trace"] | None = None
    device: str = "a100-80g"
    nodes: int | None = None
    stages: int | None = None
    saturation: Callable[[Setting], float] | None = None
    """Requests a second that a cluster could serve if it did nothing else; None: no rates beyond the paper's."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A setting, and who is to decide in it."""

    setting: Setting
    variants: tuple[Variant, ...]


def plans_of(study: str, options: StudyOptions) -> list[Plan]:
    """Every point of a study, setting by setting; `BadInput` for a study or policy that there is not."""
    if study not in STUDIES:
        raise BadInput(f"no study is called {study!r}; there are {', '.join(STUDIES)} and all")
    for name in options.policies:
        if name not in POLICIES:
            raise BadInput(f"--policies: no policy is called {name!r}; there are {', '.join(POLICIES)}")
    plans = [
        Plan(seeded, _wanted(plan.variants, options))
        for plan in STUDIES[study](options)
        for seeded in _seeded(plan.setting, options)
    ]
    return [plan for plan in plans if plan.variants]


def policy_variants(policies: Sequence[str] = POLICIES) -> tuple[Variant, ...]:
    """One of each policy, of `lemix` one a preference; it comes first, since others are kept to its nodes."""
    ours = [Variant(policy=OURS, prefer=prefer) for prefer in PREFERENCES if OURS in policies]
    return (*ours, *(Variant(policy=name) for name in policies if name != OURS))


def _wanted(variants: Sequence[Variant], options: StudyOptions) -> tuple[Variant, ...]:
    return tuple(one for one in variants if not options.policies or one.policy in options.policies)


def _seeded(setting: Setting, options: StudyOptions) -> Iterator[Setting]:
    seeds = options.seeds or ((0,) if options.quick else range(5))
    changes: dict[str, object] = {"stage_order": options.stage_order, "device": options.device}
    if options.quick:
        changes["items"] = min(setting.items, QUICK_ITEMS if setting.task == "score" else QUICK_GENERATIONS)
    chosen = {
        "items": options.items,
        "arrivals": options.arrivals,
        "nodes": options.nodes,
        "stages": options.stages,
    }
    changes |= {name: value for name, value in chosen.items() if value is not None}
    for seed in seeds:
        yield replace(setting, seed=seed, **changes)  # type: ignore[arg-type]


def _thinned(values: Sequence[float], chosen: Sequence[float], options: StudyOptions) -> list[float]:
    """Those that were chosen; else all, or when it must be quick the first, the middle one and the last."""
    if chosen:
        return list(chosen)
    if not options.quick or len(values) <= 3:
        return list(values)
    return [values[0], values[len(values) // 2], values[-1]]


def _grid(
    base: Setting,
    models: Sequence[str],
    options: StudyOptions,
    variants: Sequence[Variant],
    rates: Sequence[float] = RATES,
) -> Iterator[Plan]:
    """Models × rates × training rates."""
    training_rates = _thinned(TRAINING_RATES, options.training_rates, options)
    for model in options.models or (models[-1:] if options.quick else models):
        for rate in _thinned(rates, options.rates, options):
            for training_rate in training_rates:
                yield Plan(
                    replace(base, model=model, rate=rate, training_rate=training_rate), tuple(variants)
                )


def _main_llama(options: StudyOptions) -> Iterator[Plan]:
    base = Setting(
        study="main-llama", model="", nodes=4, stages=2, rate=1, training_rate=0,
        release="a-pp", microbatches=1, items=334,
    )  # fmt: skip
    yield from _grid(base, LLAMAS, options, policy_variants())


def _main_gpt(options: StudyOptions) -> Iterator[Plan]:
    base = Setting(
        study="main-gpt", model="", nodes=4, stages=2, rate=1, training_rate=0,
        release="a-pp", microbatches=1, items=334, rows=3,
    )  # fmt: skip
    yield from _grid(base, GPTS, options, policy_variants())


def _heterogeneity(options: StudyOptions) -> Iterator[Plan]:
    base = Setting(
        study="heterogeneity", model=GPTS[-1], nodes=4, stages=2, rate=50, training_rate=0,
        release="a-pp", microbatches=1, items=334, rows=3, length_order="bursty",
    )  # fmt: skip
    for sigma in _thinned(SIGMAS, (), options):
        yield from _grid(replace(base, sigma=sigma), GPTS[-1:], options, policy_variants(), rates=(50,))


def _ablation(options: StudyOptions) -> Iterator[Plan]:
    base = Setting(
        study="ablation", model="", nodes=4, stages=2, rate=1, training_rate=0,
        release="a-pp", microbatches=1, items=334, rows=3,
    )  # fmt: skip
    variants = [
        replace(whole, **off)  # type: ignore[arg-type]
        for whole in (Variant(policy=OURS, prefer="balanced"), Variant(policy="lemix-paper"))
        for off in ({}, {"uses_profile": False}, {"prioritises": False}, {"checks_memory": False})
    ]
    yield from _grid(base, LLAMAS[-1:], options, variants)


def _sensitivity(options: StudyOptions) -> Iterator[Plan]:
    base = Setting(
        study="sensitivity", model="", nodes=4, stages=2, rate=1, training_rate=0,
        release="a-pp", microbatches=1, items=334, rows=3,
    )  # fmt: skip
    plain = Variant(policy="lemix-paper")
    weights = [value for value in WEIGHTS if not options.quick or value in {0.01, 0.15, 1.0}]
    weighed = [
        replace(plain, **{name: value})  # type: ignore[arg-type]
        for name in ("alpha", "beta", "epsilon")
        for value in weights
    ]
    yield from _grid(base, LLAMAS[-1:], options, weighed, rates=(10, 20, 30))
    ours = (Variant(policy=OURS, prefer="balanced"), plain, Variant(policy="naive-mix"))
    one_rate = replace(options, rates=options.rates or (20,), training_rates=options.training_rates or (0.5,))
    for selection in ("random", "length", "adaptive"):
        yield from _grid(replace(base, selection=selection), LLAMAS[-1:], one_rate, ours)
    for order in ("ascending", "descending", "bursty"):
        yield from _grid(replace(base, length_order=order), LLAMAS[-1:], one_rate, ours)
    for arrivals in ("all", "alternating"):
        yield from _grid(replace(base, arrivals=arrivals), LLAMAS[-1:], one_rate, ours)


def _spp_llama(options: StudyOptions) -> Iterator[Plan]:
    base = Setting(
        study="spp-llama", model="", nodes=2, stages=4, rate=1, training_rate=0, items=334,
    )  # fmt: skip
    yield from _grid(base, LLAMAS, options, policy_variants())


def _spp_gpt(options: StudyOptions) -> Iterator[Plan]:
    base = Setting(
        study="spp-gpt", model="", nodes=4, stages=2, rate=1, training_rate=0, items=1_000, rows=3,
    )  # fmt: skip
    constant = [Variant(policy="jsq", use_nodes=number) for number in range(1, options.nodes or base.nodes)]
    for model in options.models or (GPTS[-1:] if options.quick else GPTS):
        rates = [*RATES, *_beyond(replace(base, model=model), options)]
        one_model = replace(options, models=(model,))
        yield from _grid(base, (model,), one_model, [*policy_variants(), *constant], rates)


def _beyond(base: Setting, options: StudyOptions) -> list[float]:
    if options.saturation is None:
        return []
    own = replace(
        base, device=options.device, nodes=options.nodes or base.nodes, stages=options.stages or base.stages
    )
    limit = options.saturation(own)
    return [float(f"{part * limit:.2g}") for part in SATURATION]


def _generate(study: str, models: Sequence[str]) -> Callable[[StudyOptions], Iterator[Plan]]:
    def plans(options: StudyOptions) -> Iterator[Plan]:
        one_rate = replace(options, training_rates=options.training_rates or (0.5,))
        for batch in (1, 5) if options.quick else (1, 2, 3, 4, 5):
            base = Setting(
                study=study, model="", nodes=4, stages=2, rate=1, training_rate=0, task="generate",
                items=ROWS_AT_ONCE // batch, rows=batch, decode_batch=batch,
            )  # fmt: skip
            yield from _grid(base, models, one_rate, policy_variants(), rates=RATES[1:])

    return plans


def _data_parallel(options: StudyOptions) -> Iterator[Plan]:
    base = Setting(
        study="data-parallel", model="", nodes=8, stages=1, rate=1, training_rate=0,
        microbatches=1, items=334, rows=3,
    )  # fmt: skip
    yield from _grid(base, GPTS, options, policy_variants())


def _motivation(options: StudyOptions) -> Iterator[Plan]:
    base = Setting(
        study="motivation", model="", nodes=4, stages=2, rate=1, training_rate=0,
        release="a-pp", microbatches=1, items=334, arrivals="alternating",
    )  # fmt: skip
    variants = (
        *(Variant(policy="separate", split=part) for part in (0.5, 0.7)),
        *(Variant(policy=name) for name in ("separate-dynamic", "naive-mix")),
        *(Variant(policy=OURS, prefer=prefer) for prefer in PREFERENCES),
    )
    one = replace(options, training_rates=options.training_rates or (0.5,))
    yield from _grid(base, LLAMAS[:1], one, variants, rates=(15, 60, 240))


STUDIES: Final[Mapping[str, Callable[[StudyOptions], Iterator[Plan]]]] = {
    "main-llama": _main_llama,
    "main-gpt": _main_gpt,
    "heterogeneity": _heterogeneity,
    "ablation": _ablation,
    "sensitivity": _sensitivity,
    "spp-llama": _spp_llama,
    "spp-gpt": _spp_gpt,
    "generate-llama": _generate("generate-llama", LLAMAS),
    "generate-gpt": _generate("generate-gpt", GPTS),
    "data-parallel": _data_parallel,
    "motivation": _motivation,
}
