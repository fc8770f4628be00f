"""A run: its samples as arrays, and what they say of the blocks, with the uncertainty that its images leave.

Shape letters: N samples, C columns of a reading (L, or fewer over several blocks in a row), T sigma bins, L blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from simpletuner_layerprobe.api.options import EQUAL, WEIGHED, PlanOptions, asked_of
from simpletuner_layerprobe.errors import ConfigError, ProbeError, RunError
from simpletuner_layerprobe.readings import TOKENS

if TYPE_CHECKING:
    import numpy as np
    import pandas
    from numpy.typing import NDArray

    from simpletuner_layerprobe.analyse.ablation import Ablation
    from simpletuner_layerprobe.analyse.bootstrap import Bootstrap
    from simpletuner_layerprobe.analyse.contribution import Contribution
    from simpletuner_layerprobe.analyse.findings import Section
    from simpletuner_layerprobe.analyse.heatmap import Heatmap, PairHeatmap
    from simpletuner_layerprobe.analyse.samples import Samples
    from simpletuner_layerprobe.analyse.settled import Confidence, Decide
    from simpletuner_layerprobe.lokr.own import Own
    from simpletuner_layerprobe.run.load import RunData
    from simpletuner_layerprobe.run.manifest import Manifest
    from simpletuner_layerprobe.run.stream_file import StreamFile


@dataclass(frozen=True)
class Contributions:
    """How much each block changes the hidden states, by the article's recipe, and how sure that is.

    blocks: L paths in the model's order. values: (L,) float64 in [0, 1], 1 for the block that changes them most.
    low, high: (L,) float64, the middle 95% of the bootstrap's replicates. settled: (L,) bool, whether 95% of the
    replicates give the block the same LoKr factor. critical: numbers of the blocks that stick out far (they get factor
    1). confidence: all of what is known of it, `confidence.text()` in a line.
    """

    blocks: tuple[str, ...]
    values: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    settled: NDArray[np.bool_]
    critical: tuple[int, ...]
    confidence: Confidence


class Run:
    """The samples of a run as they were when it was loaded (`load`), also if a training goes on writing it."""

    def __init__(self, data: RunData) -> None:
        self.data = data
        self._samples: dict[str, Samples] = {}
        self._bootstraps: dict[tuple[str, int], Bootstrap] = {}
        self._ablations: dict[tuple[str, int], Ablation] = {}
        self._own: Own | None = None

    def __repr__(self) -> str:
        return f"<Run {self.path}: {self.model or 'unknown model'}, {self.counted}>"

    @property
    def path(self) -> Path:
        """The folder, or the file of records."""
        return self.data.path

    @property
    def manifest(self) -> Manifest:
        """What the run was recorded from and with which settings."""
        return self.data.manifest

    @property
    def files(self) -> tuple[StreamFile, ...]:
        """The stream files of a folder: one per start and rank."""
        return self.data.files

    @property
    def model(self) -> str:
        """SimpleTuner's names of the model, such as "sd3 large"; else its class, "" if nothing is known."""
        from simpletuner_layerprobe.show.words import model_name

        return model_name(self.manifest)

    @property
    def samples(self) -> int:
        """The number of samples N."""
        return self.data.samples

    @property
    def images(self) -> int | None:
        """How many different images the samples are of, None if that is not known of all of them."""
        return self.data.images

    @property
    def counted(self) -> str:
        """ "2,000 samples of 60 images"."""
        return self.data.counted

    @property
    def sigma(self) -> NDArray[np.float64]:
        """(N,) float64, the noise level of each sample: 0 clean .. 1 noise."""
        return self.data.sigma

    @property
    def facts(self) -> dict[str, NDArray[Any]]:
        """What is known of each sample: name -> (N,).

        image: uint64, a number for each image, 0 if unknown. repeat: how often it came before. caption_words,
        caption_characters, text_tokens: of the caption that the model got, -1 if unknown. width, height: pixels, 0 if
        unknown. crop_top, crop_left: -1 if unknown. dropped: 1 if the caption was dropped, -1 if unknown. backend:
        strings, "" if unknown. loss: float32, NaN if unknown.
        """
        return {**self.data.facts, "loss": self.data.loss}

    @property
    def streams(self) -> dict[str, tuple[str, ...]]:
        """Stream -> the paths of its L blocks in the model, the image stream first."""
        return self.data.streams

    @property
    def blocks(self) -> tuple[str, ...]:
        """All blocks that any stream has, in the model's order; block numbers count them from 0."""
        return self.manifest.blocks

    @property
    def readings(self) -> tuple[str, ...]:
        """What was recorded: "last", "mean", "update_norm_last", "pair2_mean" ... (docs/residual-readings.md)."""
        return self.data.readings

    @property
    def reading(self) -> str:
        """The reading that is looked at unless another is named: "last", as in the article, if it was recorded."""
        return "last" if "last" in self.readings else "mean"

    def distances(self, stream: str, reading: str | None = None) -> NDArray[Any]:
        """(N, L) float32, angular distance between the hidden states before and after each block, a fraction of pi.

        Of a further reading, what it gives; (N, L - n + 1) over n blocks in a row. NaN and infinity are what the model
        gave. float64 where an import needed it. Raises RunError for a stream or reading that the run has not.
        """
        return self.data.distances(stream, reading or self.reading)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per sample: sigma, loss, the facts (NA where unknown), "image.last.transformer_blocks.0" ..."""
        return self.data.to_pandas()

    def samples_in(self, reading: str | None = None) -> Samples:
        """All samples in one reading, as the functions of `analyse` take them; of an ablation, those that have it.

        Raises RunError as `distances` does.
        """
        name = reading or self.reading
        if name not in self._samples:
            self._samples[name] = self._samples_at(name, self._taken(name))
        return self._samples[name]

    def _samples_at(self, reading: str, taken_N: NDArray[np.bool_] | slice) -> Samples:
        from simpletuner_layerprobe.analyse.samples import Samples

        blocks = self._blocks_with(reading)
        return Samples(
            self.sigma[taken_N],
            self.facts["image"][taken_N],
            blocks,
            {stream: self._columns(stream, reading)[taken_N] for stream in blocks},
            reading=reading,
            facts={fact: value_N[taken_N] for fact, value_N in self.facts.items()},
            stratified=self.manifest.settings.get("sigmas") == "stratified",
        )

    def _blocks_with(self, reading: str) -> dict[str, tuple[str, ...]]:
        """Stream -> its blocks, for the streams that may have this reading: all, or the only one."""
        from simpletuner_layerprobe.readings import WHOLE, parse_reading

        only = parse_reading(reading).stream if reading in self.readings else ""
        return {only: self.blocks if only == WHOLE else self.streams[only]} if only else self.streams

    def _taken(self, reading: str) -> NDArray[np.bool_] | slice:
        """The samples that a reading was taken of: all, but for an ablation."""
        import numpy as np

        from simpletuner_layerprobe.readings import parse_reading

        if not parse_reading(reading).ablation:
            return slice(None)
        if reading not in self.readings:
            raise RunError(f"{self.path} was recorded without {reading} (layerprobe_ablation)")
        (stream,) = self._blocks_with(reading)
        taken_N: NDArray[np.bool_] = ~np.isnan(self._columns(stream, reading)).all(axis=1)
        return taken_N

    def _columns(self, stream: str, reading: str) -> NDArray[Any]:
        """`distances`, (N, 0) of a reading over more blocks than this stream has."""
        import numpy as np

        known = self.manifest.columns()
        missing = (stream, reading) not in known and any(name == reading for _, name in known)
        return np.empty((self.samples, 0)) if missing else self.distances(stream, reading)

    def heatmaps(self, reading: str | None = None, bins: int = 10) -> dict[str, Heatmap]:
        """`heatmap` of every stream, the image stream first."""
        from simpletuner_layerprobe.analyse.heatmap import heatmaps

        return heatmaps(self.samples_in(reading), bins=bins)

    def counts(self, bins: int = 10) -> NDArray[np.int64]:
        """(T,) the samples in each of T equal bins of sigma."""
        import numpy as np

        from simpletuner_layerprobe.analyse.heatmap import bin_index

        return np.bincount(bin_index(self.sigma, bins), minlength=bins)

    def heatmap(self, stream: str, reading: str | None = None, bins: int = 10) -> Heatmap:
        """The mean distances of a stream by T equal bins of sigma and L blocks.

        values_TL: (T, L) float64, fractions of pi; 0 where a bin has no samples. counts_T: (T,) samples of each bin.
        standard_errors_TL: (T, L), by how much other images would move each value. blocks: L paths. An ablation of
        whole blocks is of the stream "block". Raises RunError for a stream or reading that the run has not, ProbeError
        if it has no samples.
        """
        made = self.heatmaps(reading, bins)
        if stream not in made:
            self.distances(stream, reading)  # says what the run has
        return made[stream]

    def pair_heatmaps(self, tokens: str | None = None, bins: int = 10) -> dict[str, PairHeatmap]:
        """Distances over several blocks in a row (layerprobe_block_pairs), by stream: values_PL, a row per number.

        Raises ProbeError if the run was recorded without them.
        """
        from simpletuner_layerprobe.analyse.heatmap import pair_heatmaps
        from simpletuner_layerprobe.readings import ANGLE, parse_reading

        tokens = tokens or self.reading
        spans = [one for one in map(parse_reading, self.readings) if (one.kind, one.tokens) == (ANGLE, tokens)]
        return pair_heatmaps([self.samples_in(one.name) for one in spans], bins=bins)

    def findings(self, reading: str | None = None, bins: int = 10, tokens: str | None = None) -> tuple[Section, ...]:
        """What the run shows, as docs/findings.md defines it: one section per kind and stream, with .findings.

        Of a run with ablation also what that shows; with reading="ablation", that alone. tokens: the angle that an
        ablation is compared with, by default `reading`, or the run's own. Raises ProbeError if it has no samples,
        RunError for a reading that it has not.
        """
        from simpletuner_layerprobe.analyse.findings import findings
        from simpletuner_layerprobe.analyse.sections import ABLATION_KINDS, Section
        from simpletuner_layerprobe.readings import ABLATION, WHOLE

        samples = self.samples_in(reading)
        alone = samples.reading == ABLATION
        shown = () if alone else findings(samples, bins=bins)
        if ABLATION not in self.readings or samples.reading not in (ABLATION, *TOKENS):
            return shown
        try:
            sections = self.ablation(bins, tokens or (None if alone else reading)).sections
        except ProbeError as error:
            sections = (Section("needed", WHOLE, (), 0, str(error)),)
        return shown + tuple(section for section in sections if alone or section.kind in ABLATION_KINDS)

    def ablation(self, bins: int = 10, reading: str | None = None) -> Ablation:
        """Which blocks the loss needs, and how far the angle tells it, in a run recorded with layerprobe_ablation.

        loss: .value_L, .low_L, .high_L, the loss increase of each of the L blocks when it is left out, mean over the
        sigma bins, and its 95% interval. needed, hardly: numbers of the blocks that are missed clearly more than most,
        and hardly. told: stream -> how far its angle in `reading` ("mean", "last"; the run's own by default) tells it,
        as rank correlations over blocks and cells, beside depth and the relative update norm. text: the same with only
        the text update left out. docs/findings.md defines each. Only samples with ablation play a part. Raises RunError
        for a run without, ProbeError for too few samples.
        """
        from simpletuner_layerprobe.analyse.ablation import ablation
        from simpletuner_layerprobe.readings import ABLATION

        name = reading or self.reading
        if (name, bins) not in self._ablations:
            taken_N = self._taken(ABLATION)
            norm, text = (
                self._samples_at(other, taken_N) if other in self.readings else None
                for other in (f"update_norm_{name}", "ablation_text")
            )
            self._ablations[name, bins] = ablation(
                self.samples_in(ABLATION), self._samples_at(name, taken_N), norm, text, bins
            )
        return self._ablations[name, bins]

    def levels(
        self, reading: str = "ablation", bins: int = 10, images: NDArray[np.integer] | None = None
    ) -> NDArray[np.float64]:
        """(L,) the mean of an ablation over the sigma bins, each weighing the same, of all images or of these.

        images: their numbers, as in `facts["image"]`; `parted_images` draws some.
        """
        from simpletuner_layerprobe.analyse.ablation import levels

        return levels(self.samples_in(reading), bins, images)

    @property
    def ablated(self) -> str:
        """ "200 of 600 samples, 150 images" with ablation; "" for a run that was recorded without."""
        from simpletuner_layerprobe.readings import parse_reading
        from simpletuner_layerprobe.show.words import counted

        names = [name for name in self.readings if parse_reading(name).ablation]
        if not names:
            return ""
        samples = self.samples_in(names[0])
        images = "" if samples.images is None else f", {counted(samples.images, 'image')}"
        return f"{samples.samples:,} of {counted(self.samples, 'sample')}{images}"

    def parted_images(self, count: int | None = None, seed: int = 0) -> tuple[NDArray[np.unsignedinteger], ...]:
        """The images with ablation in two parts, at random: `count` of them, half by default, and the rest."""
        from simpletuner_layerprobe.analyse.ablation import parted
        from simpletuner_layerprobe.readings import ABLATION

        return parted(self.samples_in(ABLATION), count, seed)

    def contribution(
        self, reading: str | None = None, bins: int = 10, *, by_own: bool = False, **weighting: float
    ) -> Contribution:
        """`contributions` without what the replicates say: value_L, covered_L, critical by stream; least(6): numbers.

        by_own: whether a block that not all streams have goes by those that have it, as in plans of a given size, and
        not by its neighbour, as in the article's recipe. reading: "ablation" for what the loss needs, in the place of
        the angle; needs a run with layerprobe_ablation.
        """
        from simpletuner_layerprobe.analyse.contribution import article_contributions
        from simpletuner_layerprobe.readings import ABLATION

        if reading == ABLATION and reading not in self.readings:
            raise RunError(
                f"{self.path} was recorded without ablation of whole blocks; record it with layerprobe_ablation: "
                "blocks, or use --by angle"
            )
        return article_contributions(self.heatmaps(reading, bins), by_own=by_own, **weighting)

    def contributions(self, reading: str | None = None, bins: int = 10, **weighting: float) -> Contributions:
        """The contribution of every block by the article's recipe: values, low, high and settled, (L,) each.

        reading: as `contribution` takes it. weighting: clip_percentile (90), text_weight (1/3), image_weight (2/3).
        Raises ProbeError without samples, and if all blocks change the hidden states alike.
        """
        from simpletuner_layerprobe.analyse.settled import confidence
        from simpletuner_layerprobe.lokr.plan import decide_of

        contribution = self.contribution(reading, bins, by_own=False, **weighting)
        try:
            sure = self.confidence(reading=reading, bins=bins, preset="article", weighting=weighting)
        except ConfigError:  # what the modules would train is not known: factors are compared by name
            bootstrap = self._bootstrap(reading, bins)
            by_name = decide_of(replace(self.manifest, modules=()), weighting=weighting)
            sure = confidence(bootstrap, by_name(bootstrap))
        return Contributions(
            contribution.blocks,
            contribution.value_L,
            sure.low_L,
            sure.high_L,
            sure.settled_K,
            contribution.critical_union(),
            sure,
        )

    @property
    def preset(self) -> str:
        """What the run's factors are judged for unless another is named: its own layerprobe_preset, else "article"."""
        from simpletuner_layerprobe.lokr.amounts import preset_parameters
        from simpletuner_layerprobe.training.environment import read_options

        try:
            options = {key.lstrip("-"): value for key, value in read_options(self.path).items()}
            named = str(options.get("layerprobe_preset", "article"))
            preset_parameters(named)
        except ProbeError:
            return "article"
        return named

    @property
    def own(self) -> Own:
        """What the run's own config trains: .parameters, its size; raises ConfigError where that is not known."""
        from simpletuner_layerprobe.lokr.own import Own
        from simpletuner_layerprobe.training.own import read_training

        if self._own is None:
            try:
                self._own = Own(self.manifest, read_training(self.path))
            except ConfigError as error:
                self._own = Own(self.manifest, problem=str(error))
        return self._own

    @property
    def plan_size(self) -> int:
        """The trainable parameters of a plan unless others are asked for.

        Those of an amount in the run's layerprobe_preset, else as many as its own config trains. Raises ConfigError
        where that is not known.
        """
        from simpletuner_layerprobe.lokr.amounts import preset_parameters
        from simpletuner_layerprobe.lokr.groups import require_table

        require_table(self.manifest)
        return preset_parameters(self.preset) or self.own.parameters

    def plan_reading(self, reading: str | None = None, **options: Unpack[PlanOptions]) -> str:
        """The reading that a plan goes by, unless one is named: by the article's recipe the run's own, with a number of
        parameters the mean over the tokens, if it was recorded."""
        return reading or ("mean" if self._by_size(options) and "mean" in self.readings else self.reading)

    def plan_contribution(
        self, reading: str | None = None, bins: int = 10, **options: Unpack[PlanOptions]
    ) -> Contribution:
        """`contribution` as a plan with these options goes by it."""
        asked: dict[str, Any] = {"by_own": self._by_size(options), **options.get("weighting", {})}
        return self.contribution(self.plan_reading(reading, **options), bins, **asked)

    def _by_size(self, options: PlanOptions) -> bool:
        """Whether a number of parameters is asked for, and not the article's recipe."""
        from simpletuner_layerprobe.lokr.amounts import preset_parameters

        return preset_parameters(options.get("params") or options.get("preset") or self.preset) is not None

    def other_reading(self, reading: str) -> str:
        """The other reading of the angle, "mean" for "last" or the reverse; "" if it was not recorded."""
        others = [name for name in TOKENS if name in self.readings and name != reading]
        return others[0] if reading in TOKENS and others else ""

    def decided_otherwise(
        self, other: str, *, reading: str | None = None, bins: int = 10, **options: Unpack[PlanOptions]
    ) -> dict[int, tuple[int, int]]:
        """What the same plan would decide otherwise by the reading `other`: number of a block -> its parameters so far,
        and by the other one. Raises ConfigError without a module table."""
        here, there = (
            self._block_parameters(name, bins, options) for name in (self.plan_reading(reading, **options), other)
        )
        return {n: pair for n, pair in enumerate(zip(here, there, strict=True)) if pair[0] != pair[1]}

    def _block_parameters(self, reading: str, bins: int, options: PlanOptions) -> list[int]:
        """(L,) what a plan by this reading gives each block, found as for the replicates."""
        from simpletuner_layerprobe.lokr.plan import Recipe

        bootstrap, decide = self._decision(reading, bins, options)
        recipe = Recipe(**asked_of(options, self.preset, weighed=True))
        groups = recipe.groups(self.manifest, bootstrap.names, bootstrap.blocks)
        number_K = decide({name: mean_TL[None] for name, mean_TL in bootstrap.mean_TL.items()})[1][0].tolist()
        if recipe.parameters is None:
            kept = dict.fromkeys(group.number for group in groups)
            factors = dict(zip(kept, number_K, strict=True))
            number_K = [recipe.article_number(group, factors[group.number]) for group in groups]
        parameters = dict.fromkeys(self.blocks, 0)
        for group, number in zip(groups, number_K, strict=True):
            parameters[group.block] += group.parameters(recipe.algo, number)
        return list(parameters.values())

    def confidence(
        self, *, share: float = 0.95, reading: str | None = None, bins: int = 10, **options: Unpack[PlanOptions]
    ) -> Confidence:
        """How sure the contributions and the factors (or ranks) of a plan are: the one answer to that question.

        Bootstrap replicates draw images, where they are known, and each is planned as the run itself. low_L, high_L:
        (L,) 95% intervals of the contributions. factor_K, agreement_K, settled_K: what the plan decides (a factor per
        block, with a budget per group of modules), the share of the replicates that decide the same, and whether that
        is `share` or more. `.settled`: whether all are; `.text()`: all of it in a line.
        """
        from simpletuner_layerprobe.analyse.settled import confidence

        bootstrap, decide = self._decision(reading, bins, options)
        return confidence(bootstrap, decide, share)

    def times_to_settle(
        self, *, reading: str | None = None, bins: int = 10, **options: Unpack[PlanOptions]
    ) -> int | None:
        """About how many times the images (samples, where these are not known) would settle all.

        None for far more, and where there are too few to tell."""
        from simpletuner_layerprobe.analyse.settled import times_to_settle

        return times_to_settle(*self._decision(reading, bins, options))

    def differing(
        self, *, reading: str | None = None, bins: int = 10, **options: Unpack[PlanOptions]
    ) -> tuple[int, ...]:
        """Numbers of the blocks to which a weighting gives other factors than equal factors of the same size.

        That is, in 95% of the bootstrap replicates a factor on the same side of the equal one, for a contribution on
        the same side of the mean. () where there is not enough to judge by, and where it is no more blocks than chance
        makes of blocks that are all alike. options: as for `confidence`, with a budget. Raises ConfigError as `plan`.
        """
        from simpletuner_layerprobe.analyse.settled import by_chance, differing

        weighted: PlanOptions = {**options, "direction": WEIGHED}
        bootstrap, decide = self._decision(reading, bins, weighted)
        _, equal = self._decision(reading, bins, {**options, "direction": EQUAL})
        apart_L, apart_K = differing(bootstrap, decide, equal)
        decided = self.decided(reading=reading, bins=bins, **weighted)
        numbers = {number for (number, _), apart in zip(decided, apart_K, strict=True) if apart and apart_L[number]}
        return tuple(sorted(numbers)) if bootstrap.enough and len(numbers) > by_chance(len(apart_L)) else ()

    def decided(
        self, *, reading: str | None = None, bins: int = 10, **options: Unpack[PlanOptions]
    ) -> tuple[tuple[int, str], ...]:
        """The block number and the kind of modules of each number that `confidence` judges; "" for a whole block."""
        from simpletuner_layerprobe.lokr.plan import Recipe

        recipe = Recipe(**asked_of(options, self.preset, weighed=reading is not None))
        bootstrap = self._bootstrap(self.plan_reading(reading, **options), bins)
        if not self.manifest.modules:
            return tuple((number, "") for number in range(len(bootstrap.names)))
        groups = recipe.groups(self.manifest, bootstrap.names, bootstrap.blocks)
        if recipe.parameters is None:
            return tuple(dict.fromkeys((group.number, "") for group in groups))
        streams = len({group.stream for group in groups}) > 1
        return tuple((group.number, f"{group.stream} {group.kind}" if streams else group.kind) for group in groups)

    def _decision(self, reading: str | None, bins: int, options: PlanOptions) -> tuple[Bootstrap, Decide]:
        from simpletuner_layerprobe.lokr.plan import decide_of

        bootstrap = self._bootstrap(self.plan_reading(reading, **options), bins)
        asked = asked_of(options, self.preset, weighed=reading is not None)
        return bootstrap, decide_of(self.manifest, **asked)(bootstrap)

    def _bootstrap(self, reading: str | None, bins: int) -> Bootstrap:
        from simpletuner_layerprobe.analyse.bootstrap import Bootstrap

        key = (reading or self.reading, bins)
        if key not in self._bootstraps:
            self._bootstraps[key] = Bootstrap.of(self.samples_in(reading), bins=bins)
        return self._bootstraps[key]
