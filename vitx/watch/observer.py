"""The observer of a training: at each firing, it explains, measures, draws and writes."""

import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from vitx.attribution import title_of
from vitx.errors import VitxError
from vitx.models.isolation import untouched
from vitx.pictures.colors import as_images, choose_colors
from vitx.pictures.render import Picture
from vitx.runs import GRIDS, OVERVIEW
from vitx.watch.calling import is_compiled
from vitx.watch.data_sets import likely_scales
from vitx.watch.explaining import SampleExplainer
from vitx.watch.host import Attempts, Host
from vitx.watch.images import Samples, Selection
from vitx.watch.loggers import drop_from, name_of, place_of, show_picture, write_scalars
from vitx.watch.observed import observed
from vitx.watch.readers import held_by_modules, seeded
from vitx.watch.run_writer import Memory, RunWriter
from vitx.watch.settings import Settings
from vitx.watch.showing import Display, Firing, about, draw, draw_overview, first_words, measure
from vitx.watch.step import StepRecorder

_TRIES = 2  # steps to record until one shows how a batch is used


class Observer(Settings):
    """The observer of one training, with its settings; a callback calls each method on all ranks."""

    def reset(self) -> None:
        """Reset the state for a new training."""
        self._explainer = SampleExplainer(self)
        self._memory = Memory()
        self._attempts = Attempts(raises=self.on_error == "raise")
        self._writer = RunWriter(self, self._attempts, self._memory)
        self._steps_to_record = _TRIES
        self._said = ""  # what the last first firing found
        self._drop_images()

    def _drop_images(self) -> None:
        self._samples: Samples | None = None
        self._display: Display | None = None
        self._overview: Callable[[], Picture] | None = None  # draws the last firing's

    def close(self) -> None:
        """Release the images and the folder of the run."""
        self._drop_images()
        self._writer.close()

    def end(self, host: Host) -> None:
        """Show an overview of all maps of the last firing, and mark the run as ended in its folder."""

        def end() -> None:
            with self._attempts.forgiving(host, "shows no overview"):
                if self._overview is not None:
                    self._show_picture(host, OVERVIEW, self._overview(), self._memory.step)
            self._writer.end(host)

        self._attempts.on_first(host, end)

    @contextmanager
    def record_step(self, module: nn.Module, batch: Any, where: str) -> Iterator[None]:
        """Record a step of a module on a batch, unless an earlier step has shown how a batch is used."""
        self._steps_to_record -= 1
        known = self._explainer.observed
        # A validation step shows more than a training step.
        done = known is not None and not (known.where == "training_step" != where)
        if done or self._steps_to_record < 0:
            yield
            return
        recorder = StepRecorder(module, batch)
        with nullcontext() if is_compiled(module) else recorder.recording():
            yield
        step = observed(recorder, where)
        if step is not None or not self._explainer.where:
            self._explainer = SampleExplainer(self, where, step)
            self._drop_images()  # to choose them again, with what the step has shown

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: which images were watched, and the results of the last firing."""
        return dict(vars(self._memory))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of an interrupted run; to be called before the first firing of this one."""
        if not isinstance(state_dict, Mapping) or not {"fired_at", "step"} <= state_dict.keys():
            found = reprlib.repr(state_dict)
            raise VitxError(f"{type(self).__name__} needs what its state_dict() returned, found {found}")
        known = vars(Memory())  # entries of another version of vitx are left out
        vars(self._memory).update(known | {name: state_dict[name] for name in known if name in state_dict})

    def resume(self, host: Host, moment: int, next_step: int) -> None:
        """Continue an interrupted run, in its folder and its logs.

        The firing due at this moment counts as done; what the run wrote at `next_step` or later is dropped.
        """
        self._memory.fired_at = moment
        host.publish(self._memory.scalars)

        def go_on() -> None:
            self._for_each_logger(host, lambda logger: drop_from(logger, next_step))
            self._writer.reopen(host, next_step)

        self._attempts.on_first(host, go_on)

    def observe(self, host: Host, step: int, moment: int | None = None) -> Mapping[str, float]:
        """Explain the images, and log the pictures and numbers, once per step.

        Returns:
            The numbers, tag -> value; empty if there is nothing new at this `moment` (by default the step).
        """
        memory, moment = self._memory, step if moment is None else moment
        due = memory.fired_at != moment and step > memory.step
        memory.fired_at = moment
        if not due:
            return {}
        memory.step = step
        failing = self._attempts.forgiving(host, "shows nothing", step)
        with failing, seeded(*held_by_modules(host.model)), torch.inference_mode(False), host.paused():
            return self._fire_at(host, step)
        return {}  # type: ignore[unreachable]  # the failure was reported

    def _fire_at(self, host: Host, step: int) -> Mapping[str, float]:
        """Explain each rank's share of the images, and write the results of all on rank 0."""
        if self._samples is None:
            self._samples = host.group.from_first(partial(self._choose, host))
        samples, memory = self._samples, self._memory
        found, errors = self._explainer.explain(host, samples)
        if not found:
            raise next(iter(errors.values()))
        for name, error in errors.items():
            with self._attempts.forgiving(host, f"shows no {title_of(name)}", step):
                raise error
        # Sharded models may differ in the last bits between ranks, but monitors on all ranks must agree.
        numbers = host.group.from_first(partial(measure, found, samples.masks, memory.maps))
        memory.maps = {name: explanation.maps for name, explanation in found.items()}
        if self.faithfulness:
            with self._attempts.forgiving(host, "measures no faithfulness", step):
                numbers |= self._explainer.faithfulness(host, samples, found)
        memory.scalars = numbers
        host.publish(numbers)
        firing = Firing(step, samples, found, self._explainer.kind, numbers)
        self._attempts.on_first(host, partial(self._write, host, firing))
        return numbers

    def _choose(self, host: Host) -> Samples:
        memory = self._memory
        with untouched(host.model):  # whose hooks may augment batches in train mode
            samples = Selection(self, host, self._explainer.observed).choose(memory.places)
        if memory.out_of not in (None, samples.out_of):
            counts = f"it has {samples.out_of} images and had {memory.out_of}"
            host.warn(f"{host.name}: the data set has changed: {counts}")
        memory.places, memory.out_of = samples.places, samples.out_of
        return samples

    def _write(self, host: Host, firing: Firing) -> None:
        """Write numbers, maps and the grid; if one fails, the others are still written."""
        self._for_each_logger(host, lambda logger: write_scalars(logger, firing.numbers, firing.step))
        writer, display = self._writer, self._display
        failing = partial(self._attempts.forgiving, host, "shows no picture", firing.step)
        if self.save_maps:
            writer.claim(host)
        if new := display is None:
            with failing():
                self._display = display = self._prepare(host, firing)
                writer.write_display(host, firing, display)
        writer.write_firing(host, firing)
        if display is None:
            return  # type: ignore[unreachable]  # the failure was reported
        with failing():
            if display.pixels.ndim == 4:
                self._overview = partial(draw_overview, firing, display)
            places = self._show_picture(host, GRIDS, draw(firing, display), firing.step)
            if new:
                kept = writer.folder.path if writer.folder and self.save_maps else None
                words = first_words(firing, display, kept, places)
                if words != self._said:
                    host.inform(f"{host.name} {words}")
                self._said = words

    def learn(self, host: Host) -> None:
        """Add metrics that the training has computed since the last firing to the numbers of its step."""
        self._writer.write_numbers(host, self._memory.scalars, self._memory.step)

    def _prepare(self, host: Host, firing: Firing) -> Display:
        """Draw the images shown in their true colors, and collect class names, a note and hints."""
        samples, channels = firing.samples, firing.first.channels
        images = as_images(samples.images, channels)
        scales = likely_scales(host.model, images, samples.scales, host.normalizers())
        colors = choose_colors(images, scales, self.bands, self.normalization, colored=channels is not None)
        pixels = colors.draw(samples.images[list(samples.shown)], channels)
        known = self.class_names or samples.class_names or host.class_names()
        names, doubts = self._explainer.fitting(host, samples, known)
        note = "; ".join(filter(None, (colors.note, about(self.target, names, firing.kind))))
        return Display(pixels, colors, names, self.colormap, note, doubts)

    def _show_picture(self, host: Host, tag: str, picture: Picture, step: int) -> list[str]:
        """Show a picture in every logger that takes it, or else in a file, and return where it is."""
        taken = self._for_each_logger(host, lambda logger: show_picture(logger, tag, picture, step))
        return taken or self._writer.write_picture(host, tag, picture, step)

    def _for_each_logger(self, host: Host, write: Callable[[Any], Any]) -> list[str]:
        """Write to each logger, and return where those that took it write; a failure stops no others."""
        taken = []
        for logger in host.loggers:
            with self._attempts.forgiving(host, f"cannot write to {name_of(logger)}"):
                taken += [place_of(logger)] if write(logger) else []
        return taken
