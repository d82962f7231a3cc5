"""The training loop: one run from settings to a tested checkpoint, killable at any moment.

A run is a function of its settings. Order, crops and cuts are drawn from (seed, epoch, image), the
model's own random stream is saved with the state, and the state is replaced atomically; so a
resumed run repeats, bit for bit on a CPU, what the uninterrupted one would have done.
"""

from __future__ import annotations

import math
import platform
import signal
import threading
import time

import torch
import torch.nn.functional as F

import pae
from pae.train import embedded, methods, pixels
from pae.train.data import read_folder
from pae.train.report import plot_curves


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


def load_task(settings):
    """The `Task` that the settings name: an embedded set or a folder.

    Raises:
        ValueError, FetchError: as `read_folder` and `embedded.load_task`.
    """
    sizes = {"train_size": settings.train_size, "val_size": settings.val_size}
    if settings.data is not None:
        return read_folder(settings.data, **sizes, seed=settings.seed)
    return embedded.load_task(settings.dataset, **sizes, seed=settings.seed)


def make_accelerator(settings):
    """accelerate's view of the machine: device, mixed precision, processes."""
    from accelerate import Accelerator

    return Accelerator(cpu=settings.device == "cpu", mixed_precision=settings.amp)


def train(
    settings,
    task,
    folder,
    accelerator,
    reporter,
    *,
    name=None,
    resume=None,
    on_start=None,
    on_backward=None,
):
    """Trains one method and tests the checkpoint with the best validation accuracy.

    Args:
        settings: resolved `Settings`.
        task: a `Task`.
        folder: a `RunFolder`; new, or that of the run to go on with.
        accelerator: from `make_accelerator`.
        reporter: a `Reporter`.
        name: what to call the run in tables; the method by default.
        resume: None for a new run, "last" or "previous" for the state to go on from.
        on_start: called as `on_start(module)` in a new run, once the prompts have their first
            values and before anything is made of them.
        on_backward: called as `on_backward(module, update)` after every backward pass, before
            gradients are clipped and used; updates count from 0.
    Returns:
        dict with "name", "trained_parameters", "val_accuracy", "best_epoch", "test_accuracy" (None
        without a test split), "seconds".
    Raises:
        Interrupted: SIGINT or SIGTERM arrived; the state is saved.
        ArithmeticError: the loss is not finite.
        CheckpointError, ValueError: see `RunFolder`, `methods.build_method`.
    """
    if resume is not None and folder.result() is not None:
        return folder.result()
    hooks = on_start, on_backward
    return _Run(settings, task, folder, accelerator, reporter, name, resume, *hooks).train()


