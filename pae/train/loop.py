"""The training loop: one run from options to a tested checkpoint, killable at any moment.

A run is a function of its options. Order, crops and cuts are drawn from (seed, epoch, image), the
model's own random stream is saved with the state, and the state is replaced atomically; so a
resumed run repeats, bit for bit on a CPU, what the uninterrupted one would have done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

import pae
from pae.train import methods, pixels, record
from pae.train.average import Average
from pae.train.callbacks import Callback
from pae.train.data import Task
from pae.train.declared import declared
from pae.train.images import Ranges
from pae.train.memory import Peak
from pae.train.options import Options
from pae.train.report import Advance, Reporter, shown
from pae.train.runfolder import Rows, RunFolder
from pae.train.scores import score_of
from pae.train.tasks import Shown, kind_of

if TYPE_CHECKING:
    from accelerate import Accelerator

# upon these a run saves its state and stops; batch systems send the last ones ahead of a kill
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
LOOK_EVERY = 16  # updates; a GPU would have to be waited for if it were asked at every one

OnStart = Callable[[nn.Module], None]
OnBackward = Callable[[nn.Module, int], None]
Features = MutableMapping[str, "tuple[FeatureData, float]"]  # and the seconds that they took
# what they depend on, beside the images and the weights
_OF_FEATURES = (
    *(o.name for o in declared(Options).values() if o.group in ("images", "backbone")),
    *("engine", "batch_size", "device", "amp"),
)


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


class _Asked(Exception):
    """The run was asked to stop, and is between two steps."""


# what `load_task` reads
TASK_OPTIONS = (
    *("task", "dataset", "data", "protocol", "protocol_task", "shots", "draw", "train_on"),
    *("train_size", "val_size", "test_size", "split_seed", "seed"),
    *("class_names", "base_to_new"),
    *("image_column", "label_column"),
)


def load_task(options: Options) -> Task:
    """The `Task` that the options name, read as their `--task` reads it.

    Raises:
        ValueError, FetchError: naming the folder, the file or the set.
    """
    return kind_of(options).read()


def make_accelerator(options: Options) -> Accelerator:
    """accelerate's view of the machine: device, mixed precision, processes."""
    from accelerate import Accelerator

    return Accelerator(cpu=options.device == "cpu", mixed_precision=options.amp)


