"""Training a host's own model: LyCore has the parameters, the arithmetic, optimizer, schedule, state and files; torch
has the graph.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_bool, c_uint64, sizeof
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import presets
from ._binding import (
    LYCORE_BUFFER_EMA,
    LYCORE_BUFFER_GRADIENTS,
    LYCORE_BUFFER_PARAMETERS,
    LYCORE_DEVICE_CPU,
    LYCORE_DEVICE_CUDA,
    LYCORE_MOMENT_END,
    LYCORE_MOMENT_EPOCH,
    LYCORE_MOMENT_STEP,
    LYCORE_NO_MODULE,
    lycore_device,
    lycore_step,
    lycore_tensor,
)
from ._library import Closable, Owned, load
from .adapter import Adapter, encoded_path
from .errors import AdapterKeyError, ArgumentError, DeviceError, FileError

if TYPE_CHECKING:
    import torch

Targets = Callable[[str, "torch.nn.Module"], bool] | Sequence[str] | str
"""Which layers: a function of name and layer, or patterns of names in which `*` stands for any text."""
Result = TypeVar("Result")


class Network(Closable):
    """A set of modules in training, on the layers of a torch model.

    `config` has sd-scripts' names where it has them; `Network.schema()` tells all keys with their defaults. It is a
    mapping, a text of JSON or TOML, or the path of a file of either (a `pathlib.Path`; a `str` is a text). Needs the
    build with libtorch: LibraryError says what is missing. In this order: `attach` or `add`, `build`, then per step
    the model's forward, `loss.backward()`, `step`. The base model needs no gradients: freeze it. One call at a time;
    a second thread gets BusyError.
    """

    def __init__(self, config: Mapping[str, Any] | str | os.PathLike[str] | None = None):
        library = load(torch=True)
        file = os.fspath(config) if isinstance(config, os.PathLike) else ""
        try:
            new = ("lycore_network_new", "lycore_network_free")
            self._owner: Owned | None = library.new(*new, _text_of(config))
        except ArgumentError as problem:
            if not file:
                raise
            raise ArgumentError(f"{file}: {problem.message}", hint=problem.hint, file=file) from None
        self.names: list[str] = []
        """The layers' names, in the order in which they were added."""
        self._hooks: list[Any] = []
        self._device: Any = None
        self._accumulation: int = self.config["gradient_accumulation_steps"]
        self._calls = 0
        # Calls of `step` since the last update; `progress` has to wait for the device.
        self._micro_steps = 0

    @staticmethod
    def schema() -> str:
        """The keys of a config with their defaults, one per line."""
        return load(torch=True).text("lycore_network_schema")

    @property
    def config(self) -> dict[str, Any]:
        """The options, those that were not given with their defaults."""
        owner = self._handle()
        return json.loads(owner.library.text("lycore_network_config", owner))

    def add(self, name: str, layer: torch.nn.Module, *, fresh: bool = False) -> int | None:
        """Puts a module on one layer (Linear, Conv1d, Conv2d, Conv3d; norms with `train_norm`) and returns its number;
        None where the config leaves the layer out.

        `name` is the layer's dotted path, or a name as it shall stand in the file. From here on the layer's output
        has the module's delta added, so run the model only after `build`. `fresh` says of a class of the host's own
        what is known of torch's: each output is new memory that neither the layer nor its backward keeps. The delta
        is then written into it, instead of into a copy.
        """
        from . import _autograd

        described, _alive = _autograd.describe(name, layer)
        index, needs_weight = c_uint64(), c_bool()
        self._call("lycore_network_add_layer", name.encode(), byref(described), byref(index))
        if index.value == LYCORE_NO_MODULE:
            return None
        self._call("lycore_network_needs_weight", index, byref(needs_weight))
        # Numbers are given in order, from 0.
        self.names.append(name)
        hook = _autograd.hook(self, index.value, layer, needs_weight.value, fresh)
        self._hooks.append(layer.register_forward_hook(hook, with_kwargs=True))
        if self._device is None:
            self._device = next((p.device for p in layer.parameters()), None)
        return index.value

    def attach(
        self,
        model: torch.nn.Module,
        targets: Targets | None = None,
        *,
        preset: str | None = None,
        prefix: str = "",
    ) -> list[str]:
        """Puts modules on the layers of `model` that `targets` or one of LyCORIS' presets names (neither: on all that
        can have one); returns their names in the model.

        `preset` is "full", "attn-mlp", ..: `lycore.presets` tells them. `prefix` stands before the names in the file,
        for example "lora_te1_" for a text encoder. AdapterKeyError when nothing matches.
        """
        from . import _autograd

        asked = preset or targets
        if preset is not None:
            if targets is not None:
                raise ArgumentError("`targets` and `preset` both say which layers.", hint="give one of them")
            targets = presets.chooser(model, preset)
        layers = [(name, layer) for name, layer in model.named_modules() if _autograd.supported(layer)]
        chosen = [(name, layer) for name, layer in layers if _wanted(targets, name, layer)]
        if not chosen:
            first = layers[0][0] if layers else ""
            hint = f"names look like `{first}`" if layers else "the model has no Linear or convolution"
            raise AdapterKeyError(f"None of {len(layers)} layers matches {asked!r}.", hint=hint, key=str(asked))
        # First, so that a layer that cannot have a module leaves everything as it was.
        for name, layer in chosen:
            _autograd.describe(prefix + name, layer)
        return [name for name, layer in chosen if self.add(prefix + name, layer) is not None]

    def detach(self) -> None:
        """Takes the modules off the layers; the model computes as before. Parameters and state stay."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def build(self, device: str | torch.device | None = None) -> None:
        """Allocates parameters, gradients and optimizer state, by default on the first layer's device, and
        initialises them.
        """
        import torch

        place = torch.device(device if device is not None else self._device or "cpu")
        if place.type not in ("cpu", "cuda"):
            raise DeviceError(f"A network cannot be on {place}.", hint="use the CPU or a CUDA device")
        if place.type == "cpu":
            described = lycore_device(LYCORE_DEVICE_CPU, 0)
        else:
            index = place.index if place.index is not None else torch.cuda.current_device()
            described = lycore_device(LYCORE_DEVICE_CUDA, index)
            place = torch.device("cuda", index)
        self._call("lycore_network_build", described)
        self._device = place

    def step(self, wait: bool = True) -> dict[str, Any] | None:
        """One optimizer step from the gradients summed so far: clip, update, clear. In the middle of an accumulation
        it only counts.

        Returns {"step", "learning_rate", "gradient_norm", "updated", "skipped"}. TrainError for a gradient that is not
        finite; parameters, state and step count are then as before.

        With `wait=False` it returns None and leaves the device to its work: such a gradient is cleared, nothing else
        changes, and `results` counts it. (Optimizers that `capture` does not take wait all the same.)
        """
        done = lycore_step(struct_size=sizeof(lycore_step))
        self._call("lycore_network_step", None, byref(done) if wait else None)
        self._calls += 1
        self._micro_steps = (self._micro_steps + 1) % self._accumulation
        return _told(done) if wait else None

    def results(self) -> dict[str, Any]:
        """What the last step did, as `step` tells it; "skipped" are those that were left out, as their gradient was not
        finite, since this was last told. Waits for the device.
        """
        done = lycore_step(struct_size=sizeof(lycore_step))
        self._call("lycore_network_results", byref(done))
        return _told(done)

    def capture(self, function: Callable[[], Result], *, warmup: int = 3) -> Callable[[], Result]:
        """A function that does what `function` does, as one CUDA graph: without the time that Python needs.

        `function` computes a loss from tensors that stay where they are, calls `loss.backward()` and
        `step(wait=False)`; with gradient accumulation so for each micro-batch of one or more updates. Before a call of
        the result copy new data into those tensors. A call returns what `function` returned, the same tensors each
        time, so the loss can be among them; `results` tells the rest. All else works as between steps, also saving and
        loading a state. The network has to live as long as the result is used.

        First runs `function` `warmup` times, without changing the network (gradients are cleared) or torch's random
        numbers. UnsupportedError for Prodigy with a first beta of 0, and without a GPU.
        """
        import torch

        if self.progress[1]:
            raise ArgumentError("The network is in the middle of an accumulation.", hint="end it, or zero_gradients")
        self._call("lycore_network_hold", True, None)
        stream, current = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        try:
            with torch.random.fork_rng([self._device.index]), torch.cuda.stream(stream):
                for _ in range(max(1, warmup)):
                    before = self._calls
                    function()
        finally:
            current.wait_stream(stream)
            self._call("lycore_network_hold", False, None)
        updates, left = divmod(self._calls - before, self._accumulation)
        if left or not updates:
            self.zero_gradients()
            what = f"The function calls step {self._calls - before} times; an update takes {self._accumulation}."
            raise ArgumentError(what, hint="capture whole updates")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, stream=stream):
            result = function()

        def replay() -> Result:
            self._call("lycore_network_prepare_replay", updates, None)
            graph.replay()
            return result

        return replay

    def evaluate(self, evaluating: bool = True) -> None:
        """From here on forward and backward leave nothing out and to chance (dropout, DyLoRA's choice of ranks), for
        example to see a validation loss; with False they do again. The mode of the model itself has no influence.
        """
        self._call("lycore_network_evaluate", evaluating)

    def broadcast(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Gives all processes of torch.distributed's group (None: the default one) the parameters of its first; once,
        after `build`, and after `load_weights`.

        Then each may have a seed of its own in its config: with dropout, masks of its own.
        """
        import torch.distributed

        torch.distributed.broadcast(self.parameters, group=group, group_src=0)
        self.refresh()

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Averages the gradients over the processes of torch.distributed's group (None: the default one). Call it
        between `backward` and `step` in each of them: they then take the same step, and their parameters stay equal.

        In the middle of an accumulation there is nothing to do yet, and it does nothing: until the update each process
        has gradients of its own, so save the state between updates. Engines other than torch.distributed average
        `gradients` in place.
        """
        import torch.distributed

        if self._micro_steps + 1 < self._accumulation:
            return
        gradients = self.gradients
        torch.distributed.all_reduce(gradients, group=group)
        gradients /= torch.distributed.get_world_size(group)

    def zero_gradients(self) -> None:
        """Clears the gradients, for example after a batch that shall not count."""
        self._call("lycore_network_zero_gradients", None)
        self._micro_steps = 0

    def refresh(self) -> None:
        """Makes the next forward see what was written into `parameters`."""
        self._call("lycore_network_refresh", None)

    def set_ranks(self, share: float) -> None:
        """From here on T-LoRA computes with the first `share` of its ranks, in (0, 1], in forward and backward.

        The paper's for timestep t of T, between `least` and all of `rank` ranks:
        `(int(((T - t) / T) ** alpha * (rank - least)) + least) / rank`. A CUDA graph that was captured after the first
        call sees the later ones. Other algorithms do not look at it.
        """
        self._call("lycore_network_set_ranks", share, None)

    @property
    def progress(self) -> tuple[int, int]:
        """Updates done, and calls of `step` since the last one (more than 0 in the middle of an accumulation)."""
        steps, micro_steps = c_uint64(), c_uint64()
        self._call("lycore_network_progress", byref(steps), byref(micro_steps))
        return steps.value, micro_steps.value

    @property
    def epochs(self) -> int:
        """How often `end_epoch` was called, before `load_state` too. A run that was stopped between the last step of an
        epoch and its end has one less than its steps say: call `end_epoch` then.
        """
        owner = self._handle()
        return owner.library.functions.lycore_network_epochs(owner)

    @property
    def parameters(self) -> torch.Tensor:
        """All parameters, fp32, flat, on the network's device; a view. After writing it call `refresh`."""
        return self._buffer(LYCORE_BUFFER_PARAMETERS)

    @property
    def gradients(self) -> torch.Tensor:
        """All gradients summed since the last update, laid out as `parameters`; a view, for example for an all-reduce
        by an engine of the host's own.
        """
        return self._buffer(LYCORE_BUFFER_GRADIENTS)

    @property
    def ema(self) -> torch.Tensor:
        """The average of the parameters that `ema_decay` keeps, laid out as they are; a view. It starts where they are
        in the first step.
        """
        return self._buffer(LYCORE_BUFFER_EMA)

    @property
    def parameter_count(self) -> int:
        """Number of trainable parameters."""
        owner = self._handle()
        return owner.library.functions.lycore_network_parameter_count(owner)

    def save(
        self,
        path: str | os.PathLike[str],
        dtype: str | None = None,
        metadata: Mapping[str, str] | None = None,
        *,
        ema: bool = False,
    ) -> None:
        """Writes the adapter as a kohya safetensors file, whole or not at all.

        `dtype` is "fp32", "fp16" or "bf16", by default the config's `save_precision`; `metadata` is added. With `ema`
        the file gets the average that `ema_decay` keeps. With a schedule-free optimizer it gets that one's average,
        which `parameters`, where gradients are taken, is not. Two files of one state differ in their times only;
        SOURCE_DATE_EPOCH in the environment stands for the clock.
        """
        added = None if metadata is None else json.dumps(dict(metadata)).encode()
        which = LYCORE_BUFFER_EMA if ema else LYCORE_BUFFER_PARAMETERS
        self._call("lycore_network_save", encoded_path(os.fspath(path)), which, dtype and dtype.encode(), added)

    def checkpoint(self, loss: float | None = None) -> dict[str, Any]:
        """Call it after each `step`: writes the files that the config makes due (`output_dir`, `save_every_n_steps`,
        `save_ranks`, `save_state`, ..), each whole or not at all, and deletes those that they put out of date.

        `loss` is a value of the parameters as they are, better of validation than of one batch: with `save_best` the
        least so far is kept in a file of its own. Returns {"step", "epoch", "best", "written": [path], "deleted":
        [path], "left": [{"file", "reason"}]}; "left" should have been deleted but was not. Only files are deleted
        that this run wrote, or the run whose state it loaded. FileError for a file that cannot be written; older
        files stay, and training can go on. Where several processes train together, one of them calls it.
        """
        return self._checkpoint(LYCORE_MOMENT_STEP, loss)

    def end_epoch(self, loss: float | None = None) -> dict[str, Any]:
        """Counts an epoch, and does what `checkpoint` does with the files due then."""
        return self._checkpoint(LYCORE_MOMENT_EPOCH, loss)

    def finish(self, loss: float | None = None) -> dict[str, Any]:
        """Writes the last files, `{output_name}.safetensors` and what goes beside it (`save_ranks`, `save_state`), as
        `checkpoint` does.
        """
        return self._checkpoint(LYCORE_MOMENT_END, loss)

    def _checkpoint(self, moment: int, loss: float | None) -> dict[str, Any]:
        owner = self._handle()
        value = float("nan") if loss is None else float(loss)
        return json.loads(owner.library.text("lycore_network_checkpoint", owner, moment, value, None))

    def adapter(self) -> Adapter:
        """The adapter as it is now, as `save` would write it: a copy that a Stack takes as any other, while training
        goes on. Between other calls, in their thread; the adapter may go to any thread.

            with lycore.Stack(other_unet) as stack:    # on the trained model itself the modules add their delta already
                stack.add(network.adapter(), 0.8)
                stack.apply()
                picture = pipeline(prompt)
        """
        owner = self._handle()
        return Adapter.of(owner.library.new("lycore_network_adapter", "lycore_adapter_free", owner, None))

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Writes everything that a resumed run needs to go on bit for bit. The order of the data is the host's."""
        self._call("lycore_network_save_state", encoded_path(os.fspath(path)))

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Reads what `save_state` wrote, into a built network of the same modules and config."""
        self._call("lycore_network_load_state", encoded_path(os.fspath(path)))
        self._micro_steps = self.progress[1]

    def load_weights(self, path: str | os.PathLike[str]) -> int:
        """Starts from an adapter file instead of a fresh initialisation; returns how many modules were found in it."""
        found = c_uint64()
        self._call("lycore_network_load_weights", encoded_path(os.fspath(path)), byref(found))
        return found.value

    def close(self) -> None:
        """Takes the modules off the layers and frees the network, once no view of its buffers is left.

        What was not saved is gone.
        """
        self.detach()
        self._owner = None

    def _buffer(self, which: int) -> torch.Tensor:
        from . import _autograd

        described = lycore_tensor()
        self._call("lycore_network_buffer", which, byref(described))
        cuda_index = described.device.device_id if described.device.device_type == LYCORE_DEVICE_CUDA else None
        address = (described.data or 0) + described.byte_offset
        return _autograd.view_of(address, described.shape[0], cuda_index, self._handle())


def _told(done: lycore_step) -> dict[str, Any]:
    return {
        "step": done.step,
        "learning_rate": done.learning_rate,
        "gradient_norm": done.gradient_norm,
        "updated": done.updated,
        "skipped": done.skipped,
    }


def _text_of(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> bytes:
    """A configuration as the library takes it."""
    if isinstance(config, os.PathLike):
        try:
            text = Path(config).read_bytes()
        except OSError as problem:
            raise FileError(f"{os.fspath(config)}: {problem.strerror}", file=os.fspath(config)) from problem
    elif isinstance(config, str):
        text = config.encode()
    else:
        # Paths are welcome where an option wants one.
        text = json.dumps(dict(config or {}), default=os.fspath).encode()
    if b"\0" in text:
        raise ArgumentError("The configuration has a NUL character.")
    return text


def _wanted(targets: Targets | None, name: str, layer: torch.nn.Module) -> bool:
    if targets is None:
        return True
    if callable(targets):
        return bool(targets(name, layer))
    patterns = [targets] if isinstance(targets, str) else targets
    return any(fnmatchcase(name, pattern) for pattern in patterns)
