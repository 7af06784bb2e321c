"""From noise to images. One function per method, one signature for all:

    sampler(model, noise, *, process, steps, prediction, labels=None, guidance=1.0, spacing=None, generators=None,
            clip=None, image=None, strength=1.0, mask=None, callback=None, graphs=None, **options)

model       called as model(x [B,C,H,W], t [B], labels [B]), or model(x, t) without labels; returns the prediction
            [B,C,H,W], or [B,2C,H,W] with a learned sigma, which only ddpm(variance="learned") uses. A frozen model,
            whose class has for_trajectory(times, labels), is asked once for the model to call
noise       float32 [B,C,H,W], the state at the noisy end, as `initial_noise` draws it; it is not written to
steps       their number, or the times themselves, noise first; a step is one call of the model or more, as its method
            says
prediction  what the model predicts: "eps", "x0", "v", "flow", "score" or "edm"
labels      int64 [B], or None for a model without classes
guidance    classifier-free guidance w, which needs labels and `model.num_classes`, the null class; or a `Guidance`
spacing     of the times, see grids.py; None for the process's own
clip        each predicted x0 is kept within bounds: a number, from -it to it; `Clamp`, `Threshold`; see clipping.py
image       float32 [B,C,H,W] to start from: with `strength` < 1 the last part of the steps, from the image with noise
            (SDEdit, arXiv:2108.01073); with `mask` float32 [B,C,H,W], 1 where the image is to change, all of them, the
            rest being put back after each (RePaint's line, arXiv:2201.09865)
generators  one torch.Generator per sample, for the noise of stochastic samplers: an image does not depend on its
            batch mates. No number is drawn where its coefficient is zero.
callback    callback(step, x) after each step, step counting from 0; where it returns a tensor, that is the state from
            here on, where it returns False, sampling stops with this x. `Previews(function)`: function(step, x, x0)
graphs      difuse.Graphs: steps are recorded as CUDA graphs and replayed. The same images, less work for the host
options     the method's own, e.g. eta of ddim: the arguments after `*` of its function in `difuse.diffusion.methods`
Returns x0 [B,C,H,W] float32. Raises ValueError or TypeError before the model is called for what does not fit,
FloatingPointError where the model returns numbers that are not finite.

A method is recorded, see method.py, before it runs: the coefficients of all steps are computed in float64, then a step
is its model calls and, nearly always, one fused update.
"""
import difflib
import functools
import inspect

import torch

from difuse.diffusion.clipping import clipping
from difuse.diffusion.grids import part_of, path
from difuse.diffusion.guidance import Guidance, skip_layers
from difuse.diffusion.method import record
from difuse.diffusion.methods import ancestral, dpm_solver, euler, multistep, sde, unipc
from difuse.diffusion.model_calls import ModelCalls, not_finite
from difuse.diffusion.parameterizations import PREDICTIONS
from difuse.diffusion.processes import EDM, PROCESSES, VESDE, VP, VPSDE, Flow, SubVPSDE
from difuse.diffusion.program import Apply, Call, Draw, Map, Weigh, to_device
from difuse.diffusion.run import Run, as_state, mapped, weigh

_PRESERVING = (VP, VPSDE, SubVPSDE)
_ANY = tuple(PROCESSES.values())