def train(
    options: Options,
    task: Task,
    folder: RunFolder,
    accelerator: Accelerator,
    reporter: Reporter,
    *,
    name: str | None = None,
    resume: str | None = None,
    sibling: record.Record | None = None,
    test: bool = True,
    features: Features | None = None,
    on_start: OnStart | None = None,
    on_backward: OnBackward | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Trains one method and tests the checkpoint that `options.keep` names.

    Args:
        options: resolved `Options`.
        task: a `Task`.
        folder: a `RunFolder`; new, or that of the run to go on with. Other processes are kept out
            of it meanwhile.
        accelerator: from `make_accelerator`.
        reporter: a `Reporter`.
        name: what to call the run in tables; the method by default.
        resume: None for a new run; "last" or "previous" for the state to go on from; "auto" for
            the last one, or the one before it where the last is damaged.
        sibling: the record of a run that this one is compared with; both must have the same images
            and the same backbone.
        test: whether test images are looked at. A run that finished without is tested when it goes
            on with them.
        features: what linear probes of this process computed so far, to be used and added to.
        on_start: called as `on_start(module)` in a new run, once the prompts have their first
            values and before anything is made of them.
        on_backward: called as `on_backward(module, update)` after every backward pass, before
            gradients are clipped and used; updates count from 0.
        callbacks: told of the run's moments, in the main process.
    Returns:
        dict with "name", "trained_parameters", "val_accuracy" (None where all images are trained
        on), "best_epoch" (the tested one), "tested" (in words), "test_accuracy" (None where nothing
        was tested), "seconds", and what that was spent on: "passes" of an image through the
        backbone (forward, or backward), "mpa_passes" and "mpa_seconds" among them; "memory_mb", the
        most that it took (`memory.Peak`), and "head_parameters", of the trained ones those of the
        head.
    Raises:
        Interrupted: one of `SIGNALS` arrived; the state is saved.
        ArithmeticError: a loss is not finite.
        CheckpointError, ValueError: see `RunFolder`, `methods.build_method`; the run to go on with
            had other images, another backbone or other settings.
    """
    with folder.held() if accelerator.is_main_process else contextlib.nullcontext():
        finished = None if resume is None else folder.result()
        untested = finished is not None and score_of(finished, "test") is None
        if finished is not None and not (untested and test and task.test):
            return finished
        place = options, task, folder, accelerator, reporter
        run = _Run(*place, name, resume, on_start, on_backward, sibling, test, features)
        run.callbacks = list(callbacks) if run.main else []
        try:
            for callback in run.callbacks:
                config = dataclasses.asdict(options)
                callback.on_train_begin(run.module, config, folder.path)
            return run.train()
        finally:
            for callback in run.callbacks:
                callback.close()


class _Run:
    """The state of one run between steps; every method keeps it consistent."""

    callbacks: Sequence[Callback] = ()

    def __init__(
        self,
        options: Options,
        task: Task,
        folder: RunFolder,
        accelerator: Accelerator,
        reporter: Reporter,
        name: str | None,
        resume: str | None,
        on_start: OnStart | None,
        on_backward: OnBackward | None,
        sibling: record.Record | None = None,
        test: bool = True,
        features: Features | None = None,
    ) -> None:
        from accelerate.utils import set_seed
        from timm.optim import create_optimizer_v2

        self.began = time.perf_counter()
        self.peak = Peak(accelerator.device)
        self.options, self.folder, self.reporter = options, folder, reporter
        self.accelerator, self.on_backward = accelerator, on_backward
        self.name = name or options.method
        self.main = accelerator.is_main_process

        self.alignment: pae.MPAResult | None = None  # where this process made the first prompts
        self.aligned = {"mpa_passes": 0, "mpa_seconds": 0.0}  # what that took
        self.resume, self.test = resume, test
        self.features: Features = {} if features is None else features
        saved = None if resume is None else self._read_state(resume)
        set_seed(options.seed)
        self.kind, self.task = kind_of(options), task
        self.module = self.kind.build(task, reporter.say).to(accelerator.device)
        self.prompted = self.kind.prompted(self.module)
        self.data_config = self._data_config()
        side = self.data_config["input_size"][-1]
        self.record = record.describe(options, task, self._backbone(), side)
        self._compare(saved, sibling)
        self.train_data, self.val_data, self.test_data = self._data(task)
        self.batches = math.ceil(len(self.train_data) / options.batch_size)  # of an epoch
        self.drawn = len(self.train_data)  # images of an epoch
        if options.per_class is not None:
            self.labels = torch.tensor(task.train.labels)
            self.drawn = self.batches * options.batch_size
            self._epoch_batches(0)  # which may refuse
        if saved is None:
            self._write_config(task)
            if options.mpa:
                self._align()
            if options.spt:
                self._take_tokens()
            self.kind.start(self.module, lambda: self.train_data.batches(self._every_image(0)))
            if on_start is not None:
                on_start(self.module)
        # DDP copies the parameters of process 0 to all; from here on each draws its own dropout
        torch.manual_seed(options.seed + accelerator.process_index)

        self.wrapped = accelerator.prepare_model(self.module)
        groups = methods.parameter_groups(self.module, options)
        try:
            optimizer = create_optimizer_v2(
                groups,
                opt=options.optimizer,
                lr=options.lr,
                weight_decay=options.weight_decay,
                momentum=0.9,
            )
        except (AssertionError, ValueError, TypeError) as error:
            raise ValueError(f"--optimizer {options.optimizer}: {error}") from error
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.scheduler = _make_scheduler(options, optimizer, self.batches)
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.average = None if options.ema is None else Average(self.trained, options.ema)

        self.epoch = self.step = self.updates = 0  # all counted in finished units
        self.rows: Rows = []
        # (score, -loss, epoch) of what best.safetensors holds
        self.best: tuple[float | None, float | None, int] | None = None
        self.seconds = 0.0  # spent before this process took over
        self.sums = self._no_sums()
        self.losses: list[tuple[Tensor, Tensor]] = []  # of the steps that were not looked at yet
        self.settled = True  # whether the state is that between two steps
        self.signals = _Signals()
        if saved is not None:
            self._restore_or_refuse(saved)
        elif options.mpa or options.spt or on_start is not None:
            self._save()  # the first prompts are worth keeping

    def train(self) -> dict[str, Any]:
        """All remaining epochs, then the test."""
        options, reporter = self.options, self.reporter
        total = options.epochs * self.batches
        with (
            handled(self.signals.note),
            reporter.progress(f"{self.name}: starting", total, self.updates) as advance,
        ):
            while self.epoch < options.epochs:
                try:
                    self._train_epoch(advance)
                    self._finish_epoch()
                except _Asked:
                    self._save()
                    self._write_last()
                    raise Interrupted from None
                except RuntimeError as error:
                    if not self.signals.explain(error):
                        raise
                    if self.settled and self.accelerator.num_processes == 1:
                        self._save()
                        self._write_last()
                    raise Interrupted from None
                row, score = self.rows[-1], self.kind.score
                advance(0, f"{self.name}: val {shown(row[f'val_{score}'])}")
                if self.epoch % max(1, options.epochs // 10) and self.epoch < options.epochs:
                    continue  # some ten lines say how it goes; metrics.csv has them all
                reporter.say(
                    f"{self.name}  epoch {row['epoch']}/{options.epochs}"
                    f"  loss {row['train_loss']:.4f}  train {row[f'train_{score}']:.3f}"
                    f"  val {shown(row[f'val_{score}'])}  {row['seconds']:.1f} s"
                )
        try:
            return self._finish()
        except _Asked:  # all there is to save is saved
            raise Interrupted from None

    def _data(self, task: Task) -> list[Any]:
        """Pipelines of the three splits; for a linear probe, of their features."""
        options, config = self.options, self.data_config
        size = config["input_size"]
        mean, std = pixels.normalisation(options.norm, config)
        ranges = self.data_ranges = cast(Ranges, task.surveyed(options.workers).ranges)
        self.module.task = pae.TaskInfo(
            classes=tuple(task.classes),
            input_size=(len(mean), *size),
            mean=tuple(mean),
            std=tuple(std),
            interpolation=self.interpolation,
            **self.kind.evaluation_crop(config),
            integer_white=ranges.integer,
            real_white=ranges.real,
            backbone=methods.portable(methods.recipe(options)),
        )

        shown = Shown(
            *(config, size, self.interpolation, ranges),
            *(mean, std, self.accelerator.device),
        )
        linear = isinstance(self.module, methods.LinearProbe)
        splits = {"train": task.train, "val": task.val, "test": task.test if self.test else None}
        # features are computed once, so a probe sees the images as evaluation shows them
        makes = {
            name: partial(self.kind.pipeline, images, name == "train" and not linear, shown)
            for name, images in splits.items()
            if images
        }
        if linear:
            return [self._features(s, makes[s]) if s in makes else None for s in splits]
        return [makes[s]() if s in makes else None for s in splits]

    @property
    def interpolation(self) -> str:
        """Of the resize: what the options say, else the backbone's own."""
        asked = self.options.interpolation
        return self.data_config["interpolation"] if asked == "model" else asked

    def _data_config(self) -> dict[str, Any]:
        """timm's: normalisation, interpolation, and the (height, width) of the images."""
        config = methods.data_config(self._backbone())
        size = config["input_size"]
        if size[0] != size[1]:
            raise ValueError(
                f"--model {self.options.model}: takes {size} images, expected square ones"
            )
        return config

    def _read_state(self, which: str) -> dict[str, Any] | None:
        if which != "auto":
            return self.folder.read_state(previous=which == "previous")
        try:
            return self.folder.read_state()
        except pae.CheckpointError as error:
            try:
                state = self.folder.read_state(previous=True)
            except pae.CheckpointError:
                raise error from None
            self.reporter.warn(
                f"{error.args[0].partition(';')[0]}: going on from the one before it"
            )
            return state

    def _compare(self, saved: dict[str, Any] | None, sibling: record.Record | None) -> None:
        """Refuses to go on with another run than the one that was saved."""
        path = self.folder.path
        if sibling is not None and (found := record.differences(sibling, self.record, False)):
            raise ValueError(
                f"{path} cannot be compared with the runs beside it: {'; '.join(found)}; "
                f"{self.folder.anew[1]}"
            )
        if saved is None and self.resume is not None:
            self.reporter.warn(f"{path} holds no state yet: the run begins from its first step")
        was = None if saved is None else saved.get("record")
        if saved is not None and was is None:
            self.reporter.warn(
                f"{path}: an older pae wrote the state, which does not say of which images and "
                "weights; they are not compared"
            )
        if was is None:
            return
        if found := record.differences(was, self.record):
            raise pae.CheckpointError(
                f"{path} cannot go on, for it was another run: {'; '.join(found)}; "
                f"{self.folder.anew[0]}"
            )
        if found := record.drift(was, self.record):
            self.reporter.warn(
                f"{path}: {'; '.join(found)}: the numbers may differ a little from those of a run "
                "without a stop"
            )

    def _backbone(self) -> nn.Module:
        if isinstance(self.module, methods.LinearProbe):
            return self.module.frozen.backbone
        return self.module.backbone

    def _features(self, split: str, make: Callable[[], pixels.Pipeline]) -> FeatureData:
        """The frozen features of a split, as a split; every process computes all of them, unless a
        run before has. The time that they took is this run's too.
        """
        began, options = time.perf_counter(), self.options
        decides = [getattr(options, name) for name in _OF_FEATURES]
        key = repr([self.record[name] for name in ("backbone", "image_size")])
        key += repr([self.record["splits"][split], self.data_ranges, *decides])
        if key not in self.features:
            data = self._computed(make())
            self.features[key] = data, time.perf_counter() - began
        data, seconds = self.features[key]
        self.began -= seconds - (time.perf_counter() - began)
        return data

    @torch.no_grad()
    def _computed(self, data: pixels.Pipeline) -> FeatureData:
        assert isinstance(self.module, methods.LinearProbe)
        index_lists = pixels.sequential_batches(len(data), self.options.batch_size)
        parts = []
        with self.reporter.progress(f"{self.name}: features", len(index_lists)) as advance:
            for images, _ in data.batches(index_lists):
                with self.accelerator.autocast():
                    parts.append(self.module.features(images).float())
                advance()
        return FeatureData(torch.cat(parts), data.split.labels.to(self.accelerator.device))

    def _align(self) -> None:
        """Modal Pre-Alignment on the first images of the first epoch."""
        options, began = self.options, time.perf_counter()
        order = torch.cat(self._every_image(0))[: options.mpa_images]
        ((images, labels),) = self.train_data.batches([order])
        found = self.alignment = pae.mpa_init(
            cast(pae.PromptedViT, self.prompted),
            images,
            labels,
            window=options.mpa_window,
            stride=options.mpa_stride,
            head=options.mpa_head,
            search=options.mpa_search,
            precision=options.mpa_precision,
            devices="ranks",
            progress=self.reporter.active and not self.reporter.quiet,
        )
        seconds = time.perf_counter() - began
        self.aligned = {"mpa_passes": found.forwards, "mpa_seconds": round(seconds, 3)}
        self.reporter.say(f"{self.name}: {found.report()}")

    def _take_tokens(self) -> None:
        """SPT: prompts start as tokens of the training images; every process draws the same."""
        batches = self.train_data.batches(self._every_image(0))
        model, method = cast(pae.PromptedViT, self.prompted), cast(str, self.options.spt)
        pae.spt_init(model, batches, method=method, seed=self.options.seed)

    def _epoch_batches(self, epoch: int) -> list[Tensor]:
        options = self.options
        if options.per_class is None:
            return self._every_image(epoch)
        place = options.batch_size, options.per_class, options.seed, epoch
        return pixels.balanced_batches(self.labels, *place)

    def _every_image(self, epoch: int) -> list[Tensor]:
        options = self.options
        return pixels.epoch_batches(len(self.train_data), options.batch_size, options.seed, epoch)

    def _train_epoch(self, advance: Advance) -> None:
        """The steps of this epoch that are not done yet."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        shares = [pixels.share(b, rank, world) for b in self._epoch_batches(self.epoch)]
        shares = shares[self.step :]
        methods.start_training(self.wrapped, self.options)
        if self.prompted is not None and self.step == 0:
            self.settled = False  # until the first step: what starts an epoch must not start twice
            counted = [indices for indices, weight in shares if weight > 0]
            self._start_prompts(
                self.prompted.prompts, counted or [indices for indices, _ in shares[:1]]
            )
        data = self.train_data.batches([indices for indices, _ in shares], self.epoch)
        every = self.options.save_every_steps
        for (inputs, labels), (_, weight) in zip(data, shares, strict=True):
            self.settled = False
            self._train_step(inputs, labels, weight)
            self.settled = True
            advance()
            save = bool(every) and self.updates % every == 0
            self._look(at_once=save)
            if save:
                self._save()
        self._look(at_once=True)

    def _train_step(self, inputs: Tensor, labels: Tensor, weight: float) -> None:
        gathered = None
        if self.prompted is not None:
            self.prompted.prompts.see_labels(labels)
            if weight == 0:  # an image of another process's share, counted there
                gathered = self.prompted.prompts.rank_state()
        outputs = self.kind.forward(self.wrapped, inputs)
        loss = self.kind.loss(self.module, outputs, labels)
        penalty = self.module.penalty()
        self.losses.append((loss.detach(), penalty.detach()))
        self.accelerator.backward(loss * weight + penalty)
        if self.on_backward is not None:
            self.on_backward(self.module, self.updates)
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.prompted is not None and gathered is not None:
            self.prompted.prompts.load_rank_state(gathered)
        self._after_step()
        if weight > 0:
            with torch.no_grad():
                self.sums += self.kind.sums(self.module, outputs, labels, loss)

    def _look(self, at_once: bool) -> None:
        """Between two steps: raises if a loss was not finite, or if the run was asked to stop.

        All processes do so alike, or they would wait for one another.

        Args:
            at_once: look at the losses, though a GPU must be waited for.
        """
        accelerator = self.accelerator
        alone = accelerator.num_processes == 1
        seen = self.signals.seen
        on_gpu = accelerator.device.type == "cuda"
        if on_gpu and self.updates % LOOK_EVERY and not at_once and not (alone and seen):
            return
        bad = self._not_finite()
        if not alone:
            flags = [float(seen), float(bad is not None)]
            told = accelerator.reduce(torch.tensor(flags, device=accelerator.device), "sum")
            seen, any_bad = (flag > 0 for flag in told.tolist())
            if any_bad and bad is None:
                bad = (
                    f"the training loss of epoch {self.epoch + 1} is not finite in another process"
                )
        if bad is not None:
            raise self._stopped(bad)
        if seen:
            raise _Asked

    def _not_finite(self) -> str | None:
        """The first loss since the last look that is not finite, in words."""
        losses, self.losses = self.losses, []
        if not losses:
            return None
        values = (torch.stack([part.double() for part in parts]).tolist() for parts in zip(*losses))
        first = self.step - len(losses) + 1
        for step, (loss, penalty) in enumerate(zip(*values, strict=True), first):
            parts = {"the training loss": loss, "the penalty beside the loss": penalty}
            for what, value in parts.items():
                if not math.isfinite(value):
                    epoch = self.epoch + 1
                    return f"{what} of epoch {epoch} is {value} in step {step} of the epoch"
        return None

    def _stopped(self, what: str) -> ArithmeticError:
        """The error that ends a run whose numbers are no numbers."""
        options = self.options
        more = ", or --amp bf16 or no" if options.amp == "fp16" else ""
        kept = f"; {self.folder.path} keeps epoch {self.epoch}" if self.epoch else ""
        return ArithmeticError(f"{what}; try a lower --lr than {options.lr:g}{more}{kept}")

    def _start_prompts(self, prompts: pae.prompts.PromptFamily, batches: list[Tensor]) -> None:
        """Lets the family look at the training data before an epoch, if it wants to."""
        module: Any = self.module

        def passes() -> Iterator[tuple[Tensor, Tensor]]:
            return self.train_data.batches(batches, self.epoch)

        def losses() -> Iterator[tuple[Tensor, int]]:
            for images, labels in passes():
                with self.accelerator.autocast():
                    outputs = self.kind.forward(module, images)
                yield self.kind.loss(module, _float(outputs), labels), len(labels)

        prompts.remap(cast(pae.PromptedViT, self.prompted), passes())
        last_loss = self.rows[-1]["train_loss"] if self.rows else None
        prompts.start_of_epoch(losses, list(module.head.parameters()), last_loss)

    def _clip(self) -> None:
        """PAE clips the regulariser's gradients to norm 10; the options clip all, after that."""
        kld = None if self.prompted is None else self.prompted.kld
        norm, value = self.options.clip_norm, self.options.clip_value
        if kld is None and norm is None and value is None:
            return
        self.accelerator.unscale_gradients(self.optimizer)
        if kld is not None:
            kld.clip_gradients()
        if norm is not None:
            nn.utils.clip_grad_norm_(self.trained, norm)
        if value is not None:
            nn.utils.clip_grad_value_(self.trained, value)

    def _after_step(self) -> None:
        self.step += 1
        self.updates += 1
        if self.scheduler is not None:  # one of the two does something
            self.scheduler.step_update(self.updates)
            self.scheduler.step(self.updates // self.batches)
        if self.average is not None:
            self.average.update(self.updates)
        if self.prompted is not None:
            self.prompted.prompts.end_of_step()

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the module is what is validated and saved: the average, if there is."""
        return contextlib.nullcontext() if self.average is None else self.average.used()

    def _finish_epoch(self) -> None:
        """Validates, keeps the best, writes metrics and state."""
        train, _ = self._means(self.sums, self.drawn)
        val: dict[str, Any] = dict.fromkeys(self.kind.metrics)
        if self.val_data:
            with self._averaged():
                val, _ = self._evaluate(self.val_data)
        val_loss, score = val["loss"], val[self.kind.score]
        if val_loss is not None and not math.isfinite(val_loss):
            raise self._stopped(f"the validation loss of epoch {self.epoch + 1} is {val_loss}")
        self.settled = False
        self.epoch += 1
        self.rows.append(
            {
                "epoch": self.epoch,
                "images": self.epoch * self.drawn,
                **{f"train_{name}": value for name, value in train.items()},
                **{f"val_{name}": value for name, value in val.items()},
                "lr": self.optimizer.param_groups[0]["lr"],
                "seconds": round(self._elapsed(), 3),
            }
        )
        if self._is_kept(score, val_loss):
            self.best = (score, val_loss and -val_loss, self.epoch)
            if self.main:
                with self._averaged():
                    self.module.save(self.folder.best)
        if self.prompted is not None:
            self.prompted.prompts.end_of_epoch()  # may move prompts: what was measured is saved
        self.step, self.sums = 0, self._no_sums()
        self.settled = True
        self._save()
        if self.main:
            try:
                self.folder.write_metrics(self.rows)
            except OSError as error:  # the state, which was saved, has the rows too
                self.reporter.warn(f"{self.folder.metrics_json} was not written: {error}")
        for callback in self.callbacks:
            callback.on_epoch_end(self.module, dict(self.rows[-1]))

    def _is_kept(self, score: float | None, loss: float | None) -> bool:
        """Whether best.safetensors takes this epoch."""
        if self.options.keep == "last" or score is None or loss is None:
            return self.epoch == self.options.epochs
        return self.best is None or (score, -loss) > cast(Any, self.best[:2])

    def _finish(self) -> dict[str, Any]:
        """Tests the checkpoint that is kept; writes the result, which marks the run as finished."""
        self._write_last()
        self.accelerator.wait_for_everyone()
        self.module.load(self.folder.best)
        assert self.best is not None  # there was an epoch
        epoch, names = self.best[2], self.kind.metrics[1:]
        val = {name: self.rows[epoch - 1][f"val_{name}"] for name in names}
        test: dict[str, Any] = dict.fromkeys(names)
        details: dict[str, Any] = {}
        if self.test_data:
            test, sums = self._evaluate(self.test_data)
            if not math.isfinite(loss := test.pop("loss")):
                raise self._stopped(f"the loss of the test images is {loss} in epoch {epoch}")
            details = self.kind.details(sums, self.task)
        result = {
            "name": self.name,
            "method": self.options.method,
            "trained_parameters": methods.trained_parameters(self.module),
            "head_parameters": methods.head_parameters(self.module),
            **{f"val_{name}": value for name, value in val.items()},
            "best_epoch": epoch,
            "tested": "last epoch" if self.options.keep == "last" else "epoch of best validation",
            **{f"test_{name}": value for name, value in test.items()},
            **details,
            "seconds": round(self._elapsed(), 3),
            "passes": self._passes() + self.aligned["mpa_passes"],
            **self.aligned,
            "memory_mb": self.peak.mb(),
        }
        if self.main:
            self.reporter.curves(self.folder.curves, {self.name: self.rows}, {self.name: result})
            self.folder.write_metrics(self.rows, result)  # last: it marks the run as finished
        for callback in self.callbacks:
            callback.on_train_end(self.module, dict(result))
        self.accelerator.wait_for_everyone()
        return result

    @torch.no_grad()
    def _evaluate(self, data: Any) -> tuple[dict[str, float], Tensor]:
        """`Kind.metrics` of a split, and the sums that they are made of; each process takes its
        part.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        index_lists = pixels.sequential_batches(len(data), self.options.batch_size)[rank::world]
        self.wrapped.eval()
        sums = self._no_sums()
        for inputs, labels in data.batches(index_lists):
            if self.signals.seen and self.accelerator.num_processes == 1:
                raise _Asked  # it may take long, and whoever asked may not wait
            model = self._evaluation_model()
            sums += self.kind.sums(self.module, self.kind.forward(model, inputs), labels)
        return self._means(sums, len(data))

    def _passes(self) -> int:
        """Passes of an image through the backbone, MPA's apart: one for a forward, one more for a
        backward to the prompts, another for the gradients of the weights where they learn.

        What a family asks of the images besides (SPT, PRO-VPT, DA-VPT) is not counted.
        """
        train = len(self.train_data)
        val = len(self.val_data) if self.val_data else 0
        test = len(self.test_data) if self.test_data else 0
        if isinstance(self.module, methods.LinearProbe):  # the features, once
            return train + val + test
        of_a_step = 3 if self.options.method == "full" else 2
        return self.options.epochs * (of_a_step * self.drawn + val) + test

    def _evaluation_model(self) -> nn.Module:
        # parts differ in length by a batch, so the wrapper, which waits for all, must not be asked
        return self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=True)

    def _means(self, sums: Tensor, count: int) -> tuple[dict[str, float], Tensor]:
        total = cast(Tensor, self.accelerator.reduce(sums, "sum"))
        return dict(zip(self.kind.metrics, self.kind.means(total, count), strict=True)), total

    def _no_sums(self) -> Tensor:
        """On the device, so that no step waits for them."""
        return self.kind.no_sums().to(self.accelerator.device)

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.began

    def _write_config(self, task: Task) -> None:
        if not self.main:
            return
        self.folder.write_config(
            self.options,
            name=self.name,
            task={"name": task.name, "classes": list(task.classes), **task.sizes()},
            trained_parameters=methods.trained_parameters(self.module),
            pixels=task.pixels,
            processes=self.accelerator.num_processes,
            device=_device_name(self.accelerator.device),
            **{
                name: self.record[name] for name in ("splits", "image_size", "backbone", "versions")
            },
        )

    def _save(self) -> None:
        """Writes state.pt, from which a resumed run goes on."""
        from accelerate.utils import gather_object

        streams: dict[str, Any] = {"sums": self.sums.cpu(), "cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            streams["cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        if self.prompted is not None:
            streams["prompts"] = self.prompted.prompts.rank_state()
        streams = gather_object([streams])
        if not self.main:
            return
        scaler = self.accelerator.scaler
        self.folder.write_state(
            {
                "record": self.record,
                "module": {k: v.cpu() for k, v in self.module.trained_state().items()},
                "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else [v.cpu() for v in self.average.values],
                "scaler": scaler.state_dict() if scaler is not None else None,
                "streams": streams,
                "epoch": self.epoch,
                "step": self.step,
                "updates": self.updates,
                "rows": self.rows,
                "best": self.best,
                "seconds": self._elapsed(),
                "aligned": self.aligned,
            }
        )

    def _write_last(self) -> None:
        if self.main:
            with self._averaged():
                self.module.save(self.folder.last)

    def _restore_or_refuse(self, saved: dict[str, Any]) -> None:
        try:
            self._restore(saved)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise pae.CheckpointError(
                f"{self.folder.state} is not what this version writes ({type(error).__name__}: "
                f"{error}); go on with the one that wrote it, or start anew"
            ) from error

    def _restore(self, saved: dict[str, Any]) -> None:
        streams = saved["streams"]
        if len(streams) != self.accelerator.num_processes:
            raise ValueError(
                f"{self.folder.path} was run by {len(streams)} processes, "
                f"this is {self.accelerator.num_processes}"
            )
        if saved["best"] is not None and not self.folder.best.is_file():
            raise pae.CheckpointError(
                f"{self.folder.best} is gone, the best checkpoint so far (epoch "
                f"{saved['best'][2]}); put it back, or start a new run"
            )
        methods.load_trained_state(self.module, saved["module"], self.folder.state)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average is not None:
            for value, stored in zip(self.average.values, saved["average"], strict=True):
                value.copy_(stored)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.step, self.updates = saved["epoch"], saved["step"], saved["updates"]
        self.rows, self.best = saved["rows"], saved["best"]
        self.seconds = saved["seconds"]
        self.aligned = saved.get("aligned", self.aligned)  # an older pae did not count
        mine = streams[self.accelerator.process_index]
        if self.prompted is not None and "prompts" in mine:
            self.prompted.prompts.load_rank_state(mine["prompts"])
        self.sums = mine["sums"].to(self.accelerator.device)
        torch.set_rng_state(mine["cpu"])
        if "cuda" in mine:
            torch.cuda.set_rng_state(mine["cuda"], self.accelerator.device)
        if self.updates > 0 and self.epoch < self.options.epochs:
            self.reporter.say(f"{self.name}: going on at epoch {self.epoch + 1}, step {self.step}")


class FeatureData:
    """Features (N, F) and labels (N,) on the device, with the face of `pixels.Pipeline`."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, index_lists: Iterable[Tensor], epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (features (B, F), labels (B,)) for every index list."""
        for indices in index_lists:
            indices = indices.to(self.labels.device)
            yield self.features[indices], self.labels[indices]


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Has `SIGNALS` handled by `handler` inside a block, in the main thread.

    A signal that is ignored on entry stays so: under nohup a run outlives its terminal.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name, None) for name in SIGNALS):
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler that makes any signal a Ctrl-C: where nothing is to be saved yet, or any more."""
    raise KeyboardInterrupt


class _Signals:
    """Whether one of `SIGNALS` arrived; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.seen = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if self.seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.seen = True

    def explain(self, error: RuntimeError) -> bool:
        """Whether `error` says that workers ended, and they did because of a signal to all."""
        if "DataLoader worker" not in str(error):
            return False
        for _ in range(20):  # ours may come after theirs
            if self.seen:
                return True
            time.sleep(0.05)
        return False


