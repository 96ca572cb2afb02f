"""The callback: what a Vision Transformer looks at, at every stage of its training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from vitx.callbacks import ranks, sinks
from vitx.callbacks.explaining import Explainer, Target
from vitx.callbacks.images import Samples, Selection
from vitx.callbacks.isolation import no_trace
from vitx.callbacks.namespaces import Callback
from vitx.callbacks.past import Past
from vitx.callbacks.report import about, draw, keep_images, keep_maps, measure
from vitx.callbacks.saying import first_words, inform, warn
from vitx.callbacks.scales import true_colours
from vitx.callbacks.subject import Forward, explained_module
from vitx.errors import VitxError, in_words
from vitx.explanation import Explanation
from vitx.methods import title_of, with_options
from vitx.runs import FOLDER, GRIDS

# As `draw` takes them: the images shown, the names of the classes, the colour map, and what is written below.
Look = tuple[Tensor, Sequence[str] | None, str, str]


class RolloutCallback(Callback):
    """Logs what the model looks at on fixed images, as pictures and numbers, while it trains.

    Fires before the first step, every n epochs or steps, and at the end of `fit`. Each firing logs one
    grid (rows: images; columns: the input and each method's overlay) under `vitx/maps`, and for each
    method, as means over the images, `vitx/METHOD/...`: `entropy` (how spread out), `information` (how much
    the maps of different images differ), `drift` (how far from the firing before), and, where masks or boxes
    are known, `pointing` (pointing-game rate) and `energy` (share of the map on the object). The step is that
    of `self.log`, and any of these names can be the `monitor` of other callbacks.

    The training is the same, bit for bit, with and without the callback. With several processes, the
    images are shared among them and rank 0 writes.

    Args:
        images: a tensor (n, C, H, W), a data set, a list of image files, a list of places in the validation
            set, or None: evenly spaced from the validation set.
        num_images: how many of a tensor or a data set the grid shows; named files and places are all shown.
        num_measured: how many images the numbers are means over; by default the ones shown.
        per_class: take one image of each class of the data set, not evenly spaced ones.
        dataloader_idx: which of several validation loaders, by its number or its name.
        batch_transform: a function from a batch of your loader to images, to (images, labels, masks), or to
            a mapping with such names, where the callback does not find them by itself.
        methods: names, or a mapping from names to the options of each, see `vitx.methods()`.
        target: the class that gradient methods explain: "predicted", "label", a class, or a function from
            logits to scores (regression, multi-label).
        forward_fn: a function from (module, images) to logits; by default the module's own forward. What else
            it or the forward asks for by name is taken from batches that are mappings.
        weights: "current", or "ema" for averaged ones that a callback or the module keeps.
        every_n_epochs: fire at the end of every n-th epoch; None or 0 for never.
        every_n_steps: fire after every n-th step; None or 0 for never.
        at_start: fire before the first step.
        on_validate: fire at the end of `trainer.validate` and of `trainer.test`, too.
        class_names: by default those of the data set, else the numbers.
        masks: (n, h, w), True on the object of each image; by default the third item of each sample.
        boxes: (n, 4) or (n, K, 4): x1, y1, x2, y2 in pixels, instead of masks.
        mean: what was subtracted from each channel of the images; by default what the data set's transforms
            hold, else what the model declares. Where neither fits, colours are guessed; the picture says so.
        std: what each channel was then divided by; by default as for the mean.
        bands: which channels are shown, one or three, as (3, 2, 1); by default the first three.
        colormap: the name of a colour map of matplotlib.
        save_maps: write maps, logits and pixels of the images shown into the log folder, from which
            `vitx report` and `vitx timelapse` play the training back.
        on_error: "warn" lets the training go on when an explanation fails, "raise" does not.

    Raises:
        VitxError: An argument is wrong.

    Example:
        >>> trainer = pl.Trainer(callbacks=[RolloutCallback(num_images=4)], logger=False)
    """

    def __init__(
        self,
        images: Any = None,
        num_images: int = 8,
        num_measured: int | None = None,
        per_class: bool = False,
        dataloader_idx: int | str = 0,
        batch_transform: Callable[[Any], Any] | None = None,
        methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("rollout", "grad_rollout"),
        target: Target = "predicted",
        forward_fn: Forward | None = None,
        weights: Literal["current", "ema"] = "current",
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        at_start: bool = True,
        on_validate: bool = False,
        class_names: Sequence[str] | None = None,
        masks: Tensor | None = None,
        boxes: Tensor | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bands: Sequence[int] | None = None,
        colormap: str = "inferno",
        save_maps: bool = False,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        super().__init__()
        num_images = _positive("num_images", num_images)
        num_measured = max(num_images, _positive("num_measured", num_measured or num_images))
        if getattr(images, "ndim", None) == 1:  # places in a tensor or an array
            images = images.tolist()
        self.selection = Selection(
            images, num_images, num_measured, per_class, dataloader_idx, batch_transform, masks, boxes
        )
        self.methods = with_options(methods)
        if isinstance(target, str) and target not in ("predicted", "label"):
            raise VitxError(f'target must be "predicted", "label", a class or a function, found {target!r}')
        self.target = target
        self.forward_fn = forward_fn
        self.weights = _one_of("weights", weights, ("current", "ema"))
        self.every_n_epochs = every_n_epochs or 0
        self.every_n_steps = every_n_steps or 0
        self.at_start, self.on_validate = at_start, on_validate
        self.class_names = class_names
        self.mean, self.std, self.bands = mean, std, bands
        self.colormap = colormap
        self.save_maps = save_maps
        self.on_error = _one_of("on_error", on_error, ("warn", "raise"))
        self._forget()

    def _forget(self) -> None:
        self._samples: Samples | None = None
        self._look: Look | None = None
        self._images_kept = False
        self._past = Past()
        self._explainer = Explainer(self.methods, self.target, self.forward_fn, self.class_names)
        self._said: set[tuple[str, str]] = set()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Starts anew, as each `fit` is a run of its own (a checkpoint's state is loaded after this)."""
        if stage == "fit" or self.on_validate:
            self._forget()
        # On all ranks, as they agree on it together.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / FOLDER

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows what the weights look at before they are trained; after a resume, takes up the thread."""
        if trainer.global_step:
            # What was due at this very step was shown, before the checkpoint or after it.
            self._past.fired_at = trainer.global_step
            _publish(trainer, self._past.scalars)
            # The first is right for one optimiser; for several, the second is one too high at most.
            step = min(trainer.global_step, _steps_logged(trainer) + 1)
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    self._attempt(logger, partial(sinks.drop_from, logger, step))
            return
        if trainer.is_global_zero and not _only_tried(trainer):
            self._attempt(self._folder, partial(sinks.put_aside, self._folder))
        if self.at_start:
            self._fire(trainer, pl_module, 0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fires after every n-th step."""
        if self.every_n_steps and trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._fire(trainer, pl_module, _steps_logged(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fires at the end of every n-th epoch, before what monitors the validation saves a checkpoint."""
        if trainer.state.fn == "validate" and self.on_validate:
            self._fire(trainer, pl_module, trainer.global_step)
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if (
            fitting
            and self._epoch_is_due(trainer)
            and trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        ):
            self._fire(trainer, pl_module, _steps_logged(trainer))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows what the tested weights look at, in the first images of the test set."""
        if self.on_validate:
            self._fire(trainer, pl_module, trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fires at the end of every n-th epoch that does not end with a validation."""
        if self._epoch_is_due(trainer):
            self._fire(trainer, pl_module, _steps_logged(trainer) - 1)

    def _epoch_is_due(self, trainer: pl.Trainer) -> bool:
        return bool(self.every_n_epochs) and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows what the trained weights look at."""
        self._fire(trainer, pl_module, _steps_logged(trainer) - 1)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets the images go."""
        self._samples = self._look = None

    def state_dict(self) -> dict[str, Any]:
        """Keeps which images were watched and what was seen last."""
        return dict(vars(self._past))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after the last firing; what another version of vitx kept besides is left out."""
        known = vars(Past())
        self._past = Past(**{name: value for name, value in state_dict.items() if name in known})

    def _fire(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        """Explains and logs, once between two steps of the optimiser; `step` is where `self.log` is."""
        due = self._past.fired_at != trainer.global_step and step > self._past.step
        self._past.fired_at = trainer.global_step
        if not due:
            return
        self._past.step = step
        with self._forgiving("shows nothing", f" at step {step}"), no_trace(trainer, module):
            self._show(trainer, module, step)

    def _show(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        """Every rank explains its share of the images; rank 0 writes what all found."""
        if self._samples is None:
            self._samples = ranks.from_first(trainer, partial(self._choose, trainer, module))
        samples, model = self._samples, explained_module(trainer, module, self.weights)
        found, errors = self._explainer.explain(trainer, model, samples)
        if errors and (not found or self.on_error == "raise"):
            raise next(iter(errors.values()))
        for name, error in errors.items():
            self._say(f"shows no {title_of(name)}", error, f" at step {step}")
        if not found:
            return  # what failed before, and was said, is not tried now
        # Sharded models may differ in the last bits among ranks, whose monitors must agree.
        scalars = ranks.from_first(trainer, partial(measure, found, samples.masks, self._past.maps))
        self._past.maps = {name: explanation.maps for name, explanation in found.items()}
        self._past.scalars = scalars
        _publish(trainer, scalars)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                self._attempt(logger, partial(sinks.write_scalars, logger, scalars, step))
            if self.save_maps and not _only_tried(trainer):
                kept = self._folder, found, samples, step, self._explainer.kind
                self._attempt(self._folder, partial(keep_maps, *kept))
            self._picture(trainer, module, found, samples, step)

    def _picture(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        found: Mapping[str, Explanation],
        samples: Samples,
        step: int,
    ) -> None:
        """Draws and shows the grid; what fails here takes no number with it."""
        with self._forgiving("shows no picture", f" at step {step}"):
            if self._look is None:
                self._look = self._looked_at(trainer, module, samples)
            picture = draw(found, samples, *self._look, self._explainer.kind)
            if self.save_maps and not self._images_kept and not _only_tried(trainer):
                keep = partial(keep_images, self._folder, samples, *self._look)
                self._images_kept = self._attempt(self._folder, keep)
            self._show_picture(trainer, picture, step)

    def _looked_at(self, trainer: pl.Trainer, module: pl.LightningModule, samples: Samples) -> Look:
        """Draws the images shown in their true colours, and says what was found."""
        scale = (self.mean, self.std)
        colours = true_colours(trainer, module, samples.images, samples.scales, scale, self.bands)
        pixels = colours.pixels(samples.images)[list(samples.shown)]
        words = first_words(samples, self._explainer, colours, trainer, self._folder)
        inform(f"RolloutCallback {words}")
        names = self.class_names or samples.class_names
        note = "; ".join(filter(None, (colours.note, about(self.target, names, self._explainer.kind))))
        return pixels, names, self.colormap, note

    def _choose(self, trainer: pl.Trainer, module: pl.LightningModule) -> Samples:
        samples = self.selection.choose(trainer, module, self._past.places)
        if change := self._past.meet(samples):
            warn(f"RolloutCallback: {change}")
        return samples

    def _show_picture(self, trainer: pl.Trainer, picture: sinks.Picture, step: int) -> None:
        """Shows a picture in every logger that can; where none took it, writes a file."""
        shows = [partial(sinks.show_picture, logger, GRIDS, picture, step) for logger in trainer.loggers]
        taken = [self._attempt(logger, show) for logger, show in zip(trainer.loggers, shows, strict=True)]
        if not any(taken) and not _only_tried(trainer):  # which leaves nothing behind
            self._attempt(self._folder, partial(sinks.save_picture, self._folder, GRIDS, picture, step))

    def _attempt(self, place: Any, write: Callable[[], Any]) -> bool:
        """Says whether a logger or a folder took what is written; one that fails does not stop the others."""
        name = place if isinstance(place, Path) else type(place).__name__
        taken: Any = False
        with self._forgiving(f"cannot write to {name}"):
            taken = write()
        return taken is not False

    @contextmanager
    def _forgiving(self, what: str, when: str = "") -> Iterator[None]:
        """Says what its block could not do, and goes on, unless errors are to be raised."""
        try:
            yield
        except Exception as error:
            if self.on_error == "raise":
                raise
            self._say(what, error, when)

    def _say(self, what: str, error: Exception, when: str = "") -> None:
        """Warns once of each kind of error in each place, as its text may name a step or an address."""
        known = (what, str(error) if isinstance(error, VitxError) else type(error).__name__)
        if known not in self._said:
            self._said.add(known)
            warn(f"RolloutCallback {what}{when}: {in_words(error)}")


def _publish(trainer: pl.Trainer, scalars: Mapping[str, float]) -> None:
    """Makes the numbers known to callbacks that monitor some, as `self.log` does, on every rank."""
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})


def _only_tried(trainer: pl.Trainer) -> bool:
    """Whether nothing is to be left behind."""
    return bool(getattr(trainer, "fast_dev_run", False))


def _steps_logged(trainer: pl.Trainer) -> int:
    """The step axis of `self.log`: unlike `global_step`, it counts several optimisers once."""
    steps: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return steps


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise VitxError(f"{name} must be at least 1, found {value}")
    return value


def _one_of(name: str, value: str, known: tuple[str, str]) -> str:
    if value not in known:
        raise VitxError(f'{name} must be "{known[0]}" or "{known[1]}", found {value!r}')
    return value