class Sampler:
    """One method as a function; the module says what it takes. `name`, and `options`: its own with their defaults."""

    def __init__(self, name, method, kinds):
        self.name, self._method, self._kinds = name, method, kinds
        parameters = list(inspect.signature(method).parameters.values())[2:]
        self.options = {p.name: p.default for p in parameters if p.name != "process"}
        self._asks_process = any(p.name == "process" for p in parameters)
        self._recorded = functools.lru_cache(32, typed=True)(self._record)  # of apps that ask for the same again
        self.__name__, self.__doc__ = name, method.__doc__
        self.__signature__ = inspect.signature(self.__call__).replace(parameters=[
            *(p for p in inspect.signature(self.__call__).parameters.values() if p.kind != p.VAR_KEYWORD),
            *(p for p in parameters if p.name != "process")])

    def __repr__(self):
        return f"<sampler {self.name}{self.__signature__}>"

    def takes(self, process):
        """Whether the method is one for this process."""
        return isinstance(process, self._kinds)

    def check_options(self, names):
        """Raise TypeError for the first that is no option of the method's own, with the nearest that is."""
        for name in names:
            if name not in self.options:
                near = difflib.get_close_matches(name, self.options, n=1, cutoff=0)
                raise TypeError(f"{self.name}: option {name!r} is unknown; " + (
                    f"did you mean {near[0]!r}? Expected {', '.join(self.options)}" if near else "it has none"))

    def program(self, process, steps, prediction, guidance=1.0, *, spacing=None, clip=None, labels=None, given=0,
                strength=1.0, preview=False, **options):
        """The `Program` of a whole trajectory. Raises ValueError or TypeError for what does not fit together.

        given: 0, 1 for an image or 2 for an image and a mask.
        """
        if not self.takes(process):
            others = next((other for kind, other in ((Flow, "flow_euler"), (_PRESERVING, "ddim")) if isinstance(
                process, kind)), "euler")
            raise ValueError(f"{self.name}: process is {type(process).__name__}; expected "
                             f"{', '.join(kind.__name__ for kind in self._kinds)}. Use {others} with it")
        if prediction not in PREDICTIONS:
            raise ValueError(f"{self.name}: prediction {prediction!r} is unknown; expected one of "
                             f"{', '.join(PREDICTIONS)}")
        if (prediction == "v" and isinstance(process, Flow)) or (prediction == "edm" and not isinstance(process, EDM)):
            fits = "a variance preserving process; on Flow a network predicts 'flow'" if prediction == "v" else "EDM"
            raise ValueError(f"{self.name}: prediction {prediction!r} with {type(process).__name__}; it belongs to "
                             f"{fits}")
        self.check_options(options)
        if not isinstance(guidance, Guidance):
            guidance = Guidance(guidance)
        try:
            if isinstance(steps, list) or (isinstance(steps, torch.Tensor) and steps.dim() == 1):
                steps = tuple(steps.tolist() if isinstance(steps, torch.Tensor) else steps)  # kept: it cannot change
            settings = process, steps, prediction, guidance, spacing, clipping(clip)
            if guidance.classifier or guidance.skip or guidance.weak:  # nothing that holds a model is kept
                return self._record(*settings, labels, given, strength, preview, **options)
            return self._recorded(*settings, None, given, strength, preview, **options)
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            if str(error).startswith(self.name):
                raise
            if not isinstance(error, ValueError):
                error = ValueError(f"{type(process).__name__} with spacing {spacing or process.spacing!r} begins at "
                                   "pure noise, alpha = 0, where this method divides by alpha; use another spacing, "
                                   "e.g. 'log_snr', or another method, e.g. unipc")
            raise ValueError(f"{self.name}: {error}") from None

    def _record(self, process, steps, prediction, guidance, spacing, clip, labels, given, strength, preview, **options):
        if self._asks_process:
            options["process"] = process
        nodes = path(process, list(steps) if isinstance(steps, tuple) else steps, spacing)
        nodes = nodes[part_of(1 - strength, len(nodes) - 1) :]  # at least one step, the last
        prior = 1.0 if process.prior == 1 else nodes[0].sigma
        program = record(functools.partial(self._method, **options), nodes, prediction, guidance, prior=prior,
                         labels=labels, given=("image", "mask")[:given], clip=clip, preview=preview)
        program.integer_times = process.model_times == torch.int64
        return program

    @torch.no_grad()
    def __call__(self, model, noise, *, process, steps, prediction, labels=None, guidance=1.0, spacing=None,
                 generators=None, clip=None, image=None, strength=1.0, mask=None, callback=None, graphs=None,
                 **options):
        if not isinstance(noise, torch.Tensor) or noise.dtype != torch.float32:
            got = noise.dtype if isinstance(noise, torch.Tensor) else type(noise).__name__
            raise TypeError(f"{self.name}: noise is {got}; expected a float32 tensor [B,C,H,W], see initial_noise")
        if noise.dim() < 3:
            raise ValueError(f"{self.name}: noise has shape {tuple(noise.shape)}; expected [B,C,H,W]")
        given = _images(self.name, noise, image, strength, mask)
        if not isinstance(guidance, Guidance):
            guidance = Guidance(guidance)
        guidance.check_shape(self.name, noise.shape)
        there = labels.to(noise.device) if isinstance(labels, torch.Tensor) else labels
        program = self.program(process, steps, prediction, guidance, spacing=spacing, clip=clip, labels=there,
                               given=len(given), strength=strength, preview=isinstance(callback, Previews), **options)
        if program.draws and (generators is None or len(generators) != len(noise)):
            raise ValueError(f"{self.name}: got {'no' if generators is None else len(generators)} generators for "
                             f"{len(noise)} samples, and each step draws noise; give one torch.Generator per sample")
        calls = ModelCalls(self.name, model, labels, guidance, noise, program)

        def draw():
            return _draw(noise.shape[1:], generators, noise.device)

        if graphs is not None:
            return replay(program, calls, (noise, *given), draw, callback, graphs)
        return integrate(program, calls, (noise, *given), draw, callback)