def _make_scheduler(
    options: Options, optimizer: torch.optim.Optimizer, batches_per_epoch: int
) -> Any:
    """timm's schedule, a pure function of the number of updates; VPT's of the number of epochs."""
    from timm.scheduler import CosineLRScheduler, create_scheduler_v2

    if options.scheduler == "none":
        return None
    if options.scheduler == "vpt":
        warm = cast(int, options.warmup_epochs)
        left = max(1, options.epochs - warm)
        return CosineLRScheduler(optimizer, left, warmup_t=warm, warmup_prefix=True)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=options.scheduler,
        num_epochs=options.epochs,
        warmup_epochs=cast(int, options.warmup_epochs),  # fractions are fine, and used
        warmup_lr=options.warmup_lr or 0.0,
        decay_rate=options.poly_power if options.scheduler == "poly" else 0.1,
        decay_epochs=max(1, options.epochs // 3),
        step_on_epochs=False,
        updates_per_epoch=batches_per_epoch,
    )
    if options.warmup_lr is not None:  # timm's rises from its warm-up rate by these steps
        scheduler.warmup_steps = [0.0] * len(scheduler.warmup_steps)
    scheduler.step_update(0)
    return scheduler


def _float(outputs: Any) -> Any:
    """In fp32, as accelerate gives what a wrapped module makes under autocast."""
    from accelerate.utils import convert_to_fp32

    return convert_to_fp32(outputs)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} cpu, {torch.get_num_threads()} threads"
