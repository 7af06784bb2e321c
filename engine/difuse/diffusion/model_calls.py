"""The model as samplers call it: conditional rows first, then null ones, in one call; its answers checked."""
import torch


class ModelCalls:
    """Answers a program's `Call`s: one tensor per source, and the learned variance's output where there is one.

    Raises ValueError or TypeError for labels that do not fit, before the model is called.
    """

    def __init__(self, sampler, model, labels, guidance, noise, program):
        self.sampler, self.guidance = sampler, guidance
        self.channels, self.device = noise.shape[1], noise.device
        self.labels = None if labels is None else self._check_labels(labels, len(noise)).to(noise.device)  # [B]
        self.null = self._null(model) if guidance.needs_null else None  # [B]
        self.models = {"cond": model, "null": model, "skip": guidance.skip, "weak": guidance.weak}
        self.times = call_times(program)
        if labels is not None and hasattr(type(model), "for_trajectory"):  # a frozen model: some work is done once
            known = self.labels if self.null is None else torch.cat((self.labels, self.null))
            model = model.for_trajectory(self.times, known.unique())
            self.models.update(cond=model, null=model)
        self.finite, self.learned = Finite(sampler), program.learned

    def _check_labels(self, labels, batch):
        if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
            got = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise TypeError(f"{self.sampler}: labels are {got}; expected an int64 tensor, e.g. torch.tensor([3, 7])")
        if labels.shape != (batch,):
            raise ValueError(f"{self.sampler}: labels have shape {tuple(labels.shape)}; expected ({batch},), one per "
                             "sample of noise")
        return labels

    def _null(self, model):
        if self.labels is None:
            raise ValueError(f"{self.sampler}: guidance {self.guidance.scale} needs labels; give labels [B], or "
                             "guidance=1")
        num_classes = getattr(model, "num_classes", None)
        if num_classes is None:
            raise ValueError(f"{self.sampler}: guidance {self.guidance.scale} needs a null class, and "
                             f"{type(model).__name__} has no attribute num_classes to name it; set it, or use "
                             "guidance=1")
        return torch.full_like(self.labels, num_classes)

    def answers(self, call, x, t, labels, null):
        """One answer per source, views [B,C,...], and what was learned of the variance, the first answer if nothing.

        x [B,C,...], t []; labels, null: this object's own, or buffers that hold them.
        """
        outputs = {}
        if call.sources[:2] == ("cond", "null") and self.guidance.passes == 1:
            both = self._call("cond", torch.cat((x, x)), t, torch.cat((labels, null)))  # [2B,C,...]
            outputs["cond"], outputs["null"] = both.chunk(2)
        for source in call.sources:
            if source not in outputs:
                outputs[source] = self._call(source, x, t, null if source == "null" else labels)
        answers = [outputs[source][:, : self.channels] for source in call.sources]
        variance = outputs["cond"][:, self.channels :]
        return (*answers, learned_variance(self.sampler, variance, self.learned, answers[0]))

    def _call(self, source, rows, t, labels):
        t = t.expand(len(rows))
        model = self.models[source]
        out = model(rows, t) if labels is None else model(rows, t, labels)
        expected = [(len(rows), channels, *rows.shape[2:]) for channels in (self.channels, 2 * self.channels)]
        if tuple(out.shape) not in expected:
            raise ValueError(f"{self.sampler}: the model returned shape {tuple(out.shape)}; expected {expected[0]}, or "
                             f"{expected[1]} with a learned sigma")
        return out


class Finite:
    """Watches a trajectory for numbers that are not finite. A GPU is not waited for before `finish` asks it."""

    def __init__(self, name):
        self._name, self._bad = name, []

    def check(self, step, answers):
        """Look at the model's answers of this step."""
        self.remember(step, not_finite(answers))

    def remember(self, step, bad):
        """bad []: how many numbers of this step are not finite."""
        self._bad.append((step, bad))
        if bad.device.type == "cpu":
            self.finish()

    def finish(self):
        """Raise FloatingPointError for the first step in which the model returned numbers that are not finite."""
        remembered, self._bad = self._bad, []
        for step, bad in remembered:
            count = bad.tolist()
            if count:
                raise FloatingPointError(f"{self._name}: the model returned {count} numbers that are not finite at "
                                         f"step {step}; its weights, its dtype or its inputs are beyond what it can "
                                         "compute")


def learned_variance(name, variance, asked, otherwise):
    """What a model has learned of the variance, the channels behind its prediction; `otherwise` if nobody asks."""
    if asked and variance.shape[1] == 0:
        raise ValueError(f"{name}: the model returned no learned sigma; expected twice the channels, or "
                         "variance='small'")
    return variance if asked else otherwise


def call_times(program):
    """[calls] what the model is given as time: int64 where the process counts and all are whole, else float32."""
    times = torch.tensor([call.node.time for call in program.calls], dtype=torch.float64)
    whole = program.integer_times and times.eq(times.round()).all()
    return times.to(torch.int64 if whole else torch.float32)


def not_finite(tensors):
    """How many numbers of these tensors are infinite or NaN, [] on their device."""
    return sum((~tensor.isfinite()).sum() for tensor in tensors)