class _Run:
    """The state of one run between steps; every method keeps it consistent."""

    def __init__(
        self, settings, task, folder, accelerator, reporter, name, resume, on_start, on_backward
    ):
        from accelerate.utils import set_seed
        from timm.optim import create_optimizer_v2

        self.began = time.perf_counter()
        self.settings, self.folder, self.reporter = settings, folder, reporter
        self.accelerator, self.on_backward = accelerator, on_backward
        self.name = name or settings.method
        self.main = accelerator.is_main_process

        self.alignment = None  # the MPAResult, where this process made the first prompts
        saved = None
        if resume is not None:
            saved = folder.read_state(previous=resume == "previous")
        set_seed(settings.seed)
        self.module = methods.build_method(settings, len(task.classes)).to(accelerator.device)
        self.train_data, self.val_data, self.test_data = self._data(task)
        batches = math.ceil(len(self.train_data) / settings.batch_size)
        if saved is None:
            self._write_config(task)
            if settings.mpa:
                self._align()
            if settings.spt:
                self._take_tokens()
            if on_start is not None:
                on_start(self.module)
        # DDP copies the parameters of process 0 to all; from here on each draws its own dropout
        torch.manual_seed(settings.seed + accelerator.process_index)

        self.wrapped = accelerator.prepare_model(self.module)
        groups = self.module.parameter_groups(settings.lr, settings.weight_decay)
        try:
            optimizer = create_optimizer_v2(
                groups,
                opt=settings.optimizer,
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                momentum=0.9,
            )
        except (AssertionError, ValueError, TypeError) as error:
            raise ValueError(f"--optimizer {settings.optimizer}: {error}") from error
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.scheduler = _make_scheduler(settings, optimizer, batches)

        self.epoch = self.step = self.updates = 0  # all counted in finished units
        self.rows = []
        self.best = None  # (accuracy, -loss, epoch)
        self.seconds = 0.0  # spent before this process took over
        self.sums = self._no_sums()
        if saved is not None:
            self._restore(saved)
        elif settings.mpa or settings.spt or on_start is not None:
            self._save()  # the first prompts are worth keeping

    def train(self):
        """All remaining epochs, then the test."""
        settings, reporter = self.settings, self.reporter
        total = settings.epochs * math.ceil(len(self.train_data) / settings.batch_size)
        with (
            _StopSignals() as stop,
            reporter.progress(f"{self.name}: starting", total, self.updates) as advance,
        ):
            while self.epoch < settings.epochs:
                self._train_epoch(stop, advance)
                self._finish_epoch()
                row = self.rows[-1]
                advance(0, f"{self.name}: val {row['val_accuracy']:.3f}")
                if self.epoch % max(1, settings.epochs // 10) and self.epoch < settings.epochs:
                    continue  # some ten lines say how it goes; metrics.csv has them all
                reporter.say(
                    f"{self.name}  epoch {row['epoch']}/{settings.epochs}"
                    f"  loss {row['train_loss']:.4f}  train {row['train_accuracy']:.3f}"
                    f"  val {row['val_accuracy']:.3f}  {row['seconds']:.1f} s"
                )
        return self._finish()

    def _data(self, task):
        """Pipelines of the three splits; for a linear probe, of their features."""
        settings, backbone = self.settings, self._backbone()
        from timm.data import resolve_data_config

        config = resolve_data_config({}, model=backbone)
        # a vision transformer knows the size it was built for; its configuration the original one
        size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
        size = tuple(size or config["input_size"][1:])
        if size[0] != size[1]:
            raise ValueError(f"--model {settings.model}: takes {size} images, expected square ones")
        mean, std = pixels.normalisation(settings.norm, config)

        def pipeline(images, training):
            transform, is_random = pixels.make_transform(
                settings.augment, training, size[0], config["interpolation"]
            )
            split = pixels.PixelSplit(images, transform, is_random, settings.seed, settings.workers)
            return pixels.Pipeline(split, mean, std, self.accelerator.device, settings.workers)

        linear = settings.method == "linear"
        splits = [
            # features are computed once, so a probe sees the images as evaluation shows them
            pipeline(task.train, training=not linear),
            pipeline(task.val, training=False),
            pipeline(task.test, training=False) if task.test else None,
        ]
        return [self._features(split) if linear and split else split for split in splits]

    def _backbone(self):
        return self.module.frozen.backbone if self._is_probe() else self.module.backbone

    def _is_probe(self):
        return isinstance(self.module, methods.LinearProbe)

    @torch.no_grad()
    def _features(self, data):
        """The frozen features of a split, as a split; every process computes all of them."""
        index_lists = pixels.sequential_batches(len(data), self.settings.batch_size)
        parts = []
        with self.reporter.progress(f"{self.name}: features", len(index_lists)) as advance:
            for images, _ in data.batches(index_lists):
                with self.accelerator.autocast():
                    parts.append(self.module.features(images).float())
                advance()
        return FeatureData(torch.cat(parts), data.split.labels.to(self.accelerator.device))

    def _align(self):
        """Modal Pre-Alignment on the first images of the first epoch."""
        settings = self.settings
        order = torch.cat(self._epoch_batches(0))[: settings.mpa_images]
        ((images, labels),) = self.train_data.batches([order])
        found = self.alignment = pae.mpa_init(
            self.module,
            images,
            labels,
            window=settings.mpa_window,
            stride=settings.mpa_stride,
            head=settings.mpa_head,
            search=settings.mpa_search,
            precision=settings.mpa_precision,
            devices="ranks",
            progress=self.reporter.active and not self.reporter.quiet,
        )
        self.reporter.say(f"{self.name}: {found.report()}")

    def _take_tokens(self):
        """SPT: prompts start as tokens of the training images; every process draws the same."""
        batches = self.train_data.batches(self._epoch_batches(0))
        pae.spt_init(self.module, batches, method=self.settings.spt, seed=self.settings.seed)

    def _epoch_batches(self, epoch):
        settings = self.settings
        return pixels.epoch_batches(len(self.train_data), settings.batch_size, settings.seed, epoch)

    def _train_epoch(self, stop, advance):
        """The steps of this epoch that are not done yet."""
        settings, accelerator = self.settings, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        shares = [pixels.share(b, rank, world) for b in self._epoch_batches(self.epoch)]
        shares = shares[self.step :]
        self.wrapped.train()
        if self._is_prompted() and self.step == 0:
            self._start_prompts([indices for indices, _ in shares])
        data = self.train_data.batches([indices for indices, _ in shares], self.epoch)
        for (inputs, labels), (_, weight) in zip(data, shares, strict=True):
            if self._is_prompted():
                self.module.prompts.see_labels(labels)
            logits = self.wrapped(inputs, engine=settings.engine)
            loss = F.cross_entropy(logits, labels)
            accelerator.backward(loss * weight + self.module.penalty())
            if self.on_backward is not None:
                self.on_backward(self.module, self.updates)
            self._clip()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._after_step()
            if weight > 0:
                hits = (logits.argmax(1) == labels).sum()
                self.sums += torch.stack([loss.detach() * len(labels), hits])
            advance()
            if stop.requested(accelerator):
                self._save()
                self._write_last()
                raise Interrupted
            if settings.save_every_steps and self.updates % settings.save_every_steps == 0:
                self._save()

    def _start_prompts(self, batches):
        """Lets the family look at the training data before an epoch, if it wants to."""
        module, prompts = self.module, self.module.prompts

        def passes():
            return self.train_data.batches(batches, self.epoch)

        def losses():
            for images, labels in passes():
                with self.accelerator.autocast():
                    logits = module(images, engine=self.settings.engine)
                yield F.cross_entropy(logits.float(), labels), len(labels)

        prompts.remap(module, passes())
        last_loss = self.rows[-1]["train_loss"] if self.rows else None
        prompts.start_of_epoch(losses, list(module.head.parameters()), last_loss)

    def _is_prompted(self):
        return isinstance(self.module, pae.PromptedViT)

    def _clip(self):
        """PAE clips the regulariser's gradients to norm 10, and no others."""
        if getattr(self.module, "kld", None) is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            self.module.kld.clip_gradients()

    def _after_step(self):
        self.step += 1
        self.updates += 1
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)
        if self._is_prompted():
            self.module.prompts.end_of_step()

    def _finish_epoch(self):
        """Validates, keeps the best, writes metrics and state."""
        loss, accuracy = self._means(self.sums, self.train_data)
        if not math.isfinite(loss):
            raise ArithmeticError(
                f"the training loss of epoch {self.epoch + 1} is {loss}; try a lower --lr "
                f"than {self.settings.lr}"
            )
        val_loss, val_accuracy = self._evaluate(self.val_data)
        self.epoch += 1
        self.rows.append(
            {
                "epoch": self.epoch,
                "train_loss": loss,
                "train_accuracy": accuracy,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "lr": self.optimizer.param_groups[0]["lr"],
                "seconds": round(self._elapsed(), 3),
            }
        )
        candidate = (val_accuracy, -val_loss, self.epoch)
        if self.best is None or candidate[:2] > self.best[:2]:
            self.best = candidate
            if self.main:
                self.module.save(self.folder.best)
        if self._is_prompted():
            self.module.prompts.end_of_epoch()  # may move prompts: what was measured is saved
        self.step, self.sums = 0, self._no_sums()
        self._save()
        if self.main:
            self.folder.write_metrics(self.rows)

    def _finish(self):
        """Tests the best checkpoint and writes the result, which marks the run as finished."""
        self._write_last()
        self.accelerator.wait_for_everyone()
        self.module.load(self.folder.best)
        accuracy, _, epoch = self.best
        test = self._evaluate(self.test_data)[1] if self.test_data else None
        result = {
            "name": self.name,
            "method": self.settings.method,
            "trained_parameters": methods.trained_parameters(self.module),
            "val_accuracy": accuracy,
            "best_epoch": epoch,
            "test_accuracy": test,
            "seconds": round(self._elapsed(), 3),
        }
        if self.main:
            plot_curves(self.folder.curves, {self.name: self.rows})
            self.folder.write_metrics(self.rows, result)
        self.accelerator.wait_for_everyone()
        return result

    @torch.no_grad()
    def _evaluate(self, data):
        """(mean loss, accuracy) over a split, each process taking its part."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        index_lists = pixels.sequential_batches(len(data), self.settings.batch_size)[rank::world]
        self.wrapped.eval()
        sums = self._no_sums()
        for inputs, labels in data.batches(index_lists):
            logits = self._evaluation_model()(inputs, engine=self.settings.engine)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss, (logits.argmax(1) == labels).sum()])
        return self._means(sums, data)

    def _evaluation_model(self):
        # parts differ in length by a batch, so the wrapper, which waits for all, must not be asked
        return self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=True)

    def _means(self, sums, data):
        loss, hits = self.accelerator.reduce(sums, "sum").tolist()
        return loss / len(data), hits / len(data)

    def _no_sums(self):
        """Sums over the images seen: loss, hits. On the device, so that no step waits for them."""
        return torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)

    def _elapsed(self):
        return self.seconds + time.perf_counter() - self.began

    def _write_config(self, task):
        if not self.main:
            return
        import timm

        self.folder.write_config(
            self.settings,
            name=self.name,
            task={"name": task.name, "classes": list(task.classes), **task.sizes()},
            trained_parameters=methods.trained_parameters(self.module),
            processes=self.accelerator.num_processes,
            device=_device_name(self.accelerator.device),
            versions={
                "pae": pae.__version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
            },
        )

    def _save(self):
        """Writes state.pt, from which a resumed run goes on."""
        from accelerate.utils import gather_object

        streams = {"sums": self.sums.cpu(), "cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            streams["cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        streams = gather_object([streams])
        if not self.main:
            return
        scaler = self.accelerator.scaler
        self.folder.write_state(
            {
                "module": {k: v.cpu() for k, v in self.module.trained_state().items()},
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "streams": streams,
                "epoch": self.epoch,
                "step": self.step,
                "updates": self.updates,
                "rows": self.rows,
                "best": self.best,
                "seconds": self._elapsed(),
            }
        )

    def _write_last(self):
        if self.main:
            self.module.save(self.folder.last)

    def _restore(self, saved):
        streams = saved["streams"]
        if len(streams) != self.accelerator.num_processes:
            raise ValueError(
                f"{self.folder.path} was run by {len(streams)} processes, "
                f"this is {self.accelerator.num_processes}"
            )
        methods.load_trained_state(self.module, saved["module"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.step, self.updates = saved["epoch"], saved["step"], saved["updates"]
        self.rows, self.best = saved["rows"], saved["best"]
        self.seconds = saved["seconds"]
        mine = streams[self.accelerator.process_index]
        self.sums = mine["sums"].to(self.accelerator.device)
        torch.set_rng_state(mine["cpu"])
        if "cuda" in mine:
            torch.cuda.set_rng_state(mine["cuda"], self.accelerator.device)
        if self.updates > 0 and self.epoch < self.settings.epochs:
            self.reporter.say(f"{self.name}: going on at epoch {self.epoch + 1}, step {self.step}")


class FeatureData:
    """Features (N, F) and labels (N,) on the device, with the face of `pixels.Pipeline`."""

    def __init__(self, features, labels):
        self.features, self.labels = features, labels

    def __len__(self):
        return len(self.labels)

    def batches(self, index_lists, epoch=0):
        """Yields (features (B, F), labels (B,)) for every index list."""
        for indices in index_lists:
            indices = indices.to(self.labels.device)
            yield self.features[indices], self.labels[indices]


class _StopSignals:
    """Between steps, whether SIGINT or SIGTERM arrived; a second SIGINT interrupts at once."""

    def __enter__(self):
        self.seen = False
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.seen = True

    def requested(self, accelerator):
        """Whether to stop; all processes answer alike, or they would wait for one another."""
        if accelerator.num_processes == 1:
            return self.seen
        flag = torch.tensor(float(self.seen), device=accelerator.device)
        return accelerator.reduce(flag, "sum").item() > 0


def _make_scheduler(settings, optimizer, batches_per_epoch):
    """timm's schedule, stepped per update: a pure function of the number of updates."""
    from timm.scheduler import create_scheduler_v2

    if settings.scheduler == "none":
        return None
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=settings.scheduler,
        num_epochs=settings.epochs,
        warmup_epochs=settings.warmup_epochs,
        warmup_lr=0.0,
        decay_epochs=max(1, settings.epochs // 3),
        step_on_epochs=False,
        updates_per_epoch=batches_per_epoch,
    )
    scheduler.step_update(0)
    return scheduler


def _device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} cpu, {torch.get_num_threads()} threads"
