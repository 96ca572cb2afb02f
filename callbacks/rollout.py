"""The callback: what a Vision Transformer looks at, at every stage of its training."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from vitx import metrics, render
from vitx.callbacks.images import Samples, choose_samples, evenly_spaced
from vitx.callbacks.isolation import no_trace
from vitx.callbacks.sinks import write_maps, write_picture, write_scalars
from vitx.errors import VitxError
from vitx.explain import Explanation, explain_methods
from vitx.methods import find_method

_BATCH = 32  # images explained at once


class RolloutCallback(pl.Callback):
    """Logs what the model looks at on fixed images, as pictures and numbers, while it trains.

    Fires before the first step, every n epochs or steps, and at the end of `fit`. Each firing logs one
    grid (rows: images; columns: the input and each method's overlay) under `vitx/maps`, and for each
    method, as means over the images: `entropy` (how spread out), `drift` (how far from the firing
    before), and, where the objects' masks are known, `pointing` (pointing-game rate) and `energy` (share
    of the map on the object). The step is that of `self.log`.

    The training is the same, bit for bit, with and without the callback.

    Args:
        images: a tensor (n, C, H, W), a data set, a list of image files, or None: evenly spaced from the
            validation set.
        num_images: how many images the grid shows.
        num_measured: how many images the numbers are means over; by default the ones shown.
        methods: names, or a mapping from names to the options of each, see `vitx.methods()`.
        target: the class that gradient methods explain: "predicted", "label", a class, or a function from
            logits to scores.
        every_n_epochs: fire at the end of every n-th epoch; None or 0 for never.
        every_n_steps: fire after every n-th step; None or 0 for never.
        at_start: fire before the first step.
        class_names: by default those of the data set, else the numbers.
        masks: (n, H, W), True on the object of each image; by default the third item of each sample.
        mean: what was subtracted from each channel of the images; by default the model's own.
        std: what each channel was then divided by; by default the model's own.
        colormap: the name of a colour map of matplotlib.
        save_maps: write the raw maps of the images shown as .npz into the log folder.
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
        methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("rollout", "grad_rollout"),
        target: str | int | Callable[[Tensor], Tensor] = "predicted",
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        at_start: bool = True,
        class_names: Sequence[str] | None = None,
        masks: Tensor | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        colormap: str = "inferno",
        save_maps: bool = False,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        super().__init__()
        self.images = images
        self.num_images = _positive("num_images", num_images)
        self.num_measured = max(num_images, _positive("num_measured", num_measured or num_images))
        self.methods = dict(methods) if isinstance(methods, Mapping) else {name: {} for name in methods}
        if not self.methods:
            raise VitxError("methods is empty: name at least one")
        for name, options in self.methods.items():
            find_method(name).check(name, dict(options))
        if isinstance(target, str) and target not in ("predicted", "label"):
            raise VitxError(f'target must be "predicted", "label", a class or a function, found {target!r}')
        if on_error not in ("warn", "raise"):
            raise VitxError(f'on_error must be "warn" or "raise", found {on_error!r}')
        self.target = target
        self.every_n_epochs = every_n_epochs or 0
        self.every_n_steps = every_n_steps or 0
        self.at_start = at_start
        self.class_names = class_names
        self.masks = masks
        self.mean, self.std = mean, std
        self.colormap = colormap
        self.save_maps = save_maps
        self.on_error = on_error
        self._forget()

    def _forget(self) -> None:
        self._samples: Samples | None = None
        self._step_before: int | None = None
        self._maps_before: dict[str, Tensor] = {}
        self._indices_before: tuple[int, ...] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Starts anew, as each `fit` is a run of its own (a checkpoint's state is loaded after this)."""
        if stage == "fit":
            self._forget()
        # On all ranks, as they agree on it together.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "vitx"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows what the weights look at before they are trained."""
        if self.at_start and trainer.global_step == 0:
            self._fire(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fires after every n-th step."""
        if self.every_n_steps and trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._fire(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fires at the end of every n-th epoch."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._fire(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows what the trained weights look at."""
        self._fire(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Keeps which images were watched and what was seen last."""
        return {"indices": self._indices_before, "step": self._step_before, "maps": self._maps_before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after the last firing."""
        self._step_before, self._maps_before = state_dict["step"], state_dict["maps"]
        self._indices_before = state_dict["indices"]

    def _fire(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Explains and logs, once per step; rank 0 does it for all."""
        step = max(trainer.global_step - 1, 0)  # where self.log puts what this step computed
        if not trainer.is_global_zero or (self._step_before is not None and step <= self._step_before):
            return
        self._step_before = step
        try:
            with no_trace(trainer):
                self._explain_and_log(trainer, module, step)
        except Exception as error:
            if self.on_error == "raise":
                raise
            rank_zero_warn(f"RolloutCallback shows nothing at step {step}: {error}")

    def _explain_and_log(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        if self._samples is None:
            self._samples = choose_samples(self.images, self.num_measured, trainer, module)
        samples = self._samples
        if samples is None:
            rank_zero_warn("RolloutCallback found no validation set: give it images to watch")
            return
        if self._indices_before is not None and self._indices_before != samples.indices:
            rank_zero_warn("RolloutCallback watches other images than before: the data set has changed")
        self._indices_before = samples.indices
        with trainer.precision_plugin.forward_context():
            found = self._explain(module, samples)
        scalars = self._measure(found, samples)
        write_scalars(trainer.loggers, scalars, step)
        shown = torch.tensor(evenly_spaced(len(samples.images), min(self.num_images, len(samples.images))))
        write_picture(
            trainer.loggers, self._folder, "vitx/maps", self._draw(module, samples, found, shown), step
        )
        if self.save_maps:
            write_maps(self._folder, {name: e.maps[shown].cpu().numpy() for name, e in found.items()}, step)
        self._maps_before = {name: explanation.maps.cpu() for name, explanation in found.items()}

    def _explain(self, module: pl.LightningModule, samples: Samples) -> dict[str, Explanation]:
        """Explains all samples, a batch at a time."""
        if self.target == "label" and samples.labels is None:
            raise VitxError('target="label" needs labels: give a data set of (image, label) pairs')
        parts = []
        for start in range(0, len(samples.images), _BATCH):
            part = slice(start, start + _BATCH)
            target: Any = None if self.target == "predicted" else self.target
            if self.target == "label" and samples.labels is not None:
                target = samples.labels[part]
            parts.append(explain_methods(module, samples.images[part], self.methods, target=target))
        return {name: _join([part[name] for part in parts]) for name in self.methods}

    def _measure(self, found: Mapping[str, Explanation], samples: Samples) -> dict[str, float]:
        masks = samples.masks if self.masks is None else self.masks
        scalars: dict[str, float] = {}
        for name, explanation in found.items():
            maps = explanation.maps
            values = {"entropy": metrics.entropy(maps)}
            before = self._maps_before.get(name)
            if before is not None and before.shape == maps.shape:
                values["drift"] = metrics.drift(maps, before)
            if masks is not None:
                values["pointing"] = metrics.pointing_game(maps, masks.to(maps.device))
                values["energy"] = metrics.energy_inside(maps, masks.to(maps.device))
            scalars |= {f"vitx/{name}/{key}": value.mean().item() for key, value in values.items()}
        return scalars

    def _draw(
        self, module: pl.LightningModule, samples: Samples, found: Mapping[str, Explanation], shown: Tensor
    ) -> Any:
        mean, std = _normalisation(module)
        pixels = render.to_pixels(samples.images[shown], self.mean or mean, self.std or std)
        columns = {"input": pixels}
        for name, explanation in found.items():
            heat = render.heatmaps(explanation.maps[shown], explanation.image_size)
            columns[render.TITLES.get(name, name)] = render.overlays(pixels, heat, self.colormap)
        logits = next(iter(found.values())).logits[shown]
        labels = None if samples.labels is None else samples.labels[shown]
        captions = render.captions(logits, labels, self.class_names or samples.class_names)
        return render.grid(columns, captions, colormap=self.colormap)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise VitxError(f"{name} must be at least 1, found {value}")
    return value


def _join(parts: Sequence[Explanation]) -> Explanation:
    targets = [part.target for part in parts if part.target is not None]
    return Explanation(
        torch.cat([part.maps for part in parts]),
        torch.cat([part.logits for part in parts]),
        torch.cat(targets) if targets else None,
        parts[0].image_size,
    )


def _normalisation(module: pl.LightningModule) -> tuple[Sequence[float], Sequence[float]]:
    """Returns the mean and std that the model declares (timm does), else those that change nothing."""
    for part in module.modules():
        config = getattr(part, "pretrained_cfg", None)
        if isinstance(config, Mapping) and "mean" in config and "std" in config:
            return config["mean"], config["std"]
    return (0.0,), (1.0,)
