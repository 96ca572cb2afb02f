"""A firing: explains the watched images, measures, draws, writes, and remembers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitx.attribution import title_of
from vitx.explanation import Explanation
from vitx.pictures.captions import Caption
from vitx.pictures.colors import as_images, choose_colors
from vitx.runs import GRIDS, OVERVIEW
from vitx.watch.attempts import Attempts
from vitx.watch.explaining import Explainer
from vitx.watch.host import Host
from vitx.watch.images import Samples
from vitx.watch.keeping import Keeper, Look
from vitx.watch.past import Past
from vitx.watch.quiet import same_random_numbers
from vitx.watch.saying import first_words
from vitx.watch.scales import likely_scales
from vitx.watch.seen import seen_in
from vitx.watch.settings import Settings
from vitx.watch.showing import about, captions, draw, draw_overview, measure
from vitx.watch.sinks import Picture, drop_from, name_of, show_picture, write_scalars
from vitx.watch.step import StepWatch, is_compiled

_TRIES = 2  # steps to watch until one shows what a batch means


class Observer(Settings):
    """Watches one training, as its settings say; each method is called on all ranks.

    A callback is an observer that tells it when to look.
    """

    def forget(self) -> None:
        """Makes ready for a training from its start."""
        self._explainer = Explainer(self.methods, self.target, self.forward_fn, self.class_names)
        self._past = Past()
        self._attempts = Attempts(raises=self.on_error == "raise")
        self._keeper = Keeper(self, self._attempts)
        self._steps_to_watch = _TRIES
        self.let_go()

    def let_go(self) -> None:
        """Lets the images go."""
        self._samples: Samples | None = None
        self._look: Look | None = None
        self._overview: Callable[[], Picture] | None = None  # draws that of the last firing

    def close(self) -> None:
        """Lets go of the images and of the folder of the run."""
        self.let_go()
        self._keeper.close()

    def end(self, host: Host) -> None:
        """Shows all maps of the last firing at once, and says in the folder that the training has ended."""
        self._attempts.on_first(host, partial(self._end, host))

    def _end(self, host: Host) -> None:
        if self._overview is not None:
            with self._attempts.forgiving(host, "shows no overview"):
                self._show_picture(host, OVERVIEW, self._overview(), self._past.step)
        self._keeper.end(host)

    @contextmanager
    def step(self, module: nn.Module, batch: Any, where: str) -> Iterator[None]:
        """Watches a step of the user's own on a batch as the watched images come in, until one was seen.

        Args:
            module: the one whose step it is.
            batch: of the step.
            where: how a user calls the step.
        """
        self._steps_to_watch -= 1
        known = self._explainer.seen is not None and not self._only_trained(where)
        if known or self._steps_to_watch < 0 or is_compiled(module):
            yield
            return
        watch = StepWatch(module, batch)
        with watch.watching():
            yield
        self._explainer.seen = seen_in(watch, where)
        if self._explainer.seen is not None:
            self._explainer.kind = None
            self.let_go()  # they are chosen anew, as they are known better now

    def _only_trained(self, where: str) -> bool:
        """Whether a step of the training was seen, and this is one of a validation, which tells more."""
        seen = self._explainer.seen
        return seen is not None and seen.where == "training_step" != where

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run must know: which images were watched, and what was seen last."""
        return dict(vars(self._past))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after the last firing; what another version of vitx kept besides is left out."""
        known = vars(Past())
        self._past = Past(**{name: value for name, value in state_dict.items() if name in known})

    def resume(self, host: Host, moment: int, next_step: int) -> None:
        """Takes up the thread of an interrupted run.

        Args:
            host: the training.
            moment: at which the run goes on; what was due there was shown.
            next_step: what the interrupted run wrote there and later is void.
        """
        self._past.fired_at = moment
        host.publish(self._past.scalars)
        self._attempts.on_first(host, partial(self._go_on, host, next_step))

    def _go_on(self, host: Host, next_step: int) -> None:
        """Goes on in the logs of the interrupted run, and in its folder."""
        for sink in host.sinks:
            self._attempts.write(host, sink, partial(drop_from, sink, next_step))
        self._keeper.reopen(host, self._past, next_step)

    def observe(self, host: Host, step: int, moment: int | None = None) -> Mapping[str, float]:
        """Explains and logs, once for each step.

        Args:
            host: the training.
            step: what pictures and numbers are logged at.
            moment: of the training, at which it is done but once; by default the step.

        Returns:
            The numbers, tag -> value; none where nothing was due or found.
        """
        moment = step if moment is None else moment
        due = self._past.fired_at != moment and step > self._past.step
        self._past.fired_at = moment
        if not due:
            return {}
        self._past.step = step
        with (
            self._attempts.forgiving(host, "shows nothing", f" at step {step}"),
            same_random_numbers(),
            torch.inference_mode(False),
            host.paused(),
        ):
            return self._show(host, step)
        return {}  # type: ignore[unreachable]  # what failed was said

    def _show(self, host: Host, step: int) -> Mapping[str, float]:
        """Every rank explains its share of the images; rank 0 writes what all found."""
        if self._samples is None:
            self._samples = host.group.from_first(partial(self._choose, host))
        samples, model = self._samples, host.explained(self.weights)
        if host.group.rank == 0 and (difference := self.difference(samples)):
            host.warn(f"{host.name}: {difference}")
        found, errors = self._explainer.explain(host, model, samples)
        if errors and (not found or self.on_error == "raise"):
            raise next(iter(errors.values()))
        for name, error in errors.items():
            self._attempts.say(host, f"shows no {title_of(name)}", error, f" at step {step}")
        if not found:
            return {}  # what failed before, and was said, is not tried now
        # Sharded models may differ in the last bits among ranks, whose monitors must agree.
        numbers = host.group.from_first(partial(measure, found, samples.masks, self._past.maps))
        self._past.maps = {name: explanation.maps for name, explanation in found.items()}
        if self.faithfulness:
            with self._attempts.forgiving(host, "measures no faithfulness", f" at step {step}"):
                of = model, samples, found, self.faithfulness
                judged = self._explainer.faithfulness(host, *of)
                numbers |= {f"vitx/{name}": number for name, number in judged.items()}
        self._past.scalars = numbers
        host.publish(numbers)
        self._attempts.on_first(host, partial(self._write, host, found, samples, numbers, step))
        return numbers

    def difference(self, samples: Samples) -> str | None:
        """Says how the images differ from those that the training gives the model; None: nothing is known."""
        return None

    def hint(self, samples: Samples) -> str | None:
        """Says where the images may differ from those; None where nothing tells so."""
        return None

    def _write(
        self,
        host: Host,
        found: Mapping[str, Explanation],
        samples: Samples,
        numbers: Mapping[str, float],
        step: int,
    ) -> None:
        """Writes numbers, maps and the grid; what fails here takes nothing else with it."""
        for sink in host.sinks:
            self._attempts.write(host, sink, partial(write_scalars, sink, numbers, step))
        kind, keeper, words = self._explainer.kind, self._keeper, None
        if self.save_maps:
            keeper.claim(host, self._past)
        with self._attempts.forgiving(host, "shows no picture", f" at step {step}"):
            if self._look is None:
                self._look, words = self._looked_at(host, samples, next(iter(found.values())).channels)
                if self.save_maps:
                    keeper.keep_look(host, samples, self._look, kind, step)
        if self.save_maps:
            keeper.keep_firing(host, found, samples, kind, step)
            keeper.keep_numbers(host, numbers, step)
        if self._look is None:
            return  # type: ignore[unreachable]  # what failed was said
        with self._attempts.forgiving(host, "shows no picture", f" at step {step}"):
            look, said = self._look, [Caption("")] * len(samples.shown)
            with self._attempts.forgiving(host, "shows no captions", f" at step {step}"):
                said = captions(found, samples, look.class_names, kind, samples.shown)
            picture = draw(found, samples, look.pixels, said, look.colormap, look.note)
            if look.pixels.ndim == 4:
                self._overview = partial(draw_overview, found, samples, look, kind)
            places = self._show_picture(host, GRIDS, picture, step)
            if words is not None:
                kept = keeper.folder.path if keeper.folder and self.save_maps else None
                host.inform(f"{host.name} {words(kept, places)}")

    def learn(self, host: Host) -> None:
        """Adds to the numbers of the last firing what the training has found since, at the same step."""
        if self.save_maps:
            self._keeper.keep_numbers(host, self._past.scalars, self._past.step)

    def _looked_at(
        self, host: Host, samples: Samples, channels: int | None
    ) -> tuple[Look, Callable[[Path | None, Sequence[str]], str]]:
        """Draws the images shown in their true colours, and finds words for what is watched."""
        images = as_images(samples.images, channels)
        scales = likely_scales(host.model, images, samples.scales, host.normalisers())
        told = self.bands, self.normalization
        colors = choose_colors(images, scales, *told, colored=channels is not None)
        pixels = colors.draw(samples.images[list(samples.shown)], channels)
        names = self.class_names or samples.class_names or host.class_names()
        hints = [self.hint(samples), *self._explainer.doubts(samples, names)]
        names = names if self._explainer.fits(names) else None
        said = about(self.target, names, self._explainer.kind)
        note = "; ".join(filter(None, (colors.note, said)))
        look = Look(pixels, colors, names, self.colormap, note)
        return look, partial(first_words, samples, self._explainer, colors, names, list(filter(None, hints)))

    def _choose(self, host: Host) -> Samples:
        samples = self.selection.choose(host, self._past.places, self._explainer.seen)
        if change := self._past.meet(samples):
            host.warn(f"{host.name}: {change}")
        return samples

    def _show_picture(self, host: Host, tag: str, picture: Picture, step: int) -> list[str]:
        """Shows a picture in every sink that can; where none took it, writes a file. Returns where it is."""
        shows = [partial(show_picture, sink, tag, picture, step) for sink in host.sinks]
        taken = [
            name_of(sink)
            for sink, show in zip(host.sinks, shows, strict=True)
            if self._attempts.write(host, sink, show)
        ]
        file = None if taken else self._keeper.keep_picture(host, self._past, tag, picture, step)
        return taken if file is None else [file]
