"""Which models are rectified flows, and the solver that all of them are run with: Euler's, as diffusers has it."""

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler

from harness.console import quiet


def use_flow_matching(pipe):
    """Put Euler's method in the place of another solver of the same flow (DPM, UniPC), with that solver's shift.

    The rollout, the evaluation and the plain pipeline then all run one ODE. Raises ValueError for a model that is no
    rectified flow.
    """
    config = pipe.scheduler.config
    if reason := no_rectified_flow(type(pipe.scheduler).__name__, config):
        raise ValueError(reason)
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        with quiet():  # about settings of the other solver that this one has not
            pipe.scheduler = _EvenFlowMatching.from_config(config, shift=config.get("flow_shift") or 1.0)


def no_rectified_flow(scheduler, config):
    """Why a model with this scheduler (name, configuration) is no rectified flow with an ODE; None if it is one."""
    if scheduler != FlowMatchEulerDiscreteScheduler.__name__:
        if config.get("prediction_type") != "flow_prediction" or not config.get("use_flow_sigmas"):
            predicts = config.get("prediction_type")
            return f"its scheduler is {scheduler} with prediction_type {predicts}; only rectified flows will do"
    elif (config.get("sigma_max") or 1) > 1:
        return f"its noise levels begin at {config['sigma_max']:g}; only rectified flows, from 1 to 0, will do"
    elif config.get("stochastic_sampling"):
        return "its scheduler has stochastic_sampling, so it has no ODE of its own; only rectified flows will do"
    return None


class _EvenFlowMatching(FlowMatchEulerDiscreteScheduler):
    """Noise levels 1, ..., 2/n, 1/n before the shift, as those solvers have; saved under its parent's name."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        if sigmas is None and timesteps is None:
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)


_EvenFlowMatching.__name__ = FlowMatchEulerDiscreteScheduler.__name__
_EvenFlowMatching.__module__ = FlowMatchEulerDiscreteScheduler.__module__