def integrate(program, calls, tensors, draw, callback=None):
    """From the noise, tensors[0], through all of a program."""
    times = iter(calls.times.to(tensors[0].device))
    run = Run(program, tensors, draw, callback)
    while (asked := run.advance()) is not None:
        call, x = asked
        answers = calls.answers(call, x, next(times), calls.labels, calls.null)
        calls.finite.check(call.step, answers[:-1])
        run.give(answers)
    calls.finite.finish()
    return run.x


def replay(program, calls, tensors, draw, callback, graphs):
    """`integrate`, each step a recorded graph: steps of one structure are one graph with other numbers in it."""
    if calls.guidance.classifier:
        raise ValueError(f"{calls.sampler}: a classifier's gradient at another time is another graph at every step; "
                         "expected graphs=None with it")
    models = {role: model for role, model in calls.models.items() if model is not None}
    if isinstance(calls.guidance.skip, skip_layers):  # known by the model whose layers it skips
        models |= {f"skip {calls.guidance.skip.layers}": models.pop("skip").model}
    surroundings, segments = graphs.surroundings(models), program.segments()
    room = len({segment.structure for segment in segments})
    known, tables = dict(enumerate(tensors)), program.tables(tensors[0].device)
    times = iter(calls.times.to(tensors[0].device))
    for segment in segments:
        step = graphs.bind(functools.partial(_advance, segment, calls), (surroundings, segment.structure,
                                                                        calls.guidance.passes), room)
        numbers = []  # what this step's instructions take beside tensors: a time, coefficients, noise
        for i, each in enumerate(segment.instructions, segment.first):
            numbers += ([next(times)] if isinstance(each, Call) else [tables[i]] if isinstance(each, Map) else
                        [draw()] if isinstance(each, Draw) else [])
        *states, bad = step(*(known[tensor] for tensor in segment.reads), calls.labels, calls.null, *numbers)
        known.update(zip(segment.writes, states, strict=True))
        done = segment.instructions[-1]
        calls.finite.remember(done.step, bad.clone())
        x, answer = known[done.inputs[0]], None
        if callback is not None:
            answer = callback(done.step, *(known[tensor].clone() for tensor in done.inputs))
        if isinstance(answer, torch.Tensor):
            x = known[done.inputs[0]] = as_state(answer, x)
        if answer is False:
            break
    calls.finite.finish()
    return x.clone()


def _advance(segment, calls, *inputs):
    """One step on tensors that stay where they are: what it writes, and how many numbers were not finite."""
    here = dict(zip(segment.reads, inputs, strict=False))
    labels, null, *numbers = inputs[len(segment.reads) :]
    numbers, answers = iter(numbers), []
    for each in segment.instructions:
        given = [here[tensor] for tensor in each.inputs]
        if isinstance(each, Map):
            results = mapped(given, next(numbers), torch.float32)
        elif isinstance(each, Weigh):
            results = weigh(each.function, given)
        elif isinstance(each, Apply):
            results = [each.function(*given)]
        elif isinstance(each, Call):
            results = calls.answers(each, given[0], next(numbers), labels, null)
            answers += results[:-1]
        else:
            results = [next(numbers)] if isinstance(each, Draw) else []
        here.update(zip(each.outputs, results, strict=True))
    return *(here[tensor] for tensor in segment.writes), not_finite(answers)


