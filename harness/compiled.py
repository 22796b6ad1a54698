"""--compile: the denoiser's blocks and the VAE's decoder compiled, and sampling by CUDA graphs."""

import functools
import itertools
import time
import warnings

import torch
import torch._dynamo.config
from diffusers import AutoencoderKL
from torch._dynamo.callback import on_compile_end
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from tqdm import tqdm

from harness.parallel import recording
from harness.sharded import repeated_blocks


def say_progress():
    """Say what waits for the compiler, and whenever it has done a part."""
    tqdm.write("compiling: the first images and the first update wait for it ...")
    parts, begun = itertools.count(1), time.perf_counter()
    on_compile_end(lambda *_: tqdm.write(f"compiled part {next(parts)} ({time.perf_counter() - begun:.0f} s)"))


def compile_blocks(denoiser):
    """Compile the blocks that a transformer repeats; those of one kind share their code.

    What is compiled for gradients rounds in other places than what is compiled without. So sampling runs the code of
    training too, and forgets the activations after each call of the network: else the ratio is not 1 in bfloat16.
    """
    torch._dynamo.config.recompile_limit = 64  # kinds of blocks x shapes
    torch._functorch.config.activation_memory_budget = 0.9  # what is quick to compute again is not kept for training
    for block in repeated_blocks(denoiser, "compile"):
        # a training call has one shape, and gets the fastest code for it; the adapters' many casts share kernels
        block.compile(dynamic=False, options={"combo_kernels": True})
    forward = denoiser.forward

    def forward_for_gradients(*args, **kwargs):
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: None):
            return tree_map_only(torch.Tensor, torch.Tensor.detach, forward(*args, **kwargs))

    recorded = RecordedForward(forward_for_gradients, denoiser)

    @functools.wraps(forward)
    def forward_or_record(*args, **kwargs):
        return (forward if torch.is_grad_enabled() else recorded)(*args, **kwargs)

    denoiser.forward = forward_or_record


def compile_decoder(pipe):
    """Compile what makes the pixels, where that is the usual convolutional VAE."""
    if isinstance(getattr(pipe, "vae", None), AutoencoderKL):
        pipe.vae.decoder.to(memory_format=torch.channels_last).compile(dynamic=False)


class RecordedForward:
    """A network's call without gradients, by CUDA graphs: the GPU repeats the kernels that it ran the second time.

    So it need not wait for the CPU, which takes as long to launch the kernels of a compiled transformer as an H200 to
    run them. A call is known by all that it is given and by where the network's parameters are. What cannot be recorded
    (on a CPU, in parts on several GPUs, with checkpointing, a network that looks at its own numbers) is called as ever.
    """

    PLAIN = (type(None), bool, int, float, str, torch.dtype)
    MOST = 16  # calls to remember

    def __init__(self, function, network):
        self.function, self.network = function, network
        self.known = {}  # {call: "once" when it was seen once, then (graph, inputs, outputs), or "never"}
        self.stream = self.memory = None  # the same for all graphs, which so share what they need for a while

    def __call__(self, *args, **kwargs):
        leaves, tree = tree_flatten((args, kwargs))
        key = self.key(leaves, tree)
        if key is None:
            return self.function(*args, **kwargs)
        state = self.known.pop(key, None)  # and back again: those longest unused are the first
        if state == "once":
            state = self.record(leaves, tree)
        self.known[key] = state or "once"
        if len(self.known) > self.MOST:
            self.known.pop(next(iter(self.known)))
        if not isinstance(state, tuple):
            return self.function(*args, **kwargs)
        graph, inputs, outputs = state
        for buffer, leaf in zip(inputs, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                buffer.copy_(leaf)
        graph.replay()
        return tree_map_only(torch.Tensor, torch.clone, outputs)

    @functools.cached_property
    def tensors(self):
        """The network's parameters and buffers; looked up once, since that takes as long as a small network's call."""
        return [*self.network.parameters(), *self.network.buffers()]

    @functools.cached_property
    def on_one_gpu(self):
        """Whether the network is on one GPU, all of it."""
        places = {None if isinstance(t, DTensor) else t.device for t in self.tensors}
        return len(places) == 1 and places.pop() == torch.device("cuda", torch.cuda.current_device())

    def key(self, leaves, tree):
        """What a call is known by; None if it cannot be recorded."""
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        fixed = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        if (
            any(type(leaf) not in self.PLAIN for leaf in fixed)
            or not all(t.is_cuda for t in given)
            or not self.on_one_gpu
        ):
            return None
        tensors = tuple((t.shape, t.stride(), t.dtype) for t in given)
        mode = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), self.network.training
        return str(tree), tuple(fixed), tensors, mode, tuple(map(torch.Tensor.data_ptr, self.tensors))

    def record(self, leaves, tree):
        """(graph, inputs, outputs); "never" where the network waits for the GPU, which no graph can."""
        if self.network.is_gradient_checkpointing:
            return "never"
        inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(inputs, tree)
        with recording, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")  # a recording that fails would leave torch's allocator in disorder
            try:
                self.function(*args, **kwargs)
            except RuntimeError as error:
                print(f"sampling without CUDA graphs: {str(error).splitlines()[0]}", flush=True)
                return "never"
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if tuple not in map(type, self.known.values()):  # torch gives up the memory of graphs that are all gone
                self.stream, self.memory = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            torch.clear_autocast_cache()  # of halves made before, which are gone when the graph is replayed
            with torch.cuda.graph(graph, self.memory, self.stream, capture_error_mode="thread_local"):
                outputs = self.function(*args, **kwargs)
            torch.clear_autocast_cache()
        return graph, inputs, outputs