class Previews:
    """A callback that is also given the predicted data: function(step, x, x0)."""

    def __init__(self, function):
        self._function = function

    def __call__(self, step, x, x0):
        return self._function(step, x, x0)


def _images(sampler, noise, image, strength, mask):
    """The image and the mask, checked: those that are there."""
    if image is None:
        if mask is not None or strength != 1:
            raise ValueError(f"{sampler}: a mask and a strength need an image to start from; give image [B,C,H,W]")
        return ()
    if not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        raise ValueError(f"{sampler}: strength is {strength!r}; expected above 0, which leaves the image, to 1")
    for name, tensor in (("image", image), ("mask", mask)):
        if tensor is not None and (not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32 or (
                tensor.shape != noise.shape or tensor.device != noise.device)):
            got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{sampler}: {name} is {got}; expected float32 {tuple(noise.shape)} on {noise.device}, as "
                             "the noise")
    return (image,) if mask is None else (image, mask)


SAMPLERS = {sampler.name: sampler for sampler in (
    Sampler("ddpm", ancestral.ddpm, _PRESERVING),
    Sampler("ddim", ancestral.ddim, _PRESERVING),
    Sampler("euler", euler.euler, _ANY),
    Sampler("euler_ancestral", euler.euler_ancestral, _ANY),
    Sampler("heun", euler.heun, _ANY),
    Sampler("dpm_solver_2", dpm_solver.dpm_solver_2, _ANY),
    Sampler("dpm_solver_3", dpm_solver.dpm_solver_3, _ANY),
    Sampler("dpm_solver_pp_2m", dpm_solver.dpm_solver_pp_2m, _ANY),
    Sampler("dpm_solver_pp_3m", dpm_solver.dpm_solver_pp_3m, _ANY),
    Sampler("dpm_solver_pp_2m_sde", dpm_solver.dpm_solver_pp_2m_sde, _ANY),
    Sampler("dpm_solver_pp_sde", dpm_solver.dpm_solver_pp_sde, _ANY),
    Sampler("unipc", unipc.unipc, _ANY),
    Sampler("pndm", multistep.pndm, _ANY),
    Sampler("deis", multistep.deis, _ANY),
    Sampler("flow_euler", euler.flow_euler, (Flow,)),
    Sampler("flow_heun", euler.flow_heun, (Flow,)),
    Sampler("flow_stochastic", euler.flow_stochastic, (Flow,)),
    Sampler("lcm", ancestral.lcm, _PRESERVING),
    Sampler("consistency", ancestral.consistency, (EDM, VESDE)),
    Sampler("ancestral_ve", ancestral.ancestral_ve, (EDM, VESDE)),
    Sampler("reverse_diffusion", sde.reverse_diffusion, _ANY),
    Sampler("predictor_corrector", sde.predictor_corrector, _ANY),
)}
ddpm, ddim, flow_euler = SAMPLERS["ddpm"], SAMPLERS["ddim"], SAMPLERS["flow_euler"]


def find_sampler(name):
    """The `Sampler` of this name. Raises ValueError, with the nearest name, if there is none."""
    if name not in list(SAMPLERS):
        near = difflib.get_close_matches(str(name), SAMPLERS, n=1, cutoff=0)[0]
        raise ValueError(f"sampler {name!r} is unknown; did you mean {near!r}? Expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def initial_noise(shape, seeds, device="cpu"):
    """Standard normal noise [B,*shape] and its generators, one per seed; `shape` is that of one sample, (C,H,W).

    Sample i comes from a CPU generator seeded seeds[i], whatever the device and the batch. Hand the generators on to
    the sampler: they continue each sample's own stream.
    """
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    if not generators:
        raise ValueError("initial_noise: seeds is empty; expected one integer per sample")
    return _draw(shape, generators, device), generators


def _draw(shape, generators, device):
    z = torch.stack([torch.randn(shape, generator=g, device=g.device, dtype=torch.float32) for g in generators])
    return z if z.is_cuda else to_device(z, device)
